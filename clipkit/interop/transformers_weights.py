"""The tensors of a transformers CLIP or SigLIP under open_clip's names, and back. Pure renaming, joining and transposing."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

# transformers' module -> open_clip's. What the tables do not name is an error: nothing is dropped in silence.
TENSORS = {
    "clip": {
        "logit_scale": "logit_scale",
        "vision_model.embeddings.class_embedding": "visual.class_embedding",
        "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
        "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
        "vision_model.pre_layrnorm.weight": "visual.ln_pre.weight",  # spelt so in transformers
        "vision_model.pre_layrnorm.bias": "visual.ln_pre.bias",
        "vision_model.post_layernorm.weight": "visual.ln_post.weight",
        "vision_model.post_layernorm.bias": "visual.ln_post.bias",
        "visual_projection.weight": "visual.proj",
        "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
        "text_model.embeddings.position_embedding.weight": "positional_embedding",
        "text_model.final_layer_norm.weight": "ln_final.weight",
        "text_model.final_layer_norm.bias": "ln_final.bias",
        "text_projection.weight": "text_projection",
    },
    "siglip": {
        "logit_scale": "logit_scale",
        "logit_bias": "logit_bias",
        "vision_model.embeddings.position_embedding.weight": "visual.trunk.pos_embed",
        "vision_model.embeddings.patch_embedding.weight": "visual.trunk.patch_embed.proj.weight",
        "vision_model.embeddings.patch_embedding.bias": "visual.trunk.patch_embed.proj.bias",
        "vision_model.post_layernorm.weight": "visual.trunk.norm.weight",
        "vision_model.post_layernorm.bias": "visual.trunk.norm.bias",
        "vision_model.head.probe": "visual.trunk.attn_pool.latent",
        "vision_model.head.attention.out_proj.weight": "visual.trunk.attn_pool.proj.weight",
        "vision_model.head.attention.out_proj.bias": "visual.trunk.attn_pool.proj.bias",
        "vision_model.head.layernorm.weight": "visual.trunk.attn_pool.norm.weight",
        "vision_model.head.layernorm.bias": "visual.trunk.attn_pool.norm.bias",
        "vision_model.head.mlp.fc1.weight": "visual.trunk.attn_pool.mlp.fc1.weight",
        "vision_model.head.mlp.fc1.bias": "visual.trunk.attn_pool.mlp.fc1.bias",
        "vision_model.head.mlp.fc2.weight": "visual.trunk.attn_pool.mlp.fc2.weight",
        "vision_model.head.mlp.fc2.bias": "visual.trunk.attn_pool.mlp.fc2.bias",
        "text_model.embeddings.token_embedding.weight": "text.token_embedding.weight",
        "text_model.embeddings.position_embedding.weight": "text.positional_embedding",
        "text_model.final_layer_norm.weight": "text.ln_final.weight",
        "text_model.final_layer_norm.bias": "text.ln_final.bias",
        "text_model.head.weight": "text.text_projection.weight",
        "text_model.head.bias": "text.text_projection.bias",
    },
}
OPEN_CLIP_BLOCK = {"layer_norm1": "ln_1.", "layer_norm2": "ln_2.", "mlp.fc1": "mlp.c_fc.", "mlp.fc2": "mlp.c_proj.",
                   "self_attn.out_proj": "attn.out_proj.", "self_attn.qkv": "attn.in_proj_"}
TIMM_BLOCK = {"layer_norm1": "norm1.", "layer_norm2": "norm2.", "mlp.fc1": "mlp.fc1.", "mlp.fc2": "mlp.fc2.",
              "self_attn.out_proj": "attn.proj.", "self_attn.qkv": "attn.qkv."}
BLOCKS = {
    "clip": {"vision_model": ("visual.transformer.resblocks", OPEN_CLIP_BLOCK),
             "text_model": ("transformer.resblocks", OPEN_CLIP_BLOCK)},
    "siglip": {"vision_model": ("visual.trunk.blocks", TIMM_BLOCK),
               "text_model": ("text.transformer.resblocks", OPEN_CLIP_BLOCK)},
}
LAYER = re.compile(r"(vision_model|text_model)\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)")
POOL_IN_PROJ = "vision_model.head.attention.in_proj_"


def open_clip_weights(weights: Mapping[str, Tensor], model_type: str) -> dict[str, Tensor]:
    """Rename the tensors of a transformers CLIPModel or SiglipModel to open_clip's state dict, in fp32.

    Args:
      weights: State dict of the whole model, any float type; the buffers `position_ids` of old files are left out.
      model_type: "clip" or "siglip".

    Returns:
      Keys and shapes of open_clip's CLIP or, for SigLIP, CustomTextCLIP with a timm image tower.

    Raises:
      ValueError: a tensor is none of the model's.
    """
    converted: dict[str, Tensor] = {}
    for name, tensor in _with_joined_qkv(weights).items():
        tensor = tensor.float()
        layer = LAYER.fullmatch(name)
        if name.endswith("position_ids"):
            continue
        if name in TENSORS[model_type]:
            new_name = TENSORS[model_type][name]
            converted[new_name] = _in_shape(new_name, tensor)
        elif layer and layer[3] in OPEN_CLIP_BLOCK:
            prefix, block = BLOCKS[model_type][layer[1]]
            converted[f"{prefix}.{layer[2]}.{block[layer[3]]}{layer[4]}"] = tensor
        elif name.startswith(POOL_IN_PROJ) and model_type == "siglip":
            kind = name.removeprefix(POOL_IN_PROJ)  # weight (3 width, width) or bias (3 width): q, k, v
            width = len(tensor) // 3
            converted[f"visual.trunk.attn_pool.q.{kind}"] = tensor[:width]
            converted[f"visual.trunk.attn_pool.kv.{kind}"] = tensor[width:]
        else:
            raise ValueError(f"the weights hold {name}, which is no tensor of a transformers {model_type} model; give the "
                             "folder of a whole model")
    return converted


def transformers_weights(weights: Mapping[str, Tensor], model_type: str) -> dict[str, Tensor]:
    """Rename the tensors of open_clip's state dict to a transformers CLIPModel's or SiglipModel's, in fp32.

    Args:
      weights: State dict of a CLIP or a CustomTextCLIP, or a part of it: one tower's tensors give that tower's. The prefix
        "text." of CustomTextCLIP may be there or not.
      model_type: "clip" or "siglip".

    Returns:
      What `open_clip_weights` turns into `weights`; no tensor shares memory with them.

    Raises:
      ValueError: a tensor has no place in that model.
    """
    modules = {new.removeprefix("text."): old for old, new in TENSORS[model_type].items()}
    converted: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        name, tensor = name.removeprefix("text."), tensor.float()
        layer = _layer_name(name, model_type)
        kind = name.rpartition(".")[2]  # weight or bias
        if name in modules:
            converted[modules[name]] = _out_of_shape(modules[name], tensor, model_type)
        elif layer and ".qkv." in layer:
            parts = zip("qkv", tensor.chunk(3), strict=True)  # each (width, width) or (width)
            converted |= {layer.replace(".qkv.", f".{part}_proj."): rows for part, rows in parts}
        elif layer:
            converted[layer] = tensor
        elif name.startswith("visual.trunk.attn_pool.q.") and model_type == "siglip":
            converted[POOL_IN_PROJ + kind] = torch.cat([tensor, weights[name.replace(".q.", ".kv.")].float()])
        elif not (name.startswith("visual.trunk.attn_pool.kv.") and model_type == "siglip"):
            raise ValueError(f"the model holds {name} {tuple(tensor.shape)}, which has no place in a transformers {model_type} "
                             "model; use format=open_clip or format=onnx")
    return {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in converted.items()}


def _layer_name(name: str, model_type: str) -> str | None:
    """The transformers name of a block's tensor, with `qkv` where transformers has three; None if it is no block's."""
    for tower, (prefix, block) in BLOCKS[model_type].items():
        inside = re.fullmatch(re.escape(prefix.removeprefix("text.")) + r"\.(\d+)\.(.+[._])(weight|bias)", name)
        module = inside and next((old for old, new in block.items() if new == inside[2]), None)
        if inside and module:
            return f"{tower}.encoder.layers.{inside[1]}.{module}.{inside[3]}"
    return None


def _with_joined_qkv(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Put q_proj, k_proj and v_proj of a layer, each (width, width) or (width), below each other as `qkv`."""
    joined = {}
    for name, tensor in weights.items():
        if ".self_attn.q_proj." in name:
            parts = [weights.get(name.replace(".q_proj.", f".{part}_proj.")) for part in "qkv"]
            if any(part is None for part in parts):
                raise ValueError(f"the weights hold {name}, but not the k_proj and v_proj of that layer")
            joined[name.replace(".q_proj.", ".qkv.")] = torch.cat([part for part in parts if part is not None])
        elif ".self_attn.k_proj." not in name and ".self_attn.v_proj." not in name:
            joined[name] = tensor
    return joined


def _in_shape(new_name: str, tensor: Tensor) -> Tensor:
    if new_name in ("visual.proj", "text_projection"):
        return tensor.T.contiguous()  # open_clip multiplies from the right: (width, D)
    if new_name == "visual.trunk.pos_embed":
        return tensor[None]  # (1, h * w, width)
    return tensor.reshape(()) if new_name in ("logit_scale", "logit_bias") else tensor


def _out_of_shape(new_name: str, tensor: Tensor, model_type: str) -> Tensor:
    if new_name in ("visual_projection.weight", "text_projection.weight"):
        return tensor.T  # (D, width)
    if new_name == "vision_model.embeddings.position_embedding.weight":
        return tensor.reshape(-1, tensor.shape[-1])  # (h * w, width)
    if new_name in ("logit_scale", "logit_bias"):
        return tensor.reshape(() if model_type == "clip" else (1,))
    return tensor
