"""Pictures from conditions: the reverse process in latents, decoded. One seed a picture, whatever shares its batch."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from clipkit.diffusion.noise_schedule import Schedule
from clipkit.diffusion.pipeline_folder import Pipeline
from clipkit.diffusion.reuse import reuse
from clipkit.diffusion.sampling import guided, sample, seeded_noise


class Sampling(NamedTuple):
    """How to walk from noise to pictures."""

    sampler: str = "ddim"  # one of sampling.SAMPLERS
    steps: int = 50  # evaluations of the U-Net
    guidance_scale: float = 3.0
    guidance_rescale: float = 0.0


@torch.no_grad()
def generate(pipeline: Pipeline, condition: Tensor, seeds: Sequence[int], how: Sampling) -> Tensor:
    """Make a batch of pictures.

    Args:
      pipeline: On its device.
      condition: (B, L, D) or (B, M, h, w), as `pipeline.conditioning` gives it.
      seeds: B, one a picture: its noise is torch.Generator().manual_seed(seed)'s, as diffusers draws it from a generator.
      how: the walk.

    Returns:
      (B, 3, H, W) in [0, 1], fp32, on the pipeline's device.

    Raises:
      ValueError: the sampler, the steps or the number of seeds do not fit.
    """
    return (decode(pipeline, walk(pipeline, condition, seeds, how)) / 2 + 0.5).clamp(0, 1)


@torch.no_grad()
def walk(pipeline: Pipeline, condition: Tensor, seeds: Sequence[int], how: Sampling) -> Tensor:
    """From noise to latents (B, C, h, w) of variance 1; arguments as in `generate`. The U-Net alone has to be on the device."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    like = torch.empty(len(condition), *pipeline.latent_shape, device=condition.device)
    empty: Tensor = pipeline.conditioning.empty  # pyright: ignore[reportAssignmentType]  # (L, D) or (M, h, w)
    denoiser = guided(pipeline.denoise, condition, empty[None].to(condition.device), guidance_scale=how.guidance_scale,
                      guidance_rescale=how.guidance_rescale)
    schedule = pipeline.schedule
    if how.sampler == "dpmpp_2m" and pipeline.process.schedule == "flow":
        schedule = solver_levels(how.steps, pipeline.process.num_timesteps)
    with reuse(pipeline.denoise.unet, guided=how.guidance_scale != 1):
        return sample(denoiser, seeded_noise(like, generators), schedule.to(condition.device), sampler=how.sampler,
                      prediction=pipeline.process.prediction, num_steps=how.steps, generators=generators)


def solver_levels(num_steps: int, num_timesteps: int) -> Schedule:
    """Levels of the straight path that diffusers' DPM-Solver visits, so that its pipeline makes the same pictures.

    They are evenly spaced up to 1 - 1 / num_timesteps of noise; the network is told their timesteps, rounded down.
    """
    sigma = 1 - np.linspace(1, 1 / num_timesteps, num_steps + 1)[1:]  # (num_steps,); numpy's, as there, to be rounded alike
    timesteps = (sigma * num_timesteps).astype(np.int64)
    return Schedule(torch.from_numpy(timesteps), torch.from_numpy(1 - sigma), torch.from_numpy(sigma))


def decode(pipeline: Pipeline, latents: Tensor) -> Tensor:
    """Latents (B, C, h, w) of variance 1 to pictures (B, 3, H, W) around [-1, 1]; pixels stay as they are."""
    if pipeline.autoencoder is None:
        return latents
    scale: float = pipeline.autoencoder.config.scaling_factor  # pyright: ignore[reportAttributeAccessIssue]
    return pipeline.autoencoder.decode(latents / scale).sample.float()  # pyright: ignore
