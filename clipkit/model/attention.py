"""The Transformers of open_clip with less work and the same results, on open_clip's own parameters.

Attention is one call of torch's kernel: nn.MultiheadAttention transposes its input twice and hands the causal mask over as a
tensor, which keeps GPUs from their fastest kernel. Where only the class token is used of the last block's output, that block
computes only the class token. Names and weights stay; blocks of other kinds are left as they are.
"""

from typing import Any

import torch.nn.functional as F
from open_clip.transformer import ResidualAttentionBlock, VisionTransformer
from torch import Tensor, nn
from torch.nn.utils import parametrize


class FusedSelfAttention(nn.MultiheadAttention):
    """What a block's nn.MultiheadAttention becomes. Only for open_clip's calls: self-attention, no weights wanted."""

    is_causal = False

    def forward(self, query: Tensor, key: Tensor, value: Tensor, need_weights: bool = False,  # pyright: ignore
                attn_mask: Tensor | None = None) -> tuple[Tensor, None]:
        """Attend: (B, L, F) -> (B, L, F). The mask is the causal one where `is_causal` is set, and is not read then."""
        batch, length, width = query.shape
        together = F.linear(query, self.in_proj_weight, self.in_proj_bias)  # (B, L, 3F)
        query, key, value = together.view(batch, length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)  # (B, heads, L, F/heads)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=self.is_causal,
                                               attn_mask=None if self.is_causal else attn_mask)
        return self.out_proj(mixed.transpose(1, 2).reshape(batch, length, width)), None


class ClassTokenBlock(ResidualAttentionBlock):
    """What the last block of an image tower becomes where only the class token goes on: (B, L, F) -> (B, 1, F)."""

    def forward(self, q_x: Tensor, k_x: None = None, v_x: None = None, attn_mask: None = None) -> Tensor:  # pyright: ignore
        x = self.ln_1(q_x)  # (B, L, F)
        own = q_x[:, :1] + self.ls_1(attend_from(self.attn, x[:, 0], x)[:, None])  # (B, 1, F)
        return own + self.ls_2(self.mlp(self.ln_2(own)))


def attend_from(attention: Any, own: Tensor, x: Tensor) -> Tensor:
    """Attend from one token of each row to all of its tokens: (B, F), (B, L, F) -> (B, F)."""
    width = own.shape[-1]
    query = F.linear(own, attention.in_proj_weight[:width], attention.in_proj_bias[:width])  # (B, F)
    together = F.linear(x, attention.in_proj_weight[width:], attention.in_proj_bias[width:])  # (B, L, 2F)
    return attention.out_proj(mix_for(query, together, attention.num_heads))


def mix_for(query: Tensor, keys_and_values: Tensor, num_heads: int) -> Tensor:
    """What one query of each row sees: (B, F), (B, L, 2F) -> (B, F)."""
    batch, length, _ = keys_and_values.shape
    key, value = keys_and_values.view(batch, length, 2, num_heads, -1).permute(2, 0, 3, 1, 4)  # (B, heads, L, F/heads)
    mixed = F.scaled_dot_product_attention(query.view(batch, num_heads, 1, -1), key, value)  # (B, heads, 1, F/heads)
    return mixed.reshape(batch, -1)


def is_plain_block(block: nn.Module) -> bool:
    """True for open_clip's standard block with torch's own self-attention (fused or not)."""
    if type(block) is not ResidualAttentionBlock:
        return False
    attention: Any = block.attn
    return (parametrize.type_before_parametrizations(attention) in (nn.MultiheadAttention, FusedSelfAttention)
            and attention.batch_first and not attention.dropout and attention.bias_k is None and not hasattr(block, "ln_1_kv"))


def fuse_attention(towers: Any, *, causal_text: bool) -> int:
    """Let the blocks of open_clip's own Transformers attend in one call, and drop what nothing reads.

    Args:
      towers: An open_clip model; other towers' attention is left as it is. Of an image tower of which only the class token is
        pooled, the other tokens' outputs are no longer computed.
      causal_text: The text tower's mask is the causal one (`can_trim`).

    Returns:
      The number of blocks that are fused.
    """
    plain = {name: block for name, block in towers.named_modules()
             if is_plain_block(block) and not parametrize.is_parametrized(block.attn)}  # whose class is torch's own
    for name, block in plain.items():
        attention: Any = block.attn
        attention.__class__ = FusedSelfAttention
        attention.is_causal = causal_text and name.startswith("transformer.")  # where open_clip's CLIP has its text tower
    visual = towers.visual
    if (type(visual) is VisionTransformer and visual.pool_type == "tok" and visual.attn_pool is None
            and not visual.output_tokens and is_plain_block(visual.transformer.resblocks[-1])):
        visual.transformer.resblocks[-1].__class__ = ClassTokenBlock
    return len(plain)


def unfuse_attention(towers: Any) -> None:
    """Undo `fuse_attention`."""
    for module in towers.modules():
        if type(module) is FusedSelfAttention:
            del module.is_causal
            module.__class__ = nn.MultiheadAttention  # pyright: ignore[reportAttributeAccessIssue]
        elif type(module) is ClassTokenBlock:
            module.__class__ = ResidualAttentionBlock  # pyright: ignore[reportAttributeAccessIssue]
