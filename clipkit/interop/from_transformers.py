"""A transformers CLIP or SigLIP folder's configurations as open_clip's model_cfg and preprocess_cfg. No model is built."""

from collections.abc import Mapping
from typing import Any

MODEL_TYPES = ("clip", "siglip")
OWN_TOKENIZER = "tokenizer-files-of-this-folder"  # open_clip reads the files beside the config, whatever this name says

# What transformers takes for a key that config.json leaves out: it writes only what differs from its classes' defaults.
CLIP_TEXT = {"vocab_size": 49408, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12,
             "num_attention_heads": 8, "max_position_embeddings": 77, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
             "eos_token_id": 49407}
CLIP_VISION = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
               "num_channels": 3, "image_size": 224, "patch_size": 32, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
SIGLIP_TEXT = {"vocab_size": 32000, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
               "num_attention_heads": 12, "max_position_embeddings": 64, "hidden_act": "gelu_pytorch_tanh",
               "layer_norm_eps": 1e-6, "projection_size": None}
SIGLIP_VISION = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
                 "num_channels": 3, "image_size": 224, "patch_size": 16, "hidden_act": "gelu_pytorch_tanh",
                 "layer_norm_eps": 1e-6, "vision_use_head": True}
PREPROCESS = {
    "clip": {"size": {"shortest_edge": 224}, "resample": 3, "do_center_crop": True, "crop_size": 224,
             "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]},
    "siglip": {"size": {"height": 224, "width": 224}, "resample": 3, "do_center_crop": False,
               "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]},
}

# Arguments of nn.GELU; None is open_clip's QuickGELU, which one flag sets for both towers.
ACTIVATIONS: dict[str, dict[str, str] | None] = {"quick_gelu": None, "gelu": {}, "gelu_pytorch_tanh": {"approximate": "tanh"},
                                                 "gelu_new": {"approximate": "tanh"}}
INTERPOLATIONS = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers

# (width, layers, heads, mlp width, patch size) of the SigLIP image towers that timm has, by the image sizes it has them in.
SIGLIP_TRUNKS: dict[tuple[int, int, int, int, int], tuple[str, tuple[int, ...]]] = {
    (768, 12, 12, 3072, 16): ("vit_base_patch16_siglip", (224, 256, 384, 512)),
    (768, 12, 12, 3072, 32): ("vit_base_patch32_siglip", (256,)),
    (1024, 24, 16, 4096, 16): ("vit_large_patch16_siglip", (256, 384, 512)),
    (1152, 27, 16, 4304, 14): ("vit_so400m_patch14_siglip", (224, 378, 384)),
    (1152, 27, 16, 4304, 16): ("vit_so400m_patch16_siglip", (256, 384, 512)),
    (1536, 40, 16, 6144, 16): ("vit_giantopt_patch16_siglip", (256, 384)),
}


def model_cfg_from_transformers(config: Mapping[str, Any]) -> dict[str, Any]:
    """Translate a transformers config.json into an open_clip model_cfg.

    Args:
      config: config.json of a CLIPModel or a SiglipModel, as transformers 4 or 5 writes it.

    Returns:
      As open_clip's own configurations look. A CLIP's tokenizer is its own BPE: the caller sets text_cfg's hf_tokenizer_name
      to OWN_TOKENIZER where the folder has another. A SigLIP has the image tower's activation in vision_cfg's act_kwargs:
      clipkit obeys it; open_clip leaves it unread and has exact GELU in most sizes (with random weights 2e-4 off).

    Raises:
      ValueError: the model is of another kind, or open_clip's classes cannot represent it.
    """
    model_type = config.get("model_type")
    if model_type == "siglip2":
        raise ValueError("model_type is 'siglip2' (NaFlex: pictures of any shape), which open_clip cannot represent; take a "
                         "fixed-resolution SigLIP 2 (its model_type is 'siglip')")
    if model_type not in MODEL_TYPES:
        raise ValueError(f"model_type is {model_type!r}; of transformers' models clipkit reads {' and '.join(MODEL_TYPES)}")
    return _clip_cfg(config) if model_type == "clip" else _siglip_cfg(config)


def preprocess_cfg_from_transformers(processor: Mapping[str, Any], model_type: str, image_size: int) -> dict[str, Any]:
    """Translate a preprocessor_config.json into an open_clip preprocess_cfg.

    Args:
      processor: Contents of the file; what it leaves out has the defaults of `model_type`.
      model_type: "clip" or "siglip".
      image_size: The model's, pixels a side; the processor must give the same.

    Raises:
      ValueError: the processor does what open_clip's transform cannot, or its size is not the model's.
    """
    values = PREPROCESS[model_type] | {key: value for key, value in processor.items() if value is not None}
    for step in ("do_resize", "do_rescale", "do_normalize"):
        if not values.get(step, True):
            raise ValueError(f"the image processor's {step} is false; clipkit resizes, rescales and normalises: set it to true")
    if values.get("do_pad"):
        raise ValueError("the image processor's do_pad is true; clipkit reads processors that crop or squash: set it to false")
    if abs(values.get("rescale_factor", 1 / 255) * 255 - 1) > 1e-6:
        raise ValueError(f"the image processor's rescale_factor is {values['rescale_factor']}; clipkit divides by 255")
    if values["resample"] not in INTERPOLATIONS:
        raise ValueError(f"the image processor's resample is {values['resample']}; clipkit has 2 (bilinear) and 3 (bicubic)")
    return {"size": image_size, "mode": "RGB", "mean": list(values["image_mean"]), "std": list(values["image_std"]),
            "interpolation": INTERPOLATIONS[values["resample"]], "resize_mode": _resize_mode(values, image_size),
            "fill_color": 0}


def _resize_mode(values: Mapping[str, Any], image_size: int) -> str:
    size = values["size"] if isinstance(values["size"], Mapping) else {"shortest_edge": values["size"]}
    crop = values.get("crop_size")
    crop = sorted(set(crop.values())) if isinstance(crop, Mapping) else [crop]
    cropped = bool(values["do_center_crop"])
    if not cropped or crop == [image_size]:
        if size.get("shortest_edge") == image_size and cropped:
            return "shortest"
        if size.get("height") == size.get("width") == image_size:
            return "squash"
    raise ValueError(f"the image processor resizes to {dict(size)} and crops to {crop if cropped else 'nothing'}; clipkit "
                     f"needs the model's image_size {image_size} in both, or height and width {image_size} without a crop")


def _clip_cfg(config: Mapping[str, Any]) -> dict[str, Any]:
    text, vision = _part(config, "text", CLIP_TEXT), _part(config, "vision", CLIP_VISION)
    quick_gelu = _activation(text, "text") is None
    if quick_gelu != (_activation(vision, "vision") is None):
        raise ValueError(f"hidden_act is {vision['hidden_act']!r} in vision_config and {text['hidden_act']!r} in text_config; "
                         "open_clip has one setting of quick_gelu for both towers")
    if vision["hidden_size"] % vision["num_attention_heads"]:
        raise ValueError(f"vision_config.hidden_size {vision['hidden_size']} is no multiple of its "
                         f"{vision['num_attention_heads']} heads")
    vision_cfg = {"image_size": _square(vision, "image_size"), "layers": vision["num_hidden_layers"],
                  "width": vision["hidden_size"], "head_width": vision["hidden_size"] // vision["num_attention_heads"],
                  "patch_size": _square(vision, "patch_size")}
    return {"embed_dim": config.get("projection_dim", 512), "quick_gelu": quick_gelu,
            "vision_cfg": vision_cfg | _common(vision, "vision", 1e-5), "text_cfg": _text_cfg(text, 1e-5) | _eos_pooling(text)}


def _siglip_cfg(config: Mapping[str, Any]) -> dict[str, Any]:
    text, vision = _part(config, "text", SIGLIP_TEXT), _part(config, "vision", SIGLIP_VISION)
    for part, name in ((text, "text"), (vision, "vision")):
        if _activation(part, name) is None:
            raise ValueError(f"{name}_config.hidden_act is 'quick_gelu', which open_clip's SigLIP towers do not have")
    if not vision["vision_use_head"]:
        raise ValueError("vision_config.vision_use_head is false: without its attention pool the model has no image features")
    if vision["layer_norm_eps"] != 1e-6:
        raise ValueError(f"vision_config.layer_norm_eps is {vision['layer_norm_eps']}; timm's SigLIP towers have 1e-06")
    embed_dim = vision["hidden_size"]
    if (text["projection_size"] or text["hidden_size"]) != embed_dim:
        raise ValueError(f"the text side gives {text['projection_size'] or text['hidden_size']} features and the image side "
                         f"{embed_dim}; they must be equal")
    image_size = _square(vision, "image_size")
    vision_cfg = {"image_size": image_size, "timm_model_name": _siglip_trunk(vision, image_size),
                  "timm_model_pretrained": False, "timm_pool": "map", "timm_proj": "none",
                  "act_kwargs": _activation(vision, "vision")}
    text_cfg = _text_cfg(text, 1e-6) | {"hf_tokenizer_name": OWN_TOKENIZER, "tokenizer_kwargs": {"clean": "canonicalize"},
                                        "no_causal_mask": True, "proj_bias": True, "pool_type": "last",
                                        "norm_kwargs": {"eps": text["layer_norm_eps"]}}
    return {"embed_dim": embed_dim, "init_logit_bias": -10, "custom_text": True, "vision_cfg": vision_cfg, "text_cfg": text_cfg}


def _siglip_trunk(vision: Mapping[str, Any], image_size: int) -> str:
    shape = (vision["hidden_size"], vision["num_hidden_layers"], vision["num_attention_heads"], vision["intermediate_size"],
             _square(vision, "patch_size"))
    if shape not in SIGLIP_TRUNKS:
        raise ValueError("vision_config's (hidden_size, num_hidden_layers, num_attention_heads, intermediate_size, patch_size) "
                         f"is {shape}; timm has SigLIP towers of {', '.join(map(str, SIGLIP_TRUNKS))}")
    name, sizes = SIGLIP_TRUNKS[shape]
    return f"{name}_{min(sizes, key=lambda size: abs(size - image_size))}"


def _part(config: Mapping[str, Any], name: str, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """A tower's configuration, complete. CLIP's old `*_config_dict`, where given, stands in the place of `*_config`."""
    return {**defaults, **(config.get(f"{name}_config_dict") or config.get(f"{name}_config") or {})}


def _text_cfg(text: Mapping[str, Any], plain_eps: float) -> dict[str, Any]:
    return {"context_length": text["max_position_embeddings"], "vocab_size": text["vocab_size"], "width": text["hidden_size"],
            "heads": text["num_attention_heads"], "layers": text["num_hidden_layers"]} | _common(text, "text", plain_eps)


def _common(part: Mapping[str, Any], name: str, plain_eps: float) -> dict[str, Any]:
    """What open_clip's Transformer has other defaults for."""
    width, mlp_width = part["hidden_size"], part["intermediate_size"]
    cfg: dict[str, Any] = {}
    if mlp_width != 4 * width:
        ratio = mlp_width / width
        cfg["mlp_ratio"] = ratio if int(width * ratio) == mlp_width else (mlp_width + 0.5) / width  # open_clip rounds down
    if part["layer_norm_eps"] != plain_eps:
        cfg["norm_kwargs"] = {"eps": part["layer_norm_eps"]}
    if activation := _activation(part, name):
        cfg["act_kwargs"] = activation
    return cfg


def _eos_pooling(text: Mapping[str, Any]) -> dict[str, Any]:
    """Where a CLIP text tower pools. transformers reads eos_token_id 2, a mistake of old files, as "the largest id"."""
    eos = text["eos_token_id"]
    if not isinstance(eos, int):
        raise ValueError(f"text_config.eos_token_id is {eos!r}; clipkit reads one number")
    return {} if eos in (2, text["vocab_size"] - 1) else {"pool_type": "eos", "eos_id": eos}


def _activation(part: Mapping[str, Any], name: str) -> dict[str, str] | None:
    if part["hidden_act"] not in ACTIVATIONS:
        raise ValueError(f"{name}_config.hidden_act is {part['hidden_act']!r}; open_clip has {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[part["hidden_act"]]


def _square(vision: Mapping[str, Any], key: str) -> int:
    value = vision[key]
    if vision["num_channels"] != 3:
        raise ValueError(f"vision_config.num_channels is {vision['num_channels']}; clipkit reads RGB pictures: 3")
    sides = [value] if isinstance(value, int) else list(value)
    if len(set(sides)) != 1:
        raise ValueError(f"vision_config.{key} is {value}; clipkit reads square ones")
    return sides[0]
