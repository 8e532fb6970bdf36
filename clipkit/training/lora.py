"""Low-rank adaptation: the matrices of the towers' blocks stay as they are, and learn a narrow update.

A parametrization computes W + scale * B @ A wherever a matrix is read, so every path sees the merged one, also those that take
`in_proj_weight` of an attention. Source: Hu et al. 2021 (arXiv:2106.09685).
"""

import math
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

ADAPTED = "parametrizations."  # as torch names what stands in a parametrized matrix's place
DEFAULT_SCALE = 2.0  # alpha / rank: 16 / 8 in the authors' RoBERTa scripts (github.com/microsoft/LoRA, examples/NLU)


class LowRankUpdate(nn.Module):
    """W -> W + scale * B @ A. B starts at zero: the matrix is at first W, bit for bit.

    Attributes:
      lora_A: (r, F), uniform to 1/sqrt(F), as a linear layer begins.
      lora_B: (O, r).
      scale: scalar, alpha / r; kept with the weights, so that a state dict says all that merging needs.
    """

    scale: Tensor

    def __init__(self, weight: Tensor, rank: int, scale: float, generator: torch.Generator) -> None:
        super().__init__()
        num_outputs, num_inputs = weight.shape
        bound = 1 / math.sqrt(num_inputs)
        drawn = torch.empty(rank, num_inputs).uniform_(-bound, bound, generator=generator)  # on the CPU: alike on all devices
        self.lora_A = nn.Parameter(drawn.to(weight))
        self.lora_B = nn.Parameter(weight.new_zeros(num_outputs, rank))
        self.register_buffer("scale", weight.new_full((), scale))

    def forward(self, weight: Tensor) -> Tensor:
        """Merge: (O, F) -> (O, F), in the weight's own precision."""
        kind = weight.device.type
        with torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext():
            return merge(weight, self.lora_A, self.lora_B, self.scale)


def merge(weight: Tensor, down: Tensor, up: Tensor, scale: Tensor) -> Tensor:
    """W + scale * B @ A, of W (O, F), A (r, F) and B (O, r): (O, F)."""
    return torch.addmm(weight, scale * up, down)


def merged_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Put plain matrices under their own names in the place of adapted ones: a state dict without LoRA passes as it is."""
    plain = {}
    for name, tensor in weights.items():
        if ADAPTED not in name:
            plain[name] = tensor
        elif name.endswith(".original"):
            update = name.removesuffix("original") + "0."
            parts = (weights[update + part] for part in ("lora_A", "lora_B", "scale"))
            plain[name.replace(ADAPTED, "").removesuffix(".original")] = merge(tensor, *parts)
    return plain


def add_lora(towers: Any, levels: Mapping[str, int], *, rank: int, alpha: float | None, seed: int) -> int:
    """Adapt the matrices of the blocks that are not locked; of all else only what stands at the top still learns.

    That is the projections, the temperature and the bias, where norms are frozen before.

    Args:
      towers: An open_clip model; what is locked no longer requires a gradient.
      levels: As `finetune.levels_below_top` gives them: 0 at the top.
      rank: r.
      alpha: The update is multiplied by alpha / r; None = 2 r.
      seed: Of the first values of A.

    Returns:
      The number of adapted matrices.

    Raises:
      ValueError: as `matrices_to_adapt`.
    """
    matrices = matrices_to_adapt(towers, levels, rank)
    for name, level in levels.items():
        if level > 0:
            towers.get_parameter(name).requires_grad_(False)
    scale = DEFAULT_SCALE if alpha is None else alpha / rank
    generator = torch.Generator().manual_seed(seed)
    for module, own in matrices.values():
        parametrize.register_parametrization(module, own, LowRankUpdate(getattr(module, own), rank, scale, generator))
    return len(matrices)


def matrices_to_adapt(towers: Any, levels: Mapping[str, int], rank: int) -> dict[str, tuple[nn.Module, str]]:
    """Find the matrices of the blocks that learn: {name: (module, the name there)}.

    Arguments as of `add_lora`.

    Raises:
      ValueError: there are none, a tower that learns has none, or one is narrower than the rank.
    """
    in_blocks = {name for name, level in levels.items() if level > 0 and towers.get_parameter(name).requires_grad}
    found = {name: place for name, place in linear_matrices(towers).items() if name in in_blocks}
    for tower, of_image in (("image", True), ("text", False)):
        learning = {name for name in in_blocks if name.startswith("visual.") == of_image}
        if learning and learning.isdisjoint(found):
            raise ValueError(f"model.lora_rank is {rank}, but the {tower} tower has no linear matrices in its blocks; give "
                             f"model.lock_{tower}=true, a Transformer, or model.lora_rank=null")
    if not found:
        raise ValueError(f"model.lora_rank is {rank}, but both towers are locked: no matrix is left to adapt; unlock one "
                         "(model.lock_image, model.lock_text), or give model.lora_rank=null")
    shapes = {name: tuple(towers.get_parameter(name).shape) for name in found}
    narrowest = min(shapes, key=lambda name: min(shapes[name]))
    if rank > min(shapes[narrowest]):
        raise ValueError(f"model.lora_rank is {rank}, above the smaller side of {narrowest} {shapes[narrowest]}; give at most "
                         f"{min(shapes[narrowest])}")
    return found


def linear_matrices(towers: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """The matrices of linear layers and of torch's attention: {name: (module, the name there)}."""
    found = {}
    for name, module in towers.named_modules():
        if isinstance(module, nn.Linear):
            found[f"{name}.weight"] = module, "weight"
        elif isinstance(module, nn.MultiheadAttention) and module._qkv_same_embed_dim:
            found[f"{name}.in_proj_weight"] = module, "in_proj_weight"
    return found
