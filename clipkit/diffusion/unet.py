"""The network that says of a noisy latent what the process asks: diffusers' U-Net, with a context, or a map beside it."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from clipkit.diffusion.conditioning import Conditioning, MapConditioning


class Denoise(nn.Module):
    """The U-Net as the process calls it, whatever conditions it; one module, as DistributedDataParallel and compile need it."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet
        self.attends = hasattr(unet.config, "cross_attention_dim")

    def forward(self, x_t: Tensor, timesteps: Tensor, condition: Tensor) -> Tensor:
        """Say of x_t what the network was trained to predict.

        Args:
          x_t: (B, C, h, w).
          timesteps: (B,) or a scalar.
          condition: (B, L, D), attended to, or (B, M, h, w), put beside x_t.

        Returns:
          (B, C, h, w).
        """
        if self.attends:
            return self.unet(x_t, timesteps, encoder_hidden_states=condition).sample
        return self.unet(torch.cat([x_t, condition], dim=1), timesteps).sample


def make_unet(config: Mapping[str, Any], *, side: int, channels: int, conditioning: Conditioning) -> nn.Module:
    """Build a U-Net with random weights.

    Args:
      config: arguments of diffusers' UNet2DConditionModel (of UNet2DModel under a map), without those that follow.
      side: cells a side of the latent.
      channels: of the latent.
      conditioning: its width is the context's, or is added to the channels that come in.

    Raises:
      ValueError: the U-Net has no such argument, the values do not fit each other, or the side cannot be halved so often.
    """
    from diffusers.models.unets.unet_2d import UNet2DModel
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    by_map = isinstance(conditioning, MapConditioning)
    kind: Any = UNet2DModel if by_map else UNet2DConditionModel
    own = {"sample_size", "in_channels", "out_channels", "cross_attention_dim"}
    known = sorted(set(inspect.signature(kind.__init__).parameters) - own - {"self"})
    for name in config:
        if name not in known:
            raise ValueError(f"model.config has {name!r}, which diffusers' {kind.__name__} does not know, or which follows "
                             f"from the autoencoder and the conditioning; choose from {', '.join(known)}")
    halvings = len(config.get("block_out_channels", (0, 0, 0, 0))) - 1
    if side % 2**halvings:
        cells = 2**halvings
        nearest = f"{side // cells * cells} and {-(-side // cells) * cells}" if side > cells else str(cells)
        raise ValueError(f"the latents have {side} cells a side, and a U-Net of {halvings + 1} levels halves them {halvings} "
                         f"times; the nearest sides that it can halve are {nearest}: change model.image_size or "
                         "model.config.block_out_channels")
    shape = {"in_channels": channels + conditioning.width} if by_map else {"in_channels": channels,
                                                                          "cross_attention_dim": conditioning.width}
    try:
        return kind(**config, **shape, out_channels=channels, sample_size=side)
    except (TypeError, ValueError) as error:
        raise ValueError(f"model.config does not make a U-Net ({' '.join(str(error).split())}); change its values") from error
