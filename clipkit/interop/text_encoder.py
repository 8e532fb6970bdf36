"""The text-encoder folder: CLIPTextModelWithProjection and CLIPTokenizer, as every diffusers pipeline reads them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipkit.config.export import ExportConfig
from clipkit.interop.clip_tokenizer_folder import write_clip_tokenizer
from clipkit.interop.provenance import require
from clipkit.interop.self_check import CLEANING, check_close, check_token_ids, text_states
from clipkit.interop.single_file import write_single_file
from clipkit.interop.to_transformers_text import clip_text_config, text_tower, text_weights
from clipkit.interop.transformers_weights import transformers_weights
from clipkit.model.image_text import ImageTextModel


def write_text_encoder(model: ImageTextModel, folder: Path, config: ExportConfig) -> dict[str, Any]:
    """Write a model's text tower for transformers, load it from there and compare it with the tower.

    Under layer=penultimate the last layer is left out and the final norm stays: the folder's last hidden state is then that
    of the layer before, normalised, which is what Stable Diffusion 2 reads; its projected output is no CLIP feature.

    Args:
      model: On the CPU, fp32.
      folder: Exists and is empty.
      config: layer, pad_token_id, single_file and single_file_dtype are read.

    Returns:
      What clipkit_export.json says of it.

    Raises:
      ValueError: transformers cannot represent the tower, or what was written gives other values.
    """
    require("transformers")
    described = clip_text_config(model.towers, model.config["model_cfg"]["text_cfg"], model.tokenize.tokenizer)
    num_layers = described["num_hidden_layers"]
    weights = transformers_weights(text_weights(model.towers), "clip")
    if config.layer == "penultimate":
        if num_layers < 2:
            raise ValueError("layer=penultimate needs a text tower of 2 layers or more, and this one has "
                             f"{num_layers}; use layer=last")
        described["num_hidden_layers"] = num_layers - 1
        last = f"text_model.encoder.layers.{num_layers - 1}."
        weights = {name: tensor for name, tensor in weights.items() if not name.startswith(last)}
    _save(folder, described | {"pad_token_id": config.pad_token_id}, weights)
    tokenizer = write_clip_tokenizer(folder, context_length=described["max_position_embeddings"],
                                     pad_token_id=config.pad_token_id)
    tokens = check_token_ids(tokenizer, model)  # (B, L)
    facts = {"layer": config.layer, "layers": described["num_hidden_layers"], "layers_of_the_tower": num_layers,
             "pad_token_id": config.pad_token_id, "cleaning": CLEANING,
             "greatest_differences": _compare(folder, model, tokens, described["num_hidden_layers"])}
    if config.single_file:
        facts["single_file"] = write_single_file(folder, weights, described, config.single_file_dtype)
        facts["notes"] = [f"{facts['single_file']['file']} does not fit the place {place}: {against}"
                          for place, against in facts["single_file"]["misfits"].items()]
    return facts


def _save(folder: Path, described: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    theirs = CLIPTextModelWithProjection(CLIPTextConfig(**described))
    theirs.load_state_dict(weights)
    theirs.save_pretrained(folder)


def _compare(folder: Path, model: ImageTextModel, tokens: Tensor, num_layers: int) -> dict[str, float]:
    """Load the folder and compare all that it gives for token ids (B, L). Greatest difference by place."""
    from transformers import CLIPTextModelWithProjection

    theirs = CLIPTextModelWithProjection.from_pretrained(folder).eval()
    ours = text_states(model.towers, tokens, num_layers)
    with torch.no_grad():
        given = theirs(tokens, output_hidden_states=True)
        pooled = theirs.text_model(tokens).pooler_output  # (B, W)
        features = model.towers.encode_text(tokens)  # (B, D), not normalised
    found: dict[str, float] = {}
    for layer, (hidden, wanted) in enumerate(zip(given.hidden_states, ours.hidden, strict=True)):
        check_close("hidden_states", hidden, wanted, found, detail=f"[{layer}]")
    check_close("hidden_states[-2]", given.hidden_states[-2], ours.hidden[-2], found)
    check_close("last_hidden_state", given.last_hidden_state, ours.last, found)
    check_close("pooler_output", pooled, ours.pooled, found)
    check_close("text_embeds", given.text_embeds, ours.projected, found)
    if num_layers == len(text_tower(model.towers).transformer.resblocks):
        check_close("encode_text", given.text_embeds, features, found)
    return found
