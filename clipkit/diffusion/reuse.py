"""What does not change over the steps of a walk, or between the halves of guidance, is computed once. Exact."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class Kept(nn.Module):
    """A projection of the context: told once, given again as long as the context is the same tensor."""

    def __init__(self, project: nn.Module) -> None:
        super().__init__()
        self.project = project
        self.context: Tensor | None = None
        self.projected: Tensor | None = None

    def forward(self, context: Tensor) -> Tensor:
        """(B, L, D) to (B, L, heads * head width)."""
        if context is not self.context:
            self.context, self.projected = context, self.project(context)
        assert self.projected is not None
        return self.projected


@contextmanager
def reuse(unet: nn.Module, *, guided: bool) -> Iterator[None]:
    """Sample inside of this with less work; afterwards the U-Net is as before.

    The keys and values of the context are the same at every step. With guidance, both halves of a batch hold the same latents,
    so what lies before the first look at the context is the same in both.

    Args:
      unet: diffusers' UNet2DConditionModel; of another network nothing is reused.
      guided: batches are [x_t, x_t], as `sampling.guided` makes them.
    """
    if not hasattr(unet.config, "cross_attention_dim"):
        yield
        return
    attentions: list[Any] = [module for name, module in unet.named_modules() if name.endswith(".attn2")]
    hooks = share_halves(unet) if guided else []
    for attention in attentions:
        attention.to_k, attention.to_v = Kept(attention.to_k), Kept(attention.to_v)
    try:
        yield
    finally:
        for attention in attentions:
            attention.to_k, attention.to_v = attention.to_k.project, attention.to_v.project
        for hook in hooks:
            hook.remove()


def share_halves(unet: Any) -> list[Any]:
    """Let the layers before the first look at the context see one half of the batch; both halves get what comes out."""
    if any(unet.config.get(name) for name in ("addition_embed_type", "class_embed_type", "num_class_embeds")):
        return []  # the embedding of the time is not the same in both halves
    shared = [unet.conv_in]
    for level in unet.down_blocks:
        if getattr(level, "has_cross_attention", False):
            shared += level.resnets[:1]
            break
        shared.append(level)
    return [hook for layer in shared for hook in (layer.register_forward_pre_hook(_halve, with_kwargs=True),
                                                  layer.register_forward_hook(_double))]


def _halve(layer: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return tuple(map(_first_half, arguments)), {name: _first_half(value) for name, value in named.items()}


def _double(layer: nn.Module, arguments: tuple[Any, ...], output: Any) -> Any:
    if isinstance(output, Tensor):
        return torch.cat([output, output])
    return tuple(_double(layer, arguments, one) for one in output)


def _first_half(value: Any) -> Any:
    return value[:len(value) // 2] if isinstance(value, Tensor) else value
