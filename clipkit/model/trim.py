"""Text towers without the padding: the same features from shorter rows.

In a causal tower that pools at the end of text, nothing after the end of text reaches the features. Leaving it out is
therefore exact (but for the order of sums), and needs no other order of the data. On a CPU the captions are laid end to end
(packed_text.py); elsewhere, and for blocks unknown there, a batch is sorted by length and run in a few groups, each cut to
its own longest caption. Where many texts are encoded at once, all of one length share a batch.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

ROWS_PER_GROUP = 32  # on a CPU; smaller groups trim more, but their products are too small to be fast
GROUPS = 8  # on an accelerator, which wants few large products: 3.1 times fewer tokens at B = 4096 and 15 tokens a caption
LENGTH_STEP = 4  # on a CPU lengths are rounded up to this, so that few shapes occur
ACCELERATOR_LENGTH_STEP = 8  # at most ten shapes of 77 tokens to compile or to plan for
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
      tokens: (B, L) on the CPU, wherever the towers are: reading the lengths would make an accelerator wait.
    """
    from clipkit.model.packed_text import can_pack, encode_packed

    if towers.logit_scale.device.type != "cpu":
        return encode_in_groups(towers, tokens, rows=-(-len(tokens) // GROUPS), length_step=ACCELERATOR_LENGTH_STEP)
    if can_pack(towers):
        return encode_packed(towers, tokens)
    return encode_in_groups(towers, tokens, rows=ROWS_PER_GROUP, length_step=LENGTH_STEP)


def encode_in_groups(towers: Any, tokens: Tensor, *, rows: int, length_step: int) -> Tensor:
    """Embed token ids (B, L), sorted by length and cut to the longest of each group. (B, D), in the batch's own order.

    The number of groups follows from B alone, so that all processes of a run make as many.

    Args:
      towers, tokens: As of `encode_trimmed`.
      rows: Of a group.
      length_step: Lengths are rounded up to a multiple of it.
    """
    device = towers.logit_scale.device
    lengths = tokens.argmax(dim=-1) + 1  # (B,)
    order = lengths.argsort(stable=True)  # (B,)
    longest = [int(group[-1]) for group in lengths[order].split(rows)]
    groups = tokens[order].to(device, non_blocking=True).split(rows)  # each (rows, L)
    features = [_encode_cut(towers, group, -(-length // length_step) * length_step)
                for group, length in zip(groups, longest, strict=True)]  # each (rows, D)
    return torch.cat(features)[order.argsort().to(device, non_blocking=True)]  # (B, D)


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
    from clipkit.model.packed_text import can_pack, encode_packed

    packs = device.type == "cpu" and can_pack(towers)
    lengths = tokens.argmax(dim=-1) + 1  # (T,)
    order = lengths.argsort(stable=True)  # (T,)
    present, counts = lengths.unique(return_counts=True)  # (number of lengths,), rising
    for length, rows in zip(present.tolist(), order.split(counts.tolist()), strict=True):
        rows_at_once = max(1, batch_size * tokens.shape[1] // length)
        for part in rows.split(min(rows_at_once, CPU_ROWS) if device.type == "cpu" else rows_at_once):
            if packs:
                yield part, encode_packed(towers, tokens[part])
                continue
            cut = tokens[part, :length].to(device, non_blocking=True)  # (b, length)
            yield part, type(towers).encode_text(_Cut(towers, length), cut)


def _encode_cut(towers: Any, tokens: Tensor, length: int) -> Tensor:
    length = min(tokens.shape[1], length)
    return type(towers).encode_text(_Cut(towers, length), tokens[:, :length])


class _Cut:
    """Stands in for a CLIP inside its own encode_text: positions and mask are cut to a length, all else is the model's."""

    def __init__(self, towers: Any, length: int) -> None:
        self.towers = towers
        self.positional_embedding = towers.positional_embedding[:length]
        self.attn_mask = towers.attn_mask[:length, :length]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.towers, name)
