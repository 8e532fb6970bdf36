"""Image towers, SigLIP's text tower and the preprocessing in transformers' terms, or why there are none. No model is built."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from clipkit.interop.from_transformers import INTERPOLATIONS
from clipkit.interop.to_transformers_text import activation_name, layer_norm_eps

INSTEAD = "transformers' CLIPModel and SiglipModel have no counterpart; use format=onnx or format=open_clip"
# Fields of vision_cfg and text_cfg -> what transformers can represent.
PLAIN_BLOCK: dict[str, tuple[Any, ...]] = {
    "ls_init_value": (None,), "block_type": (None, "default"), "qk_norm": (False,), "scaled_cosine_attn": (False,),
    "scale_heads": (False,), "scale_attn_inner": (False,), "scale_attn": (False,), "scale_fc": (False,),
    "output_tokens": (False,),
}
CLIP_VISION = {**PLAIN_BLOCK, "attentional_pool": (False,), "no_ln_pre": (False,), "pool_type": ("tok",)}
SIGLIP_VISION: dict[str, tuple[Any, ...]] = {"timm_pool": ("map",), "timm_proj": ("none",)}
SIGLIP_TEXT = {**PLAIN_BLOCK, "kind": ("transformer",), "hf_model_name": (None,), "embed_cls": (False,),
               "no_causal_mask": (True,), "pool_type": ("last",), "proj_type": ("linear",), "proj_bias": (True,)}


def is_siglip(towers: Any) -> bool:
    """True if the image tower is timm's ViT with SigLIP's attention pool; all else can only be a CLIPModel."""
    trunk = getattr(towers.visual, "trunk", None)
    return getattr(trunk, "attn_pool", None) is not None and getattr(trunk, "cls_token", None) is None


def clip_vision_config(towers: Any, model_cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Describe an image tower by the arguments of transformers' CLIPVisionConfig.

    Args:
      towers: open_clip's CLIP or CustomTextCLIP. Sizes, activation and epsilon are read from its modules.
      model_cfg: The configuration that the towers were made from.

    Raises:
      ValueError: CLIPModel cannot represent the tower; names the field.
    """
    from open_clip.model import CLIPVisionCfg

    vision_cfg = {**vars(CLIPVisionCfg()), **model_cfg["vision_cfg"]}
    if vision_cfg["timm_model_name"]:
        name = vision_cfg["timm_model_name"]
        raise ValueError(f"vision_cfg.timm_model_name is {name!r}, which is no SigLIP tower: {INSTEAD}")
    if not isinstance(vision_cfg["layers"], int):
        raise ValueError(f"vision_cfg.layers is {list(vision_cfg['layers'])} (a ResNet): {INSTEAD}")
    _refuse("vision_cfg", vision_cfg, CLIP_VISION)
    if unknown := set(vision_cfg["norm_kwargs"] or {}) - {"eps"}:
        raise ValueError(f"vision_cfg.norm_kwargs has {', '.join(sorted(unknown))}: {INSTEAD}")
    if towers.logit_bias is not None:
        raise ValueError("init_logit_bias is set (trained with loss=siglip), and CLIPModel has no logit_bias: use format=onnx "
                         "or format=open_clip")
    visual = towers.visual
    block = visual.transformer.resblocks[0]
    return {"hidden_size": visual.conv1.out_channels, "intermediate_size": block.mlp.c_fc.out_features,
            "projection_dim": visual.proj.shape[1], "num_hidden_layers": len(visual.transformer.resblocks),
            "num_attention_heads": block.attn.num_heads, "image_size": _side("image_size", visual.image_size),
            "patch_size": _side("patch_size", visual.patch_size), "hidden_act": activation_name(block.mlp.gelu),
            "layer_norm_eps": layer_norm_eps(visual)}


