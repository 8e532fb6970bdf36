"""Fine-tuning: where it starts, how fast each layer learns, norms that stay, and the pull back to the start."""

import json
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clipkit.config.optim import ContrastiveOptimConfig
from clipkit.data.hub import MODEL_PREFIX
from clipkit.model.folder import load_model
from clipkit.model.image_text import ImageTextModel
from clipkit.training.atomic_files import write_text_atomically
from clipkit.training.optim import make_optimizer
from clipkit.training.sharding import own_part

NORMS = (nn.LayerNorm, nn.modules.batchnorm._BatchNorm)
# Inside a tower, as open_clip and transformers name what stands below the first block, and the blocks.
BELOW_BLOCKS = re.compile(r"(class_embedding|positional_embedding|conv\d|bn\d|ln_pre|patchnorm|token_embedding|cls_emb|"
                          r"transformer\.(encoder\.)?(embeddings|embed_tokens|shared)\b)")
LAST_NORM = re.compile(r"(visual\.|text\.)?(ln_post|ln_final)\.")  # behind the top block, and of its layer
BLOCK = re.compile(r"(?:transformer\.)?(?:encoder\.)?(?:resblocks|layers?|block)\.?(\d+)\.")


def load_start(start: str, pretrained: str | None, *, loss: str) -> ImageTextModel:
    """Load the model that fine-tuning starts from, with its tokenizer and preprocessing.

    Args:
      start: As `source` of `load_model`.
      pretrained: open_clip tag or weights file, with an open_clip name.
      loss: "clip" or "siglip".

    Raises:
      FileNotFoundError: there is no such model.
      ValueError: the start has no weights, or lacks what the loss needs.
    """
    is_name = os.sep not in start and not start.startswith(MODEL_PREFIX) and not Path(start).is_dir()
    if is_name and pretrained is None:
        raise ValueError(f"model.start is {start!r}, which is no folder, and an open_clip name alone has no weights; give a "
                         "run, a model folder, or model.pretrained=<tag or weights file> with the name")
    model = load_model(start, pretrained=pretrained)
    if loss == "siglip" and model.towers.logit_bias is None:
        raise ValueError(f"loss.name is 'siglip', but {start} was trained without the bias that it needs; give loss.name=clip")
    return model


def keep_start(run_dir: Path, start: str, source_sha256: str | None, *, is_main: bool) -> None:
    """Write start.json into a run; refuse to go on from a start whose weights have changed since.

    Raises:
      ValueError: the run began from other weights.
    """
    file = run_dir / "start.json"
    if file.exists():
        before = json.loads(file.read_text())["weights_sha256"]
        if before != source_sha256:
            raise ValueError(f"the run {run_dir} began from other weights than {start} holds (sha256 {str(before)[:12]}, "
                             f"now {str(source_sha256)[:12]}); put those back, or give another name=...")
    elif is_main:
        write_text_atomically(file, json.dumps({"start": start, "weights_sha256": source_sha256}, indent=1) + "\n")


def learning_rate_scales(towers: nn.Module, *, image: float, text: float, layer_decay: float | None) -> dict[str, float]:
    """What each parameter's learning rate is multiplied by; the temperature and the bias keep the full rate.

    Args:
      towers: An open_clip model.
      image: Multiple of the image tower.
      text: Multiple of the text side.
      layer_decay: d; a layer n below the top of its tower learns at d^n of the tower's rate. None = 1.

    Source: Bao et al. 2022 (arXiv:2106.08254), appendix; the rule of ELECTRA (Clark et al. 2020).
    """
    towers_rate = {"visual": image, "logit_scale": 1.0, "logit_bias": 1.0}
    return {name: towers_rate.get(name.split(".")[0], text) * (layer_decay or 1.0) ** level
            for name, level in levels_below_top(towers).items()}


