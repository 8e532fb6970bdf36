"""Many samples within the memory there is: batch by batch to disk, and in halves where memory is not enough."""

import contextlib
import gc
import hashlib
import json
import re
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from clipkit.config.diffusion.sample import SamplingConfig
from clipkit.config.diffusion.train import ProcessConfig
from clipkit.config.schema import parse
from clipkit.diffusion.generate import Sampling, decode, walk
from clipkit.diffusion.noise_schedule import trailing_indices
from clipkit.diffusion.pipeline_folder import Pipeline, load_pipeline, pipeline_sha256, read_facts
from clipkit.diffusion.sample_conditions import Conditions, Sources, cut_note
from clipkit.diffusion.sample_files import SHEET, Found, check_place, draw_sheet, find_samples, sample_path, write_sample
from clipkit.diffusion.sheets import to_pictures
from clipkit.training.distributed import start_process
from clipkit.training.live_line import LiveLine

NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")  # of CUDA and MPS, of the CPU, of Windows
SLUG_LETTERS = 40
CPU_BATCH = 4  # at once on the CPU, which gains little by more


class Order(NamedTuple):
    """The pictures that are wanted: sample i is a function of these and of i, whatever it shares a batch with."""

    num_samples: int
    seed: int  # of sample 0; sample i has seed + i
    scheduler: str  # as the user names it
    how: Sampling
    model_sha256: str  # of the pipeline

    def facts_of(self, number: int, sources: Sources) -> dict[str, str]:
        """What the file of a sample says of it."""
        how = self.how
        settings = {"scheduler": self.scheduler, "steps": how.steps, "guidance_scale": how.guidance_scale,
                    "guidance_rescale": how.guidance_rescale, "model_sha256": self.model_sha256}
        return {**sources.facts[sources.number_of(number)], "seed": str(self.seed + number),
                **{name: str(value) for name, value in settings.items()}}


def make_order(config: SamplingConfig, folder: Path, sources: Sources) -> Order:
    """Settle which pictures are wanted of a pipeline folder; nothing is loaded yet.

    Args:
      config: scheduler None = what fits the model; n_samples None = one of each source.
      folder: of the pipeline.
      sources: what they are made from.

    Raises:
      ValueError: the model makes pictures from something else, the scheduler does not fit what it predicts, or there are more
        steps than it has levels.
    """
    facts = read_facts(folder)
    process, kind = parse(ProcessConfig, facts["process"]), facts["conditioning"]["kind"]
    if (kind == "text") == bool(sources.files):
        wanted, advice = ("texts", "prompts='a red heart'") if kind == "text" else (f"pictures ({kind})", "images=<folder>")
        raise ValueError(f"{config.model} makes pictures from {wanted}; give {advice}")
    name = config.scheduler or ("flow" if process.prediction == "flow" else "ddim")
    if name == "flow" and process.prediction != "flow":
        raise ValueError("scheduler is 'flow', which follows the straight path of a flow model, and this model predicts "
                         f"{process.prediction!r}; choose ddim, dpmpp_2m, euler or ddpm")
    trailing_indices(config.steps, process.num_timesteps)
    how = Sampling("euler" if name == "flow" else name, config.steps, config.guidance_scale, config.guidance_rescale)
    return Order(config.n_samples or len(sources.facts), config.seed, name, how, pipeline_sha256(folder))


def run_folder(source: str) -> Path:
    """Where what is made from a model goes by default: into its run, else into the present folder."""
    place = Path(source).expanduser()
    return place if (place / "config.yaml").is_file() else Path()


def folder_name(title: str, sources: Sources, order: Order) -> str:
    """Name a folder of samples: other settings, another name; the same again, the same, however many are wanted."""
    slug = re.sub(r"\W+", "-", title.lower()).strip("-")[:SLUG_LETTERS].strip("-")
    told = json.dumps([sources.facts, order._replace(num_samples=0)], ensure_ascii=False)
    return f"{slug}-{hashlib.sha256(told.encode()).hexdigest()[:8]}"


def fill_folder(config: SamplingConfig, folder: Path, sources: Sources, order: Order, out: Path) -> Found:
    """Have all samples in a folder, with a sheet; the model is loaded if one is missing.

    Args:
      config: batch_size, memory, compile and device are read.
      folder: of the pipeline.
      sources: what they are made from.
      order: from `make_order`.
      out: made if missing.

    Returns:
      What was there before.

    Raises:
      ValueError: `out` has pictures of other settings, or one cannot be made.
      OSError: `out` cannot be written, or has no room.
    """
    check_place(out, num_samples=order.num_samples, image_size=read_facts(folder)["image_size"])
    print(f"pictures  {order.num_samples:,} of {len(sources.facts):,} {'pictures' if sources.files else 'prompts'}, seeds from "
          f"{order.seed}, {order.scheduler} in {order.how.steps} steps, guidance {order.how.guidance_scale:g}, into {out}",
          flush=True)
    found = find_samples(out, lambda number: order.facts_of(number, sources), num_samples=order.num_samples)
    if len(found.whole) < order.num_samples or not (out / SHEET).exists():
        device = start_process(config.device, timeout_seconds=60).device
        pipeline = load_for_sampling(folder, memory=config.memory, compile=config.compile, device=device)
        print(f"model     {folder}: {pipeline.image_size} px, conditioned by {pipeline.conditioning.kind}, on {device}")
        if note := cut_note(pipeline, sources):
            print(note)
        conditions, line = Conditions(pipeline, sources), LiveLine(sys.stdout)
        make_samples(pipeline, conditions, order, out, found, batch_size=config.batch_size, device=device, line=line)
        line.close()
        draw_sheet(out, conditions, num_samples=order.num_samples, title=Path(config.model).name)
    return found


