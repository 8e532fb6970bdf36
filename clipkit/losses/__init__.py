"""The objectives, as functions of features and scale; they never see a model.

`LOSSES` are the ones to read; `make_loss` gives what training runs: the same mathematics in tiles.
"""

from collections.abc import Callable
from functools import partial

from torch import Tensor

from clipkit.losses.blockwise import blockwise_clip_loss, blockwise_siglip_loss
from clipkit.losses.clip import clip_loss, in_batch_accuracy
from clipkit.losses.distill import distill_loss
from clipkit.losses.siglip import siglip_loss

LOSSES = {"clip": clip_loss, "siglip": siglip_loss}
BLOCKWISE_LOSSES = {"clip": blockwise_clip_loss, "siglip": blockwise_siglip_loss}

__all__ = ["BLOCKWISE_LOSSES", "LOSSES", "blockwise_clip_loss", "blockwise_siglip_loss", "clip_loss", "distill_loss",
           "in_batch_accuracy", "make_loss", "siglip_loss"]


def make_loss(name: str, *, block_size: int | None, bf16: bool) -> Callable[..., Tensor]:
    """Choose a loss and how it is computed.

    Args:
      name: A key of `LOSSES`.
      block_size: Rows of the logits at once; None = by size; 0 = the whole matrix, by the function of `LOSSES`.
      bf16: Inexact: products of bfloat16 factors; not with block_size 0.

    Returns:
      A function of (image_features, text_features, logit_scale, logit_bias=None, *, group_ids=None), as in `LOSSES`.
    """
    if block_size == 0:
        assert not bf16, "LossConfig refuses bf16 with block_size 0"
        return LOSSES[name]
    return partial(BLOCKWISE_LOSSES[name], block_size=block_size, bf16=bf16)