def siglip_configs(towers: Any, model_cfg: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Describe both towers by SiglipConfig's vision_config and text_config.

    Args:
      towers: Ones for which `is_siglip` is true.
      model_cfg: The configuration that they were made from.

    Raises:
      ValueError: SiglipModel cannot represent a tower; names the field.
    """
    from open_clip.model import CLIPTextCfg, CLIPVisionCfg

    text_cfg = {"kind": "transformer", **vars(CLIPTextCfg()), **model_cfg["text_cfg"]}
    _refuse("vision_cfg", {**vars(CLIPVisionCfg()), **model_cfg["vision_cfg"]}, SIGLIP_VISION)
    _refuse("text_cfg", text_cfg, SIGLIP_TEXT)
    if not text_cfg["hf_tokenizer_name"]:
        raise ValueError(f"text_cfg.hf_tokenizer_name is None (CLIP's own tokenizer) beside a SigLIP tower: {INSTEAD}")
    if towers.logit_bias is None:
        raise ValueError("init_logit_bias is None, and SiglipModel needs a logit_bias: use format=onnx or format=open_clip")
    trunk, text = towers.visual.trunk, getattr(towers, "text", towers)
    image_block, text_block = trunk.blocks[0], text.transformer.resblocks[0]
    vocab_size, width = text.token_embedding.weight.shape
    vision = {"hidden_size": trunk.embed_dim, "intermediate_size": image_block.mlp.fc1.out_features,
              "num_hidden_layers": len(trunk.blocks), "num_attention_heads": image_block.attn.num_heads,
              "image_size": _side("image_size", towers.visual.image_size),
              "patch_size": _side("patch_size", trunk.patch_embed.patch_size), "hidden_act": _gelu_name(image_block.mlp.act),
              "layer_norm_eps": layer_norm_eps(trunk)}
    return vision, {
        "vocab_size": vocab_size, "hidden_size": width, "intermediate_size": text_block.mlp.c_fc.out_features,
        "projection_size": text.text_projection.out_features, "num_hidden_layers": len(text.transformer.resblocks),
        "num_attention_heads": text_block.attn.num_heads, "max_position_embeddings": len(text.positional_embedding),
        "hidden_act": _gelu_name(text_block.mlp.gelu), "layer_norm_eps": layer_norm_eps(text.transformer, text.ln_final)}


def image_processor_config(preprocess_cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Translate an open_clip preprocess_cfg into the arguments of transformers' CLIPImageProcessor.

    Raises:
      ValueError: the processor cannot prepare pictures so; names the field.
    """
    _refuse("preprocess_cfg", preprocess_cfg, {"mode": ("RGB",), "resize_mode": ("shortest", "squash")})
    size = preprocess_cfg["size"]
    side = _side("size", (size, size) if isinstance(size, int) else size)
    # open_clip takes "random" for bicubic where it does not train
    bilinear = preprocess_cfg["interpolation"] == INTERPOLATIONS[2]
    sizes = ({"size": {"shortest_edge": side}, "do_center_crop": True, "crop_size": {"height": side, "width": side}}
             if preprocess_cfg["resize_mode"] == "shortest" else
             {"size": {"height": side, "width": side}, "do_center_crop": False})
    return {**sizes, "do_resize": True, "resample": 2 if bilinear else 3, "do_rescale": True, "rescale_factor": 1 / 255,
            "do_normalize": True, "image_mean": list(preprocess_cfg["mean"]), "image_std": list(preprocess_cfg["std"]),
            "do_convert_rgb": True}


def _refuse(part: str, fields: Mapping[str, Any], allowed: Mapping[str, tuple[Any, ...]]) -> None:
    """Raise ValueError that names the first field with a value that is not allowed."""
    for field, values in allowed.items():
        if fields[field] not in values:
            raise ValueError(f"{part}.{field} is {fields[field]!r}: {INSTEAD}")


def _gelu_name(module: nn.Module) -> str:
    name = activation_name(module)
    if name == "quick_gelu":
        raise ValueError(f"quick_gelu is true beside a SigLIP tower: {INSTEAD}")
    return name


def _side(name: str, sides: tuple[int, ...]) -> int:
    if len(set(sides)) != 1:
        raise ValueError(f"{name} is {tuple(sides)}, and transformers' CLIP has square ones only: use format=onnx or "
                         "format=open_clip")
    return sides[0]
