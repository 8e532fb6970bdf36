"""What chance gives to each row of a training step: the same for a row, however many processes share the batch."""

import random
from typing import NamedTuple

import torch
from torch import Tensor


class Draws(NamedTuple):
    """Of one process's rows. Legend: B rows, C h w of a latent."""

    latent: Tensor  # (B, C, h, w) standard normal, for the draw from a latent's distribution
    noise: Tensor  # (B, C, h, w) standard normal, of the forward process
    level: Tensor  # (B,) int64, index into the noise schedule
    dropped: Tensor  # (B,) bool: trained without its condition


def draw_rows(shape: tuple[int, ...], *, num_levels: int, drop: float, seed: int, step: int, rank: int = 0,
              world_size: int = 1) -> Draws:
    """Draw for a step of training.

    The levels of a batch are spread evenly from one random start, so that every step sees all of them.

    Args:
      shape: (B, C, h, w), of this process.
      num_levels: of the noise schedule.
      drop: probability of a row without its condition.
      seed: of the run.
      step: optimizer steps done.
      rank, world_size: of this process.

    Source: of the even spread Kingma et al. 2021, appendix I.1 (arXiv:2107.00630).
    """
    rows, *rest = shape
    start = random.Random(f"{seed}/levels/{step}").random()
    level = [int((start + row / (rows * world_size)) % 1 * num_levels) for row in range(rank * rows, (rank + 1) * rows)]
    generators = row_generators(rows, purpose="diffusion", seed=seed, step=step, rank=rank)
    drawn = [(torch.randn(rest, generator=g), torch.randn(rest, generator=g), torch.rand((), generator=g)) for g in generators]
    latent, noise, chance = map(torch.stack, zip(*drawn, strict=True))
    return Draws(latent, noise, torch.tensor(level), chance < drop)


def latent_noise(shape: tuple[int, ...], *, seed: int, step: int, rank: int = 0) -> Tensor:
    """Draw (B, C, h, w) standard normal, fp32, on the CPU, for a step of the autoencoder; arguments as in `draw_rows`."""
    rows, *rest = shape
    generators = row_generators(rows, purpose="latents", seed=seed, step=step, rank=rank)
    return torch.stack([torch.randn(rest, generator=generator) for generator in generators])


def row_generators(rows: int, *, purpose: str, seed: int, step: int, rank: int) -> list[torch.Generator]:
    """One generator a row of the global batch, of those of this process."""
    seeds = [random.Random(f"{seed}/{purpose}/{step}/{row}").getrandbits(63) for row in range(rank * rows, (rank + 1) * rows)]
    return [torch.Generator().manual_seed(row_seed) for row_seed in seeds]
