"""Text towers without the padding: the same features from shorter rows.

In a causal tower that pools at the end of text, nothing after the end of text reaches the features. Sorting a batch by
length and running it in a few groups, each cut to its own longest caption, is therefore exact (but for the order of
sums), and needs no other order of the data. Where many texts are encoded at once, all of one length share a batch.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

ROWS_PER_GROUP = 32  # smaller groups trim more, but their products are too small to be fast
LENGTH_STEP = 4  # lengths are rounded up to this, so that few shapes occur
CPU_ROWS = 64  # at once on a CPU: measured, beyond it the activations leave the cache and a token costs more


def can_trim(towers: Any) -> bool:
    """True if the model is open_clip's CLIP with a causal text tower that pools at the end of text (the largest id)."""
    from open_clip.model import CLIP

    if type(towers) is not CLIP or towers.text_pool_type != "argmax" or towers.attn_mask is None:
        return False
    mask: Any = towers.attn_mask  # (L, L), added to the attention logits
    causal = torch.full_like(mask, -torch.inf).triu(1)
    return torch.equal(mask, causal)


def encode_trimmed(towers: Any, tokens: Tensor) -> Tensor:
    """Embed token ids (B, L) as `towers.encode_text` does, without the padding. (B, D), not normalised.

    Args:
      towers: A model for which `can_trim` is true.
      tokens: (B, L) on the CPU's side of things: reading the lengths would make an accelerator wait.
    """
    lengths = tokens.argmax(dim=-1) + 1  # (B,)
    order = lengths.argsort(stable=True)  # (B,)
    groups = order.split(ROWS_PER_GROUP)
    features = [_encode_cut(towers, tokens[rows], int(lengths[rows[-1]])) for rows in groups]  # each (rows, D)
    return torch.cat(features)[order.argsort()]  # (B, D), in the batch's own order


def encode_by_length(towers: Any, tokens: Tensor, *, batch_size: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Embed many texts in batches of equal length, none with padding. Exact as `encode_trimmed` is, on any device.

    The lengths are read before the transfer, so an accelerator never waits for them. A batch holds as many tokens as
    `batch_size` texts of full length.

    Args:
      towers: A model for which `can_trim` is true.
      tokens: (T, L) on the CPU. Rows of equal length are taken in the order in which they stand here.
      batch_size: Texts of full length that fit at once.
      device: Where the towers are.

    Yields:
      (rows (b,) of `tokens`, on the CPU; their features (b, D), not normalised, on the device), each row once.
    """
    lengths = tokens.argmax(dim=-1) + 1  # (T,)
    order = lengths.argsort(stable=True)  # (T,)
    present, counts = lengths.unique(return_counts=True)  # (number of lengths,), rising
    for length, rows in zip(present.tolist(), order.split(counts.tolist()), strict=True):
        rows_at_once = max(1, batch_size * tokens.shape[1] // length)
        for part in rows.split(min(rows_at_once, CPU_ROWS) if device.type == "cpu" else rows_at_once):
            cut = tokens[part, :length].to(device, non_blocking=True)  # (b, length)
            yield part, type(towers).encode_text(_Cut(towers, length), cut)


def _encode_cut(towers: Any, tokens: Tensor, longest: int) -> Tensor:
    length = min(tokens.shape[1], -(-longest // LENGTH_STEP) * LENGTH_STEP)
    return type(towers).encode_text(_Cut(towers, length), tokens[:, :length])


class _Cut:
    """Stands in for a CLIP inside its own encode_text: positions and mask are cut to a length, all else is the model's."""

    def __init__(self, towers: Any, length: int) -> None:
        self.towers = towers
        self.positional_embedding = towers.positional_embedding[:length]
        self.attn_mask = towers.attn_mask[:length, :length]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.towers, name)
