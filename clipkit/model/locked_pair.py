"""A pair of frozen encoders, each from where it comes from, and the model that they make with learned projections (LiT).

Source: Zhai et al. 2022 (arXiv:2111.07991); here both encoders are locked.
"""

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipkit.model.build import build_model, complete_preprocess_cfg, make_towers
from clipkit.model.folder import load_model
from clipkit.model.image_text import Features, ImageTextModel
from clipkit.model.sentence_encoder import SENTENCE_PREFIX, sentence_text_cfg, silent_loading

TIMM_PREFIX = "timm:"
# The tower that is not asked for, as small as open_clip makes it.
NO_IMAGE = {"image_size": 8, "patch_size": 8, "width": 8, "layers": 1, "head_width": 8}
NO_TEXT = {"context_length": 8, "vocab_size": 1, "width": 8, "heads": 1, "layers": 1}
# What stands last in open_clip's text towers: a matrix (W, D), or the weight (D, W) of a linear layer.
TEXT_MATRICES = ("text_projection", "text.text_projection")
TEXT_LAYERS = ("text_projection", "text.text_projection", "text.proj", "text.proj.2")


class Projections(nn.Module):
    """What learns: a projection on each side and the temperature. Legend: F, W widths of the features; D embed_dim."""

    def __init__(self, image_width: int, text_width: int, embed_dim: int, *, image_kind: str, init_logit_scale: float) -> None:
        """
        Args:
          image_width, text_width: F and W.
          embed_dim: D.
          image_kind: "linear", or "mlp" as open_clip puts on timm towers (one hidden layer of 2 D).
          init_logit_scale: 1/temperature at the start.
        """
        from timm.layers.mlp import Mlp

        super().__init__()
        self.image: nn.Module = (nn.Linear(image_width, embed_dim, bias=False) if image_kind == "linear" else
                                 Mlp(image_width, 2 * embed_dim, embed_dim, bias=(True, False)))
        self.text = nn.Linear(text_width, embed_dim, bias=False)
        self.image_kind = image_kind
        self.logit_scale = nn.Parameter(torch.tensor(math.log(init_logit_scale)))

    def forward(self, image_features: Tensor, text_features: Tensor) -> Features:
        """Project frozen features of pairs: (B, F) as the trunk gives them, (B, W) unit norm."""
        return Features(self.project_image(image_features), self.project_text(text_features), self.logit_scale.exp())

    def project_image(self, features: Tensor) -> Tensor:
        """(B, F) -> (B, D), unit norm."""
        return F.normalize(self.image(features), dim=-1)

    def project_text(self, features: Tensor) -> Tensor:
        """(B, W) -> (B, D), unit norm. Of a linear layer without bias the direction is the same for unnormalised features."""
        return F.normalize(self.text(features), dim=-1)


def image_encoder(source: str, *, pretrained: str | None = None, weights: str | None = None,
                  image_size: int | None = None) -> ImageTextModel:
    """Load what encodes pictures; of a timm tower all else is zero, so that its features have one identity.

    Args:
      source: "timm:<name>", or what `load_model` takes.
      pretrained: open_clip tag or weights file, with an open_clip name.
      weights: of a timm tower, as model.image_weights; None = timm's own, fetched.
      image_size: pixels a side of a timm tower; None = 224.

    Raises:
      ValueError: the tower has no separate projection, or a setting does not go with the source.
      FileNotFoundError: there is no such model or weights file.
    """
    if not source.startswith(TIMM_PREFIX):
        if weights is not None or image_size is not None:
            raise ValueError(f"image_weights and image_size are settings of image=timm:<name>, and image is {source!r}, which "
                             "has its own; set both to null")
        model = load_model(source, pretrained=pretrained)
    else:
        vision_cfg = {"timm_model_name": source.removeprefix(TIMM_PREFIX), "timm_model_pretrained": weights is None,
                      "timm_pool": "avg", "timm_proj": "linear", "image_size": image_size or 224}
        model = build_model(config={"embed_dim": 8, "vision_cfg": vision_cfg, "text_cfg": NO_TEXT}, image_weights=weights)
        _keep_only(model.towers, "visual.trunk.")
        model = _prepared_as_timm_says(model)
    if not model.has_trunk_features:
        raise ValueError(f"image is {source!r}, whose tower has no separate projection that another could take the place of; "
                         "choose a ViT, or a timm tower with a linear or mlp projection")
    return model.eval()


def text_encoder(source: str, *, pretrained: str | None = None, context_length: int) -> ImageTextModel:
    """Load what encodes texts; of a sentence encoder all else is zero, so that its features have one identity.

    Args:
      source: "sentence:<installed package, folder or hub name>", or what `load_model` takes.
      pretrained: open_clip tag or weights file, with an open_clip name.
      context_length: tokens of a sentence encoder; other models have their own.

    Raises:
      ValueError, FileNotFoundError: it cannot be used, or is not there.
    """
    if not source.startswith(SENTENCE_PREFIX):
        return load_model(source, pretrained=pretrained)
    width, text_cfg = sentence_text_cfg(source.removeprefix(SENTENCE_PREFIX), context_length)
    with silent_loading():
        model = build_model(config={"embed_dim": width, "vision_cfg": NO_IMAGE, "text_cfg": text_cfg})
    _keep_only(model.towers, "text.")
    return model.eval()