def load_for_sampling(folder: Path, *, memory: str, compile: bool, device: torch.device) -> Pipeline:
    """Load a pipeline onto the device; with memory "low" onto the CPU, from where its parts come one by one.

    Raises:
      FileNotFoundError, ValueError: as `load_pipeline` raises them.
    """
    pipeline = load_pipeline(folder, device="cpu" if memory == "low" else device)
    parts: list[Any] = [pipeline.denoise.unet, *filter(None, [pipeline.autoencoder])]
    if memory == "low":
        if hasattr(parts[0], "set_attention_slice"):
            parts[0].set_attention_slice("auto")
        for autoencoder in parts[1:]:
            autoencoder.enable_slicing()
            autoencoder.enable_tiling()
    return pipeline._replace(denoise=torch.compile(pipeline.denoise)) if compile else pipeline  # pyright: ignore


def make_samples(pipeline: Pipeline, conditions: Conditions, order: Order, folder: Path, found: Found, *, batch_size: int,
                 device: torch.device, line: LiveLine) -> None:
    """Make the samples that a folder lacks, each written as soon as it is there.

    Args:
      pipeline: from `load_for_sampling`.
      conditions: what they are made from.
      order: which.
      folder: exists and can be written.
      found: what it has.
      batch_size: at once, at most.
      device: where they are made.
      line: shows how many are there, and says when memory is not enough.

    Raises:
      ValueError: a picture is not finite, or memory is not enough for one.
      OSError: a picture cannot be written.
    """
    missing = deque(number for number in range(order.num_samples) if number not in found.whole)
    batch_size = min(batch_size, CPU_BATCH) if device.type == "cpu" else batch_size
    started, num_kept = time.monotonic(), len(found.whole)
    while missing:
        numbers = next_batch(missing, batch_size, device)
        pictures = make_batch(pipeline, conditions, order, numbers, device=device)
        if pictures is None:
            if len(numbers) == 1:
                raise ValueError(f"{device} has not enough memory for one picture at a time; give memory=low or device=cpu, or "
                                 "end what else takes memory there. The pictures made so far are kept")
            batch_size = len(numbers) // 2
            line.say(f"note      {device} has not enough memory for {len(numbers)} pictures at once; going on with batch_size="
                     f"{batch_size}")
            continue
        for number, picture in zip(numbers, to_pictures(pictures), strict=True):
            if missing and missing[0] == number:
                write_sample(sample_path(folder, number), picture, order.facts_of(number, conditions.sources))
                missing.popleft()
        done = order.num_samples - len(missing)
        per_second = (done - num_kept) / max(time.monotonic() - started, 1e-9)
        line.update(f"pictures  {done:,} of {order.num_samples:,}, {per_second:.2f} a second", always=not missing)


def next_batch(missing: Sequence[int], batch_size: int, device: torch.device) -> list[int]:
    """Choose the samples that go through the networks next, the first of the missing among them.

    On the CPU, a sample always has the same neighbours, be they there already or not wanted at all: the last bits of a sum
    hang on the shapes that it is part of, and so no bit of a picture hangs on batch_size or on where a run was stopped.
    """
    if device.type == "cpu":
        first = missing[0] // batch_size * batch_size
        return list(range(first, first + batch_size))
    return list(islice(missing, batch_size))


def make_batch(pipeline: Pipeline, conditions: Conditions, order: Order, numbers: Sequence[int], *,
               device: torch.device) -> Tensor | None:
    """Make pictures (B, 3, H, W) in [0, 1], on the CPU; None where the device's memory is not enough.

    Raises:
      ValueError: a picture is not finite.
    """
    try:
        with on_device(pipeline.conditioning, device):
            condition = conditions(numbers).to(device)  # (B, L, D) or (B, M, h, w)
        with on_device(pipeline.denoise, device):
            latents = walk(pipeline, condition, [order.seed + number for number in numbers], order.how)  # (B, C, h, w)
        with on_device(pipeline.autoencoder, device), torch.no_grad():
            pictures = (decode(pipeline, latents) / 2 + 0.5).cpu()
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        pictures = None
    if pictures is None:  # outside of the except: there, the error would still hold the tensors
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        return None
    for number, picture in zip(numbers, pictures, strict=True):
        if not picture.isfinite().all():
            raise ValueError(f"sample {number} is not finite; the model has no good weights: train it again from an earlier "
                             "checkpoint, or with a lower optim.lr")
    return pictures.clamp(0, 1)


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory was what lacked: torch has a class for it on CUDA, elsewhere only words."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(words in str(error).lower() for words in NO_MEMORY)


@contextlib.contextmanager
def on_device(module: nn.Module | None, device: torch.device) -> Iterator[None]:
    """Have a part on the device within the block; one that was elsewhere goes back, and leaves its room to the next."""
    tensor = next(chain(module.parameters(), module.buffers()), None) if module is not None else None
    if module is None or tensor is None or tensor.device == device:
        yield
        return
    home = tensor.device
    try:
        module.to(device)
        yield
    finally:
        module.to(home)