def levels_below_top(towers: Any) -> dict[str, int]:
    """How many layers below the top of its tower each parameter stands.

    At the top (0) is the projection; then come the blocks (the stages of open_clip's ResNets, the groups of a timm model's own
    group_matcher()), the top one with the norm behind it; at the bottom are embeddings, patches and stem. So does open_clip 4.
    """
    image = {f"visual.{name}": layer for name, layer in _image_layers(towers.visual).items()}
    others = [name for name, _ in towers.named_parameters() if name not in image]
    temperature = {name: 0.0 for name in others if name in ("logit_scale", "logit_bias")}
    text = {name: _layer(name.removeprefix("text.")) for name in others if name not in temperature}
    return {name: level for tower in (image, text, temperature) for name, level in _from_top(tower).items()}


def _image_layers(visual: Any) -> dict[str, float]:
    names = [name for name, _ in visual.named_parameters()]
    if not hasattr(visual, "trunk"):
        return {name: _layer(name) for name in names}
    from timm.models import group_parameters

    groups: Any = group_parameters(visual.trunk, visual.trunk.group_matcher())
    in_trunk = {f"trunk.{name}": float(group) for group, members in groups.items() for name in members}
    return {name: in_trunk.get(name, math.inf) for name in names}


def _layer(name: str) -> float:
    """The number of a parameter's layer from below, infinite at the top."""
    block = BLOCK.match(name)
    return int(block[1]) + 1 if block else 0 if BELOW_BLOCKS.match(name) else math.inf


def _from_top(layers: dict[str, float]) -> dict[str, int]:
    top_block = max((layer for layer in layers.values() if layer < math.inf), default=math.inf)
    layers = {name: top_block if LAST_NORM.match(name) else layer for name, layer in layers.items()}
    order = sorted(set(layers.values()), reverse=True)
    return {name: order.index(layer) for name, layer in layers.items()}


def make_tower_optimizer(towers: nn.Module, optim: ContrastiveOptimConfig) -> torch.optim.Optimizer:
    """Build the optimizer of both towers, each layer at its rate.

    Raises:
      ValueError: as `make_optimizer`.
    """
    rates = learning_rate_scales(towers, image=optim.image_lr_scale, text=optim.text_lr_scale, layer_decay=optim.layer_decay)
    return make_optimizer(list(towers.named_parameters()), name=optim.name, recipe=optim.recipe, lr=optim.lr,
                          weight_decay=optim.weight_decay, beta1=optim.beta1, beta2=optim.beta2, eps=optim.eps, lr_scales=rates)


def learned_parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """What learns, in the optimizer's order."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def freeze_norms(model: nn.Module) -> None:
    """Let no LayerNorm and no BatchNorm learn; for the statistics see `hold_statistics`."""
    for module in model.modules():
        if isinstance(module, NORMS):
            module.requires_grad_(False)


def hold_statistics(model: nn.Module) -> None:
    """Put BatchNorms into evaluation mode, while the rest trains: they use and keep the statistics that they have."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()


@torch.no_grad()
def pull_towards_start(optimizer: torch.optim.Optimizer, start: Sequence[Tensor], strength: float, skipped: Tensor) -> None:
    """w <- w - lr * strength * (w - start), after the optimizer's own step: L2-SP, decoupled as AdamW's weight decay is.

    Args:
      optimizer: Its groups carry the learning rate of the step that was taken.
      start: The parameters at the start, in the order of the groups.
      strength: lr * strength is the share of the way back that a step takes, at most 1.
      skipped: Scalar, 1 where the optimizer's step was skipped: then nothing moves.

    Source: Li et al. 2018 (arXiv:1802.01483); decoupled as in Loshchilov and Hutter 2019 (arXiv:1711.05101).
    """
    rest = iter(start)
    for group in optimizer.param_groups:
        share = group["lr"] * strength * (1 - skipped)  # scalar
        for parameter in group["params"]:
            own_part(parameter).lerp_(own_part(next(rest)), share)
