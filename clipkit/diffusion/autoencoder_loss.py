"""What an autoencoder is trained on: pixels, features, the size of its latents, and a discriminator's opinion."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipkit.diffusion.discriminator import generator_loss
from clipkit.training.distributed import mean_over_processes

MAX_ADAPTIVE_WEIGHT = 1e4  # as in the first latent diffusion models (Rombach et al. 2022)


class AutoencoderLoss(NamedTuple):
    """The loss and its terms before they are weighted: scalars, fp32."""

    loss: Tensor  # what is minimised
    pixels: Tensor  # mean absolute error of a pixel value; pixel values are in [-1, 1]
    perceptual: Tensor  # mean distance of a picture
    kl: Tensor  # nats for each pixel value
    adversarial: Tensor  # minus the discriminator's mean logit
    adaptive_weight: Tensor


def autoencoder_loss(images: Tensor, reconstruction: Tensor, mean: Tensor, logvar: Tensor, *,
                     perceptual: nn.Module | None = None, perceptual_weight: float = 1.0, kl_weight: float = 1e-6,
                     discriminator: nn.Module | None = None, discriminator_weight: float = 0.5,
                     last_layer: Tensor | None = None) -> AutoencoderLoss:
    """Weigh up what a reconstruction lost.

    All terms are means over pictures and over pixel values, so that no weight changes its meaning with the batch, the
    picture's size or the latent's. They are those of Rombach et al. 2022, whose losses are sums over both, divided by
    one number.

    Args:
      images: (B, 3, H, W) in [-1, 1].
      reconstruction: (B, 3, H, W).
      mean: (B, C, h, w), of the latents' distribution.
      logvar: (B, C, h, w), logarithm of its variance.
      perceptual: as `make_perceptual` returns it.
      perceptual_weight: of the perceptual distance.
      kl_weight: of the nats for each pixel value.
      discriminator: None before its time has come: a delayed start is a discriminator that is not given yet.
      discriminator_weight: of its opinion, which is first brought to the strength of the other terms (`adaptive_weight`).
      last_layer: the decoder's last weight; needed with a discriminator.

    Source: Rombach et al. 2022, appendix G (arXiv:2112.10752); Esser et al. 2021, section 3.1 (arXiv:2012.09841).
    """
    nothing = torch.zeros((), device=images.device)
    pixels = F.l1_loss(reconstruction.float(), images.float())
    distance = perceptual(images, reconstruction) if perceptual is not None else nothing
    kl = kl_per_pixel_value(mean, logvar, images)
    reconstructed = pixels + perceptual_weight * distance
    loss = reconstructed + kl_weight * kl
    adversarial = weight = nothing
    if discriminator is not None:
        assert last_layer is not None, "the adaptive weight needs the decoder's last layer"
        adversarial = generator_loss(discriminator, reconstruction)
        weight = adaptive_weight(reconstructed, adversarial, last_layer)
        loss = loss + discriminator_weight * weight * adversarial
    return AutoencoderLoss(loss, *(term.detach() for term in (pixels, distance, kl, adversarial, weight)))


def kl_per_pixel_value(mean: Tensor, logvar: Tensor, images: Tensor) -> Tensor:
    """Divergence of the latents from N(0, 1) in nats, divided by the number of pixel values that they stand for.

    Divided by the number of latents instead, the same weight would press harder the more a latent stands for.

    Args:
      mean: (B, C, h, w).
      logvar: (B, C, h, w).
      images: (B, 3, H, W); only its size is read.

    Source: Kingma and Welling 2014, appendix B (arXiv:1312.6114).
    """
    mean, logvar = mean.float(), logvar.float()
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum() / images.numel()


def adaptive_weight(reconstruction_loss: Tensor, adversarial_loss: Tensor, last_layer: Tensor) -> Tensor:
    """Ask how much stronger the reconstruction pulls at the decoder's last layer than the discriminator does.

    The gradients are those of the batch of all processes.

    Args:
      reconstruction_loss: scalar, mean over this process's batch.
      adversarial_loss: scalar, likewise.
      last_layer: weight of the decoder's last layer, of any shape.

    Returns:
      Scalar in [0, MAX_ADAPTIVE_WEIGHT], fp32, without a gradient; 0 where the ratio is no number.

    Source: Esser et al. 2021, equation 7 (arXiv:2012.09841).
    """
    pulls = []
    for loss in (reconstruction_loss, adversarial_loss):
        gradient = torch.autograd.grad(loss, last_layer, retain_graph=True)[0].float()
        pulls.append(mean_over_processes(gradient).norm())
    ratio = pulls[0] / (pulls[1] + 1e-4)  # the paper's 1e-6 lets a discriminator that says nothing shout
    return ratio.clamp(max=MAX_ADAPTIVE_WEIGHT).nan_to_num(nan=0.0).detach()
