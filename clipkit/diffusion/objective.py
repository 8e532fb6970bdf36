"""The training objective of the U-Net: noise a latent, ask for the target, weigh the error. A few lines over process.py."""

from typing import NamedTuple

from torch import Tensor

from clipkit.config.diffusion.train import ProcessConfig
from clipkit.diffusion.draws import Draws
from clipkit.diffusion.noise_schedule import Schedule
from clipkit.diffusion.process import TARGETS, WEIGHTS, prediction_loss, q_sample
from clipkit.diffusion.unet import Denoise


class Latents(NamedTuple):
    """Of pictures: the distribution that the autoencoder gives, (B, C, h, w) each. Pixels have the standard deviation 0."""

    mean: Tensor
    std: Tensor


def diffusion_loss(denoise: Denoise, latents: Latents, condition: Tensor, draws: Draws, schedule: Schedule, *, scale: float,
                   process: ProcessConfig) -> Tensor:
    """Weighted squared error of what the network says of noisy latents.

    Args:
      denoise: the U-Net, wrapped or not.
      latents: of the pictures, unscaled.
      condition: (B, L, D) or (B, M, h, w), with those left out already replaced.
      draws: of this step.
      schedule: on the device.
      scale: that gives latents the standard deviation 1.
      process: prediction and weight are read.

    Returns:
      Scalar, mean over samples and their values.
    """
    levels = schedule.at(draws.level)
    x0 = (latents.mean + latents.std * draws.latent) * scale  # (B, C, h, w)
    x_t = q_sample(x0, draws.noise, levels)  # (B, C, h, w)
    output = denoise(x_t, schedule.timesteps[draws.level], condition)  # (B, C, h, w)
    target = TARGETS[process.prediction](x0, draws.noise, levels)
    return prediction_loss(output, target, WEIGHTS[process.weight](levels, process.prediction))
