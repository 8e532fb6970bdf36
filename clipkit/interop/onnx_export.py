"""A model's two encoders as ONNX files, with the tokenizer and what a user of them has to know beside them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipkit.config.export import ExportConfig
from clipkit.interop.clip_tokenizer_folder import write_clip_tokenizer
from clipkit.interop.fixed_pictures import fixed_pictures
from clipkit.interop.onnx_file import write_onnx
from clipkit.interop.provenance import require
from clipkit.interop.self_check import TEXTS, check_close, check_token_ids
from clipkit.interop.to_transformers_text import refuse_tokenizer, text_tower
from clipkit.model.image_text import ImageTextModel, stack_images
from clipkit.training.atomic_files import write_text_atomically

IMAGE_FILE, TEXT_FILE, SETTINGS_FILE = "image_encoder.onnx", "text_encoder.onnx", "clipkit_onnx.json"


class ImageEncoder(nn.Module):
    """Preprocessed pictures (B, 3, H, W) to features (B, D) of unit norm."""

    def __init__(self, towers: Any) -> None:
        super().__init__()
        self.towers = towers

    def forward(self, pixel_values: Tensor) -> Tensor:
        return F.normalize(self.towers.encode_image(pixel_values), dim=-1)


class TextEncoder(nn.Module):
    """Token ids (B, L) to features (B, D) of unit norm; L may be any length up to the context if the tower ends at its text.

    Args:
      towers: open_clip's CLIP or CustomTextCLIP.
      text_cfg: What the text tower was made from.
    """

    def __init__(self, towers: Any, text_cfg: Mapping[str, Any]) -> None:
        super().__init__()
        self.towers = towers
        self.pool_type = text_cfg.get("pool_type", "argmax")
        bag = text_cfg.get("kind") == "cbow"
        causal = not (bag or text_cfg.get("hf_model_name") or text_cfg.get("no_causal_mask") or text_cfg.get("embed_cls"))
        self.cuts = causal and self.pool_type in ("argmax", "eos")
        self.any_length = self.cuts or bag

    def forward(self, input_ids: Tensor) -> Tensor:
        features = self._encode_cut(input_ids) if self.cuts else self.towers.encode_text(input_ids)  # (B, D)
        return F.normalize(features, dim=-1)

    def _encode_cut(self, input_ids: Tensor) -> Tensor:
        """What encode_text gives, with positions and mask cut to the texts' length."""
        from open_clip.transformer import text_global_pool

        text, length = text_tower(self.towers), input_ids.shape[1]
        states = text.token_embedding(input_ids) + text.positional_embedding[:length]  # (B, L, W)
        states = text.ln_final(text.transformer(states, attn_mask=text.attn_mask[:length, :length]))
        eos_id = getattr(text, "eos_id", getattr(text, "text_eos_id", None))
        pooled: Tensor = text_global_pool(states, input_ids, self.pool_type, eos_token_id=eos_id)  # (B, W)
        projection = text.text_projection
        if projection is None:
            return pooled
        return projection(pooled) if isinstance(projection, nn.Linear) else pooled @ projection


def write_onnx_folder(model: ImageTextModel, folder: Path, config: ExportConfig) -> dict[str, Any]:
    """Write both encoders, each compared in ONNX Runtime with the model, and the tokenizer.

    Args:
      model: On the CPU, fp32.
      folder: Exists and is empty.
      config: Not read: the format has no choices.

    Returns:
      What clipkit_export.json says of it.

    Raises:
      ValueError: a package is missing, or ONNX Runtime gives other values.
    """
    text_cfg = model.config["model_cfg"]["text_cfg"]
    length = _write_tokenizer(model, folder)
    images = stack_images(model, fixed_pictures())  # (N, 3, H, W)
    tokens = model.tokenize(TEXTS).long()  # (B, L)
    image_encoder, text_encoder = ImageEncoder(model.towers).eval(), TextEncoder(model.towers, text_cfg).eval()
    found: dict[str, float] = {}
    text_examples = [tokens, tokens[:1]]
    if text_encoder.any_length:
        short = tokens[:1, :max(2, length // 2)]  # of the empty text
        with torch.no_grad():
            check_close("trimmed text", text_encoder(short), model.encode_text(tokens[:1]), found)
        text_examples.append(short)
    found["image_embeds"] = write_onnx(image_encoder, [images, images[:1]], folder / IMAGE_FILE, input_name="pixel_values",
                                       output_name="image_embeds", dynamic={0: "batch"})
    found["text_embeds"] = write_onnx(text_encoder, text_examples, folder / TEXT_FILE, input_name="input_ids",
                                      output_name="text_embeds",
                                      dynamic={0: "batch", 1: "length"} if text_encoder.any_length else {0: "batch"})
    with torch.no_grad():
        ours = model(images, tokens)
        check_close("image features", image_encoder(images), ours.image_features, found)
        check_close("text features", text_encoder(tokens), ours.text_features, found)
    settings = {"preprocess_cfg": model.config["preprocess_cfg"], "context_length": length,
                "text_lengths": f"1 to {length}" if text_encoder.any_length else f"{length} only",
                "logit_scale": ours.logit_scale.item(),
                "logit_bias": None if ours.logit_bias is None else ours.logit_bias.item()}
    write_text_atomically(folder / SETTINGS_FILE, json.dumps(settings, indent=2) + "\n")
    return {"files": [IMAGE_FILE, TEXT_FILE], "text_lengths": settings["text_lengths"], "greatest_differences": found}


def _write_tokenizer(model: ImageTextModel, folder: Path) -> int:
    """Write the tokenizer's files. Returns the context length."""
    length = model.tokenize.context_length
    if getattr(model.tokenize.tokenizer, "tokenizer", None) is not None:
        model.tokenize.save(folder)
        return length
    require("transformers")
    refuse_tokenizer(model.tokenize.tokenizer)
    check_token_ids(write_clip_tokenizer(folder, context_length=length), model)
    return length