@torch.no_grad()
def locked_pair(image: ImageTextModel, text: ImageTextModel, projections: Projections) -> ImageTextModel:
    """Put two encoders and what was learned on their features together, as open_clip can load it.

    A text tower's own last linear layer and the learned one become one matrix.

    Raises:
      ValueError: no one configuration describes both.
    """
    vision_cfg, text_cfg = (copy.deepcopy(model.config["model_cfg"][key]) for model, key in
                            ((image, "vision_cfg"), (text, "text_cfg")))
    is_timm, is_hf = bool(vision_cfg.get("timm_model_name")), "hf_model_name" in text_cfg
    if is_timm:
        vision_cfg |= {"timm_model_pretrained": False, "timm_proj": projections.image_kind, "timm_proj_bias": False}
    elif projections.image_kind != "linear":
        raise ValueError(f"image_projection is {projections.image_kind!r}, which open_clip has for timm towers only; give "
                         "image_projection=linear")
    if is_hf:
        text_cfg |= {"hf_proj_type": text_cfg.get("hf_proj_type", "mlp") or "linear", "hf_model_pretrained": False}
    activations = [bool(model.config["model_cfg"].get("quick_gelu")) for model, has_own in ((image, is_timm), (text, is_hf))
                   if not has_own]
    if len(set(activations)) > 1:
        raise ValueError("one of the two towers was trained with QuickGELU and the other with GELU, and an open_clip model has "
                         "one activation; choose towers that agree, or a timm or sentence encoder")
    model_cfg = {"embed_dim": projections.text.out_features, "vision_cfg": vision_cfg, "text_cfg": text_cfg,
                 "quick_gelu": any(activations), "custom_text": text.config["model_cfg"].get("custom_text", False)}
    towers = make_towers(model_cfg)
    given = {**_image_state(image, projections, is_timm), **_text_state(text, projections.text.weight),
             "logit_scale": projections.logit_scale}
    for name, wanted in towers.state_dict().items():
        if name not in given or given[name].shape != wanted.shape:
            found = tuple(given[name].shape) if name in given else "nothing"
            raise ValueError(f"open_clip cannot represent the two encoders in one model: {name} would be {found} in the place "
                             f"of {tuple(wanted.shape)}; give embed_dim={text.config['model_cfg']['embed_dim']}, or others")
    towers.load_state_dict({name: given[name] for name in towers.state_dict()})
    config = {"model_cfg": model_cfg, "preprocess_cfg": image.config["preprocess_cfg"]}
    return ImageTextModel(towers, config, text.tokenize).eval()


def _image_state(image: ImageTextModel, projections: Projections, is_timm: bool) -> dict[str, Tensor]:
    state = {name: tensor for name, tensor in image.towers.state_dict().items() if name.startswith("visual.")}
    if not is_timm:
        weight = projections.image.get_parameter("weight")  # (D, F)
        return {**state, "visual.proj": weight.T}
    head = "visual.head.proj" if projections.image_kind == "linear" else "visual.head.mlp"
    return {**state, **{f"{head}.{name}": tensor for name, tensor in projections.image.state_dict().items()}}


def _text_state(text: ImageTextModel, weight: Tensor) -> dict[str, Tensor]:
    """The text tower with the learned layer (D, W) behind its own last one."""
    state = {name: tensor for name, tensor in text.towers.state_dict().items()
             if not name.startswith(("visual.", "logit_"))}
    matrix = next((name for name in TEXT_MATRICES if name in state), None)
    layer = next((name for name in TEXT_LAYERS if f"{name}.weight" in state), None)
    if matrix is not None:
        return {**state, matrix: state[matrix] @ weight.T}
    if layer is None:
        return {**state, "text.proj.weight": weight}  # of a Hugging Face tower without a projection
    names = [name for name in (f"{layer}.weight", f"{layer}.bias") if name in state]
    return {**state, **{name: weight @ state[name] for name in names}}


def _keep_only(towers: nn.Module, prefix: str) -> None:
    """Zero all parameters under other names: no one reads them, and random ones would make each call another model."""
    for name, parameter in towers.named_parameters():
        if not name.startswith(prefix):
            parameter.detach().zero_()


def _prepared_as_timm_says(model: ImageTextModel) -> ImageTextModel:
    """The model with the mean, deviation and interpolation that its timm weights were trained with."""
    said: Mapping[str, Any] = model.towers.visual.trunk.default_cfg
    own = {name: said[name] for name in ("mean", "std", "interpolation") if said.get(name)}
    model_cfg = copy.deepcopy(model.config["model_cfg"])
    return ImageTextModel(model.towers, {"model_cfg": model_cfg, "preprocess_cfg": complete_preprocess_cfg(model.towers, own)},
                          model.tokenize)
