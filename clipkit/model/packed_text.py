"""open_clip's causal text tower over captions laid end to end: no padding at all, the same features.

All but the attention works on each token alone, so the tokens of a batch are one long matrix. Attention takes the captions of
each length together. Of the last block only the end of each text is computed: nothing else is pooled.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipkit.model.attention import is_plain_block, mix_for


def can_pack(towers: Any) -> bool:
    """True if `encode_packed` knows the text tower's blocks. Only for towers that `can_trim`."""
    return not towers.transformer.grad_checkpointing and all(map(is_plain_block, towers.transformer.resblocks))


def encode_packed(towers: Any, tokens: Tensor) -> Tensor:
    """Embed token ids (B, L) as `towers.encode_text` does. (B, D), not normalised. Legend: T tokens of all captions, F width.

    Args:
      towers: A model for which `can_trim` and `can_pack` are true.
      tokens: (B, L) on the CPU.
    """
    lengths = tokens.argmax(dim=-1) + 1  # (B,)
    order = lengths.argsort(stable=True)  # (B,), shortest first
    lengths, tokens = lengths[order], tokens[order]
    inside = torch.arange(tokens.shape[1]) < lengths[:, None]  # (B, L)
    positions = inside.nonzero()[:, 1]  # (T,)
    dtype = towers.transformer.get_cast_dtype()
    x = towers.token_embedding(tokens[inside]).to(dtype) + towers.positional_embedding[positions].to(dtype)  # (T, F)
    of_length = [tensor.tolist() for tensor in lengths.unique_consecutive(return_counts=True)]  # lengths, captions of each
    groups = list(zip(*of_length, strict=True))
    *blocks, last = towers.transformer.resblocks
    for block in blocks:
        x = x + block.ls_1(_attend(block.attn, block.ln_1(x), groups))
        x = x + block.ls_2(block.mlp(block.ln_2(x)))
    ends = lengths.cumsum(0) - 1  # (B,)
    own = _end_of_text(last, x, ends, groups)  # (B, F)
    own = towers.ln_final(own)
    if towers.text_projection is not None:
        linear = isinstance(towers.text_projection, nn.Linear)
        own = towers.text_projection(own) if linear else own @ towers.text_projection  # (B, D)
    return own[order.argsort()]


def _attend(attention: Any, x: Tensor, groups: list[tuple[int, int]]) -> Tensor:
    """Causal self-attention within each caption: (T, F) -> (T, F). `groups`: (length, captions) in their order in x."""
    together = F.linear(x, attention.in_proj_weight, attention.in_proj_bias)  # (T, 3F)
    parts = together.split([length * captions for length, captions in groups])
    mixed = []
    for (length, captions), rows in zip(groups, parts, strict=True):
        query, key, value = rows.view(captions, length, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(query, key, value, is_causal=True)  # (captions, heads, length, F/heads)
        mixed.append(seen.transpose(1, 2).reshape(captions * length, -1))
    return attention.out_proj(torch.cat(mixed))


def _end_of_text(block: Any, x: Tensor, ends: Tensor, groups: list[tuple[int, int]]) -> Tensor:
    """The last block's output at the end of each text: (T, F) -> (B, F)."""
    attention, width = block.attn, x.shape[-1]
    normed = block.ln_1(x)  # (T, F)
    queries = F.linear(normed[ends], attention.in_proj_weight[:width], attention.in_proj_bias[:width])  # (B, F)
    together = F.linear(normed, attention.in_proj_weight[width:], attention.in_proj_bias[width:])  # (T, 2F)
    parts = zip(groups, queries.split([captions for _, captions in groups]),
                together.split([length * captions for length, captions in groups]), strict=True)
    mixed = torch.cat([mix_for(query, rows.view(captions, length, -1), attention.num_heads)
                       for (length, captions), query, rows in parts])  # (B, F)
    own = x[ends] + block.ls_1(attention.out_proj(mixed))  # (B, F)
    return own + block.ls_2(block.mlp(block.ln_2(own)))
