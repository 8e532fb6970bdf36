"""Draw the forward and the reverse process of a trained diffusion model, for docs/diffusion.md.

    python scripts/draw_processes.py runs/emoji_diffusion docs/images

diffusion_forward.png: training pictures under more and more noise, decoded from their latents. diffusion_reverse.png: from
noise to a picture, what the latent holds at some steps above, what the network expects the picture to be below. About a minute.
"""

import sys
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from clipkit.data.emoji import emoji_shards
from clipkit.data.tars import RawSample, read_shard
from clipkit.diffusion.autoencoder import to_pixel_values
from clipkit.diffusion.generate import decode
from clipkit.diffusion.noise_schedule import Levels, trailing_indices
from clipkit.diffusion.pipeline_folder import Pipeline, load_pipeline
from clipkit.diffusion.process import estimate, q_sample
from clipkit.diffusion.sampling import ddim_step, guided
from clipkit.diffusion.sheets import to_pictures

LEVELS = (0, 100, 250, 400, 600, 800, 999)  # of 1,000 timesteps
PROMPTS = ("red heart", "grinning face", "red apple, noto style")
STEPS, SHOWN = 25, (0, 4, 8, 12, 16, 20, 24)
CELL, MARGIN, LABEL = 96, 6, 90  # pixels


def draw_rows(rows: list[tuple[str, Tensor]], titles: list[str], path: Path) -> None:
    """Draw rows of pictures (N, 3, H, W) in [0, 1], with a word before each row and one above each column."""
    width, height = LABEL + len(titles) * (CELL + MARGIN), 24 + len(rows) * (CELL + MARGIN)
    sheet = Image.new("RGB", (width, height), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for column, title in enumerate(titles):
        draw.text((LABEL + column * (CELL + MARGIN), 5), title, "#1a1a1a", font)
    for row, (word, images) in enumerate(rows):
        top = 24 + row * (CELL + MARGIN)
        draw.text((4, top + CELL // 2 - 8), word, "#1a1a1a", font)
        for column, picture in enumerate(to_pictures(images)):
            sheet.paste(picture.resize((CELL, CELL), Image.Resampling.NEAREST), (LABEL + column * (CELL + MARGIN), top))
    sheet.save(path)


def shown(pipeline: Pipeline, latents: Tensor) -> Tensor:
    return (decode(pipeline, latents) / 2 + 0.5).clamp(0, 1)


def forward_rows(pipeline: Pipeline) -> list[tuple[str, Tensor]]:
    """Three training pictures at each of LEVELS, always with the same noise."""
    from clipkit.data.decode import decode_image

    raws = [raw for raw in read_shard(emoji_shards("train")[0]) if isinstance(raw, RawSample)][:3]
    assert pipeline.autoencoder is not None
    rows = []
    for number, raw in enumerate(raws):
        assert raw.image is not None
        image = torch.from_numpy(decode_image(raw.image, max_pixels=10**6)).permute(2, 0, 1)[None]  # (1, 3, H, W)
        latent = pipeline.autoencoder.encode(to_pixel_values(image)).latent_dist.mean  # pyright: ignore
        latent = latent * pipeline.autoencoder.config.scaling_factor  # pyright: ignore -- (1, C, h, w)
        noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(number))
        noisy = [latent if level == 0 else q_sample(latent, noise, pipeline.schedule.at(level)) for level in LEVELS]
        rows.append((f"picture {number + 1}", shown(pipeline, torch.cat(noisy))))
    return rows


def reverse_rows(pipeline: Pipeline) -> list[tuple[str, Tensor]]:
    """For each of PROMPTS the latent and the expected picture at SHOWN steps of DDIM."""
    indices = trailing_indices(STEPS, len(pipeline.schedule.timesteps)).tolist()
    clean = Levels(torch.tensor(1.0), torch.tensor(0.0))
    levels = [*map(pipeline.schedule.at, indices), clean]
    rows = []
    for number, prompt in enumerate(PROMPTS):
        denoiser = guided(pipeline.denoise, pipeline.conditioning.from_texts([prompt]),  # pyright: ignore
                          pipeline.conditioning.empty[None], guidance_scale=3.0)
        x_t = torch.randn(1, *pipeline.latent_shape, generator=torch.Generator().manual_seed(number))
        held, expected = [], []
        for step, index in enumerate(indices):
            now = estimate(denoiser(x_t, pipeline.schedule.timesteps[index]), x_t, levels[step],
                           prediction=pipeline.process.prediction)
            held.append(x_t)
            expected.append(now.x0)
            x_t = ddim_step(now, levels[step + 1])
        rows += [(prompt.partition(",")[0], shown(pipeline, torch.cat([held[step] for step in SHOWN]))),
                 ("expected", shown(pipeline, torch.cat([expected[step] for step in SHOWN])))]
    return rows


@torch.no_grad()
def main(run: str, folder: str) -> None:
    pipeline, out = load_pipeline(run), Path(folder)
    draw_rows(forward_rows(pipeline), [f"t = {level}" for level in LEVELS], out / "diffusion_forward.png")
    draw_rows(reverse_rows(pipeline), [f"step {step + 1}" for step in SHOWN], out / "diffusion_reverse.png")
    print(f"written   {out / 'diffusion_forward.png'}, {out / 'diffusion_reverse.png'}")


if __name__ == "__main__":
    main(*sys.argv[1:3])
