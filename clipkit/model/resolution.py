"""A trained model at another image size."""

import copy
from math import isqrt
from typing import Any

import torch
from torch import Tensor

from clipkit.model.build import complete_preprocess_cfg, make_towers
from clipkit.model.image_text import ImageTextModel

SMALLEST_TEXT = {"context_length": 1, "vocab_size": 1, "width": 8, "heads": 1, "layers": 1}


def at_image_size(model: ImageTextModel, image_size: int) -> ImageTextModel:
    """Give a model's image tower another input size; its positional embeddings are resampled (bicubic, antialiased).

    Args:
      model: Its image tower is taken apart: use what is returned.
      image_size: Pixels a side.

    Raises:
      ValueError: the architecture has other weights at that size.

    Source: Dosovitskiy et al. 2021 (arXiv:2010.11929), section 3.2.
    """
    if image_size == model.image_size:
        return model
    model_cfg = copy.deepcopy(model.config["model_cfg"])
    model_cfg["vision_cfg"] |= {"image_size": image_size, "timm_model_pretrained": False}
    try:
        visual = make_towers({"embed_dim": model_cfg["embed_dim"], "vision_cfg": model_cfg["vision_cfg"],
                              "text_cfg": SMALLEST_TEXT, "quick_gelu": model_cfg.get("quick_gelu", False)}).visual
        with torch.no_grad():
            visual.eval()(torch.zeros(1, 3, image_size, image_size))
    except (AssertionError, RuntimeError, ZeroDivisionError) as error:  # as open_clip, timm and torch answer
        cause = " ".join(str(error).split())[:200]
        raise ValueError(f"model.image_size is {image_size}, which the image tower does not take ({cause}); give a multiple of "
                         "its patches or strides, or leave it out") from error
    weights, wanted = model.towers.visual.state_dict(), visual.state_dict()
    for name, tensor in weights.items():
        if tensor.shape != wanted[name].shape:
            weights[name] = _resampled(name, tensor, wanted[name], image_size)
    visual.load_state_dict(weights)
    model.towers.visual = visual.to(model.device)
    config: dict[str, Any] = {"model_cfg": model_cfg,
                              "preprocess_cfg": complete_preprocess_cfg(model.towers, model.config["preprocess_cfg"])}
    resized = ImageTextModel(model.towers, config, model.tokenize)
    resized.source_sha256 = model.source_sha256
    return resized


def _resampled(name: str, embedding: Tensor, wanted: Tensor, image_size: int) -> Tensor:
    """Positional embeddings (..., positions, D) of one square grid on another; those before the grid stay as they are."""
    from timm.layers.pos_embed import resample_abs_pos_embed

    old, new = embedding.shape[-2], wanted.shape[-2]
    prefix = next((prefix for prefix in range(8) if isqrt(old - prefix) ** 2 == old - prefix
                   and isqrt(new - prefix) ** 2 == new - prefix), None)
    if prefix is None or "pos" not in name:
        raise ValueError(f"model.image_size is {image_size}, at which {name} of the image tower has shape "
                         f"{tuple(wanted.shape)}, now {tuple(embedding.shape)}; it has one size: leave "
                         "model.image_size out")
    side = isqrt(new - prefix)
    rows = embedding.reshape(1, old, embedding.shape[-1])  # (1, positions, D)
    return resample_abs_pos_embed(rows, new_size=[side, side], num_prefix_tokens=prefix).reshape(wanted.shape)
