"""Weights between models: on the line from one to its fine-tuned successor, and the mean of several (a soup)."""

import copy
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from clipkit.model.image_text import ImageTextModel

StateDict = Mapping[str, Tensor]
ONLY_IN_TRAINING = {"model_cfg.init_logit_scale", "model_cfg.init_logit_bias", "model_cfg.vision_cfg.patch_dropout"}


def interpolate(base: StateDict, tuned: StateDict, alpha: float) -> dict[str, Tensor]:
    """Weights at (1 - alpha) * base + alpha * tuned; at 0 and 1 the ends, bit for bit.

    The temperature is interpolated in its logarithm, which is what `logit_scale` holds in a state dict. Whole numbers
    (BatchNorm's counters) are those of `tuned`, but for alpha 0.

    Args:
      base: what was fine-tuned.
      tuned: what came of it; same names and shapes.
      alpha: from 0 to 1.

    Raises:
      ValueError: alpha is outside [0, 1], or a name, a shape or a dtype differs; says which first.

    Source: Wortsman et al. 2022, WiSE-FT (arXiv:2109.01903).
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is {alpha}; give a number from 0 (base) to 1 (the fine-tuned model)")
    check_fit(base, tuned)
    if alpha == 0:
        return dict(base)
    # torch.lerp is exact at both ends; base + alpha * (tuned - base) is not.
    return {name: torch.lerp(base[name], tensor, alpha) if tensor.is_floating_point() else tensor
            for name, tensor in tuned.items()}


def soup(models: Sequence[StateDict]) -> dict[str, Tensor]:
    """The mean of models that were fine-tuned from one start; whole numbers are those of the first.

    Args:
      models: at least one; same names and shapes.

    Raises:
      ValueError: there is none, or a name, a shape or a dtype differs; says which first.

    Source: Wortsman et al. 2022, Model soups (arXiv:2203.05482).
    """
    if not models:
        raise ValueError("a soup needs at least one model, none is given")
    for other in models[1:]:
        check_fit(models[0], other)
    return {name: torch.stack([model[name].double() for model in models]).mean(dim=0).to(tensor.dtype)
            if tensor.is_floating_point() else tensor for name, tensor in models[0].items()}


def check_fit(base: StateDict, other: StateDict) -> None:
    """Raise ValueError unless both have the same names, shapes and dtypes; it names the first that differs."""
    for name in [*base, *(name for name in other if name not in base)]:
        found = [f"{tuple(weights[name].shape)} {weights[name].dtype}".replace("torch.", "") if name in weights else "nothing"
                 for weights in (base, other)]
        if found[0] != found[1]:
            raise ValueError(f"the models do not fit each other: {name} is {found[0]} in the first and {found[1]} in the "
                             "second; give models of one architecture, fine-tuned from one start")


def interpolated_model(base: ImageTextModel, tuned: ImageTextModel, alpha: float) -> ImageTextModel:
    """A model between two; arguments and errors as in `interpolate`, and ValueError too where their settings differ."""
    check_config(base, tuned)
    weights = interpolate(base.towers.state_dict(), tuned.towers.state_dict(), alpha)
    if alpha in (0, 1):
        return _with_weights(tuned, weights, (base, tuned)[int(alpha)].source_sha256)
    return _with_weights(tuned, weights, _made_of([base, tuned], f"interpolated at {alpha}"))


def soup_model(models: Sequence[ImageTextModel]) -> ImageTextModel:
    """The soup of models; errors as in `soup`, and ValueError too where their settings differ."""
    for other in models[1:]:
        check_config(models[0], other)
    weights = soup([model.towers.state_dict() for model in models])
    return _with_weights(models[0], weights, _made_of(models, "soup"))


def check_config(base: ImageTextModel, other: ImageTextModel) -> None:
    """Raise ValueError where two models differ in what their weights do not tell: activation, preprocessing, tokenizer."""
    first, second = _leaves(base.config), _leaves(other.config)
    for key in sorted({*first, *second} - ONLY_IN_TRAINING):
        if first.get(key) != second.get(key):
            raise ValueError(f"the models do not fit each other: {key} is {first.get(key)!r} in the first and "
                             f"{second.get(key)!r} in the second; give models of one architecture, fine-tuned from one start")


def _leaves(config: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """{dotted key: value} of a nested mapping, without what is null (a null and a missing key mean the same)."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            found |= _leaves(value, f"{path}{key}.")
        elif value is not None:
            found[f"{path}{key}"] = list(value) if isinstance(value, tuple) else value
    return found


def _with_weights(like: ImageTextModel, weights: StateDict, sha256: str | None) -> ImageTextModel:
    model = ImageTextModel(copy.deepcopy(like.towers), like.config, like.tokenize).eval()
    model.towers.load_state_dict(weights)
    model.source_sha256 = sha256
    return model


def _made_of(models: Sequence[ImageTextModel], how: str) -> str | None:
    """A hash that stands for weights without a file: of the files that they were made of. None where one has none."""
    hashes = [model.source_sha256 for model in models]
    return None if None in hashes else hashlib.sha256(" ".join([how, *map(str, hashes)]).encode()).hexdigest()
