"""The patch discriminator of the autoencoder and its hinge loss. Neither step leaves a gradient on the other's network."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MAX_LAYERS = 3  # sees patches of 70 pixels, the best of those that Isola et al. compared


class PatchDiscriminator(nn.Module):
    """Say of every patch of a picture whether it is real.

    Three strided layers from 64 px on, one less for each halving below, so that there are always several patches to judge.
    Groups of channels are normalised, not batches: what a picture gets does not depend on the others in its batch.

    Args:
      image_size: pixels a side, at least 16.
      channels: of the first layer; they double with each, up to eight times as many.

    Raises:
      ValueError: the pictures are smaller than 16 px.

    Source: Isola et al. 2017, section 3.2 and appendix 6.1 (arXiv:1611.07004).
    """

    def __init__(self, image_size: int, *, channels: int = 64) -> None:
        super().__init__()
        if image_size < 16:
            raise ValueError(f"the discriminator's image size is {image_size}; it judges patches of pictures of 16 px and more")
        num_strided = min(MAX_LAYERS, int(math.log2(image_size / 8)))
        widths = [channels * min(2**layer, 8) for layer in range(num_strided + 1)]
        layers: list[nn.Module] = [_conv(3, widths[0], stride=2), nn.LeakyReLU(0.2)]
        for layer in range(1, num_strided + 1):
            norm = nn.GroupNorm(math.gcd(32, widths[layer]), widths[layer])
            layers += [_conv(*widths[layer - 1:layer + 1], stride=2 if layer < num_strided else 1), norm, nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, _conv(widths[-1], 1, stride=1))

    def forward(self, images: Tensor) -> Tensor:
        """Judge pictures (B, 3, H, W) in [-1, 1]: logits (B, 1, h, w), above 0 = real."""
        return self.layers(images)


def discriminator_loss(discriminator: nn.Module, images: Tensor, reconstruction: Tensor) -> Tensor:
    """Hinge loss of the discriminator's step; the reconstruction is cut from the autoencoder's graph.

    Args:
      discriminator: may be wrapped for several processes.
      images: (B, 3, H, W) in [-1, 1].
      reconstruction: (B, 3, H, W).

    Source: Lim and Ye 2017 (arXiv:1705.02894).
    """
    real, fake = discriminator(images.detach()), discriminator(reconstruction.detach())  # (B, 1, h, w) each
    return (F.relu(1 - real.float()).mean() + F.relu(1 + fake.float()).mean()) / 2


def generator_loss(discriminator: nn.Module, reconstruction: Tensor) -> Tensor:
    """How little the discriminator believes reconstructions (B, 3, H, W); its weights are constants here.

    Args:
      discriminator: not wrapped (`.module` of a DistributedDataParallel).
      reconstruction: (B, 3, H, W).
    """
    constants = {name: value.detach() for name, value in discriminator.state_dict(keep_vars=True).items()}
    return -torch.func.functional_call(discriminator, constants, (reconstruction,)).float().mean()


def _conv(inputs: int, outputs: int, *, stride: int) -> nn.Conv2d:
    conv = nn.Conv2d(inputs, outputs, kernel_size=4, stride=stride, padding=1)
    nn.init.normal_(conv.weight, std=0.02)  # Isola et al. 2017, appendix 6.2
    return conv
