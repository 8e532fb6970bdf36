"""How well an autoencoder gives the pictures of a task back: PSNR, SSIM, perceptual distance, and a sheet to look at."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from clipkit.data.decode import crop_and_resize
from clipkit.data.tars import BadSample
from clipkit.diffusion.autoencoder import CONFIG_NAME, WEIGHTS_NAME, to_pixel_values
from clipkit.diffusion.reconstruction import psnr, ssim
from clipkit.evaluation.statistics import mean_interval
from clipkit.evaluation.tasks import load_task
from clipkit.model.build import file_sha256
from clipkit.training.atomic_files import write_text_atomically
from clipkit.training.curves import metric_panel, plot_curves

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

NUM_SHOWN = 48  # pictures on the sheet
COLUMNS = 8  # pairs in a row
MARGIN, HEADER = 8, 34  # pixels
CELL_SIZE = 96  # least pixels a side of a picture on the sheet
# Of curves.png: title, names in metrics.jsonl.
PANELS = (("loss", "loss"), ("mean absolute error of a pixel value (-1 to 1)", "pixels"), ("perceptual distance", "perceptual"),
          ("KL, nats a pixel value", "kl"), ("discriminator", "discriminator_loss", "adaptive_weight"), ("learning rate", "lr"))


class ReconstructionReport(NamedTuple):
    """What was measured on one task, and the first pictures of it."""

    records: list[dict[str, Any]]  # task, metric, value, n, ci_low, ci_high
    images: Tensor  # (N, 3, H, W) in [-1, 1], at most NUM_SHOWN
    reconstruction: Tensor  # (N, 3, H, W)


@torch.no_grad()
def measure_reconstruction(autoencoder: "AutoencoderKL", task: str, *, image_size: int, batch_size: int,
                           perceptual: nn.Module | None, cache_dir: str | None = None) -> ReconstructionReport:
    """Encode the pictures of a task, decode the middle of each one's latents, and compare.

    Args:
      autoencoder: on its device.
      task: as `clipkit zero-shot` names it: emoji_val, shards, a folder, ...
      image_size: pixels a side; the middle square of a picture is taken.
      batch_size: pictures at once.
      perceptual: as `make_perceptual` returns it; None leaves the perceptual distance out.
      cache_dir: folder for unpacked data; None = the user's cache.

    Raises:
      FileNotFoundError: there is no such task.
      ValueError: it has no picture that can be used.
    """
    columns: dict[str, list[Tensor]] = {"psnr": [], "ssim": [], "perceptual_distance": []}
    shown: list[tuple[Tensor, Tensor]] = []
    for batch in task_images(task, image_size=image_size, batch_size=batch_size, cache_dir=cache_dir):
        images = to_pixel_values(batch.to(autoencoder.device))  # (B, 3, H, W)
        latents = autoencoder.encode(images).latent_dist.mean  # pyright: ignore[reportAttributeAccessIssue]
        reconstruction = autoencoder.decode(latents).sample.float().clamp(-1, 1)  # pyright: ignore
        columns["psnr"].append(psnr(images, reconstruction))
        columns["ssim"].append(ssim(images, reconstruction))
        if perceptual is not None:
            pairs = zip(images.split(1), reconstruction.split(1), strict=True)
            columns["perceptual_distance"].append(torch.stack([perceptual(one, other) for one, other in pairs]))
        if len(shown) * batch_size < NUM_SHOWN:
            shown.append((images.cpu(), reconstruction.cpu()))
    if not columns["psnr"]:
        raise ValueError(f"{task} has no picture that can be used; name another task in evaluation.final_tasks")
    records = [_record(task, metric, torch.cat(found).double().numpy(force=True)) for metric, found in columns.items() if found]
    images, reconstruction = (torch.cat(side)[:NUM_SHOWN] for side in zip(*shown, strict=True))
    return ReconstructionReport(records, images, reconstruction)


def task_images(task: str, *, image_size: int, batch_size: int, cache_dir: str | None = None) -> Iterator[Tensor]:
    """Read a task's pictures in order: batches (B, 3, H, W) uint8, each the middle square at `image_size` pixels a side."""
    batch: list[Tensor] = []
    for sample in load_task(task, cache_dir=cache_dir).images.read():
        if isinstance(sample, BadSample):
            continue
        image = np.asarray(sample.image.convert("RGB")).copy()  # (H, W, 3)
        height, width = image.shape[:2]
        side = min(height, width)
        batch.append(crop_and_resize(image, ((height - side) // 2, (width - side) // 2, side, side), image_size))
        if len(batch) == batch_size:
            yield torch.stack(batch)
            batch = []
    if batch:
        yield torch.stack(batch)


def write_report(run_dir: Path, reports: Sequence[ReconstructionReport], *, autoencoder: Path, step: int,
                 perceptual: str) -> None:
    """Write results.json and, of the first task, reconstructions.png; print a line a task.

    Args:
      run_dir: the run folder.
      reports: one a task, at least one.
      autoencoder: folder of what was measured.
      step: its optimizer steps.
      perceptual: whose features the perceptual distance compares.
    """
    from clipkit import __version__

    records = [record for report in reports for record in report.records]
    facts = {"schema_version": 1, "name": run_dir.name, "step": step, "perceptual": perceptual,
             "scaling_factor": json.loads((autoencoder / CONFIG_NAME).read_text())["scaling_factor"],
             "weights_sha256": file_sha256(autoencoder / WEIGHTS_NAME), "clipkit_version": __version__, "results": records}
    write_text_atomically(run_dir / "results.json", json.dumps(facts, indent=1) + "\n")
    draw_reconstructions(reports[0], run_dir / "reconstructions.png",
                         title=f"{run_dir.name}, {records[0]['task']}: originals, each with its reconstruction on the right")
    print()
    for record in records:
        bounds = "" if record["ci_low"] is None else f" [{record['ci_low']:.3f}, {record['ci_high']:.3f}]"
        print(f"{record['task']}  {record['metric']:<20} {record['value']:.3f}{bounds}  n={record['n']:,}")


def draw_reconstructions(report: ReconstructionReport, path: Path, *, title: str) -> None:
    """Draw pairs, the original on the left and its reconstruction on the right, as a PNG."""
    scale = -(-CELL_SIZE // report.images.shape[-1])
    size = scale * report.images.shape[-1]
    columns = min(COLUMNS, len(report.images))
    rows = -(-len(report.images) // columns)
    step = 2 * size + 2 * MARGIN
    sheet = Image.new("RGB", (columns * step + MARGIN, HEADER + rows * (size + MARGIN)), "white")
    ImageDraw.Draw(sheet).text((MARGIN, MARGIN), title, "#1a1a1a", ImageFont.load_default(16))
    for number, pair in enumerate(zip(report.images, report.reconstruction, strict=True)):
        row, column = divmod(number, columns)
        for side, pixels in enumerate(pair):
            values = ((pixels + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()  # (H, W, 3)
            picture = Image.fromarray(values).resize((size, size), Image.Resampling.NEAREST)
            sheet.paste(picture, (MARGIN + column * step + side * size, HEADER + row * (size + MARGIN)))
    sheet.save(path)


def draw_curves(run_dir: Path) -> None:
    """Draw the parts of the loss over a run, as its curves.png."""
    plot_curves(run_dir, panels=[metric_panel(*panel) for panel in PANELS])


def _record(task: str, metric: str, values: np.ndarray) -> dict[str, Any]:
    low, high = mean_interval(values) if len(values) > 1 else (None, None)
    return {"task": task, "metric": metric, "value": float(values.mean()), "n": len(values), "ci_low": low, "ci_high": high}
