"""An open_clip text tower as transformers' CLIPTextModel: its configuration, or why there is none. No model is built."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from clipkit.interop.clip_bpe import is_clip_bpe
from clipkit.interop.from_transformers import ACTIVATIONS

VOCAB_SIZE, START_OF_TEXT, END_OF_TEXT = 49408, 49406, 49407  # of CLIP's byte-pair encoding
# text_cfg's fields -> what CLIPTextModel can represent; the first is open_clip's default.
ALLOWED: dict[str, tuple[Any, ...]] = {
    "kind": ("transformer",), "hf_model_name": (None,), "no_causal_mask": (False,), "embed_cls": (False,),
    "pool_type": ("argmax", "eos"), "proj_type": ("linear",), "proj_bias": (False,), "ls_init_value": (None,),
    "qk_norm": (False,), "scaled_cosine_attn": (False,), "scale_heads": (False,), "scale_attn_inner": (False,),
    "scale_attn": (False,), "scale_fc": (False,), "block_type": (None, "default"), "final_ln_after_pool": (False,),
    "hf_tokenizer_name": (None,), "output_tokens": (False,),
}
ALLOWED_INSIDE: dict[str, dict[str, Any]] = {"norm_kwargs": {"eps": None}, "tokenizer_kwargs": {"clean": "lower"}}  # None = any
INSTEAD = ("CLIPTextModel has no counterpart; use format=transformers for a SigLIP, format=onnx or format=open_clip for any "
           "other")


def clip_text_config(towers: nn.Module, text_cfg: Mapping[str, Any], tokenizer: Any) -> dict[str, Any]:
    """Describe a text tower by the arguments of transformers' CLIPTextConfig.

    Args:
      towers: open_clip's CLIP or CustomTextCLIP. Sizes, activation and epsilon are read from its modules.
      text_cfg: The configuration that the towers were made from.
      tokenizer: The open_clip tokenizer of the model.

    Raises:
      ValueError: CLIPTextModel cannot represent the tower, or the tokenizer is not CLIP's; names the field of text_cfg.
    """
    refuse_text_cfg(text_cfg)
    text = text_tower(towers)
    vocab_size, width = text.token_embedding.weight.shape
    if vocab_size < VOCAB_SIZE:
        raise ValueError(f"text_cfg.vocab_size is {vocab_size}, but the tokenizer's ids go up to {VOCAB_SIZE - 1}; a tower of "
                         "CLIP's tokenizer needs 49408")
    refuse_tokenizer(tokenizer)
    block = text.transformer.resblocks[0]
    return {"vocab_size": vocab_size, "hidden_size": width, "intermediate_size": block.mlp.c_fc.out_features,
            "projection_dim": text.text_projection.shape[1], "num_hidden_layers": len(text.transformer.resblocks),
            "num_attention_heads": block.attn.num_heads, "max_position_embeddings": len(text.positional_embedding),
            "hidden_act": activation_name(block.mlp.gelu), "layer_norm_eps": layer_norm_eps(text.transformer, text.ln_final),
            "bos_token_id": START_OF_TEXT, "eos_token_id": END_OF_TEXT}


def refuse_text_cfg(text_cfg: Mapping[str, Any]) -> None:
    """Raise ValueError by the name of the first field that CLIPTextModel cannot represent."""
    for field, allowed in ALLOWED.items():
        value = text_cfg.get(field, allowed[0])
        if value not in allowed and (value or allowed[0]):
            raise ValueError(f"text_cfg.{field} is {value!r}: {INSTEAD}")
    for field, allowed in ALLOWED_INSIDE.items():
        for key, value in (text_cfg.get(field) or {}).items():
            if key not in allowed or allowed[key] not in (None, value):
                raise ValueError(f"text_cfg.{field} has {key}={value!r}: {INSTEAD}")
    if text_cfg.get("pool_type") == "eos" and text_cfg.get("eos_id", 2) != END_OF_TEXT:
        raise ValueError(f"text_cfg.eos_id is {text_cfg.get('eos_id', 2)}, but the end of text of CLIP's tokenizer is "
                         f"{END_OF_TEXT}; use format=onnx or format=open_clip")


def refuse_tokenizer(tokenizer: Any) -> None:
    """Raise ValueError unless a tokenizer is CLIP's own byte-pair encoding."""
    merges = sorted(getattr(tokenizer, "bpe_ranks", ()), key=lambda merge: tokenizer.bpe_ranks[merge])
    if not is_clip_bpe(getattr(tokenizer, "encoder", {}), merges):
        raise ValueError(f"the tokenizer ({type(tokenizer).__name__}) is not CLIP's byte-pair encoding, which CLIPTokenizer "
                         "runs; use format=transformers for a SigLIP, format=open_clip for any other")


def text_tower(towers: Any) -> Any:
    """The module that holds token_embedding, positional_embedding, transformer, ln_final, text_projection and attn_mask."""
    return getattr(towers, "text", towers)


def text_weights(towers: Any) -> dict[str, Tensor]:
    """The text tower's tensors under the names that open_clip's CLIP has for them."""
    names = ("token_embedding.", "positional_embedding", "transformer.", "ln_final.", "text_projection")
    return {name: tensor for name, tensor in text_tower(towers).state_dict().items() if name.startswith(names)}


def activation_name(module: nn.Module) -> str:
    """transformers' name of an activation.

    Raises:
      ValueError: it is neither open_clip's QuickGELU nor torch's GELU.
    """
    from open_clip.transformer import QuickGELU

    if isinstance(module, QuickGELU):
        return "quick_gelu"
    for name, arguments in ACTIVATIONS.items():
        if isinstance(module, nn.GELU) and arguments is not None and module.approximate == arguments.get("approximate", "none"):
            return name
    raise ValueError(f"the activation is {type(module).__name__} (act_kwargs); transformers' CLIP has {', '.join(ACTIVATIONS)}")


def layer_norm_eps(*modules: nn.Module) -> float:
    """The one epsilon of all layer norms in some modules.

    Raises:
      ValueError: they have several.
    """
    found = {layer.eps for module in modules for layer in module.modules() if isinstance(layer, nn.LayerNorm)}
    if len(found) != 1:
        raise ValueError(f"the layer norms' eps are {sorted(found)} (norm_kwargs); transformers' CLIP has one for all")
    return found.pop()
