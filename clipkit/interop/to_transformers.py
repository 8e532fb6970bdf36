"""A whole model as transformers' CLIPModel or SiglipModel with its processor: written, loaded by transformers, compared."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipkit.config.export import ExportConfig
from clipkit.interop.clip_tokenizer_folder import write_clip_tokenizer
from clipkit.interop.fixed_pictures import fixed_pictures
from clipkit.interop.provenance import require
from clipkit.interop.self_check import ATOL, CLEANING, TEXTS, check_close, check_token_ids, text_states
from clipkit.interop.to_transformers_image import clip_vision_config, image_processor_config, is_siglip, siglip_configs
from clipkit.interop.to_transformers_text import clip_text_config
from clipkit.interop.transformers_weights import transformers_weights
from clipkit.model.image_text import ImageTextModel, stack_images

# torchvision, which transformers 5 resizes with by default, rounds weights and bytes otherwise than Pillow.
LEVELS = 2.01  # of 255


def write_transformers(model: ImageTextModel, folder: Path, config: ExportConfig) -> dict[str, Any]:
    """Write a model for transformers, load it from there and compare.

    Args:
      model: On the CPU, fp32.
      folder: Exists and is empty.
      config: pad_token_id is read.

    Returns:
      What clipkit_export.json says of it.

    Raises:
      ValueError: transformers cannot represent the model, or what was written gives other values.
    """
    require("transformers")
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, SiglipConfig, SiglipModel

    model_cfg, towers = model.config["model_cfg"], model.towers
    processor = image_processor_config(model.config["preprocess_cfg"])
    if is_siglip(towers):
        model_type, model_class = "siglip", SiglipModel
        vision, text = siglip_configs(towers, model_cfg)
        special: Any = model.tokenize.tokenizer
        text |= {name: getattr(special.tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
        described = SiglipConfig(vision_config=vision, text_config=text)
    else:
        model_type, model_class = "clip", CLIPModel
        vision = clip_vision_config(towers, model_cfg)
        text = clip_text_config(towers, model_cfg["text_cfg"], model.tokenize.tokenizer)
        described = CLIPConfig(vision_config=vision, text_config=text | {"pad_token_id": config.pad_token_id},
                               projection_dim=vision["projection_dim"])
    _save(folder, model_class, described, transformers_weights(towers.state_dict(), model_type))
    CLIPImageProcessor(**processor).save_pretrained(folder)
    theirs = model_class.from_pretrained(folder).eval()
    found: dict[str, float] = {}
    if model_type == "clip":
        tokenizer = write_clip_tokenizer(folder, context_length=model.tokenize.context_length, pad_token_id=config.pad_token_id)
        tokens = check_token_ids(tokenizer, model)  # (B, L)
        _compare_text_states(theirs, model, tokens, found)
    else:
        tokens = _write_siglip_tokenizer(folder, model)  # (B, L)
    _compare(theirs, model, tokens, found)
    _compare_pictures(folder, model, found)
    notes = ["preprocessing agrees within 2 of 255 levels (torchvision) or exactly (AutoImageProcessor with backend='pil'); "
             "where an odd number of pixels is cropped, transformers cuts one pixel apart"]
    if model_type == "siglip" and processor["do_center_crop"]:
        notes.append("SiglipProcessor of transformers 4 cannot crop: take AutoImageProcessor and AutoTokenizer there")
    return {"model_class": model_class.__name__, "greatest_differences": found, "notes": notes,
            **({"pad_token_id": config.pad_token_id, "cleaning": CLEANING} if model_type == "clip" else {})}


def _save(folder: Path, model_class: Any, described: Any, weights: dict[str, Tensor]) -> None:
    with torch.device("meta"):  # no time for random weights that are replaced
        theirs = model_class(described)
    theirs.load_state_dict(weights, assign=True)
    theirs.save_pretrained(folder)


def _write_siglip_tokenizer(folder: Path, model: ImageTextModel) -> Tensor:
    """Write the tokenizer with the model's context length; compare it on cleaned texts. Returns ids (B, L)."""
    from transformers import AutoTokenizer

    ours: Any = model.tokenize.tokenizer
    length = model.tokenize.context_length
    model.tokenize.save(folder)
    # A SigLIP reads its padding: an attention mask, which other tokenizers give beside the ids, would make another function.
    AutoTokenizer.from_pretrained(folder, model_max_length=length, model_input_names=["input_ids"]).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer([ours.clean_fn(text) for text in TEXTS], padding="max_length", truncation=True,
                       return_tensors="pt").input_ids  # (B, L)
    check_close("token ids", tokens, model.tokenize(TEXTS), {}, atol=0)
    return tokens


def _compare_text_states(theirs: Any, model: ImageTextModel, tokens: Tensor, found: dict[str, float]) -> None:
    """Compare what the text tower gives for tokens (B, L) on the way to its features."""
    ours = text_states(model.towers, tokens)
    with torch.no_grad():
        given = theirs.text_model(tokens, output_hidden_states=True)
        projected = theirs.text_projection(given.pooler_output)  # (B, D)
    for layer, (hidden, wanted) in enumerate(zip(given.hidden_states, ours.hidden, strict=True)):
        check_close("hidden_states", hidden, wanted, found, detail=f"[{layer}]")
    check_close("last_hidden_state", given.last_hidden_state, ours.last, found)
    check_close("pooler_output", given.pooler_output, ours.pooled, found)
    check_close("text_projection", projected, ours.projected, found)


def _compare(theirs: Any, model: ImageTextModel, tokens: Tensor, found: dict[str, float]) -> None:
    """Compare features and logits for the fixed pictures and tokens (B, L)."""
    images = stack_images(model, fixed_pictures())  # (N, 3, H, W)
    with torch.no_grad():
        given = theirs(pixel_values=images, input_ids=tokens)
        ours = model(images, tokens)
    logits = ours.logit_scale * ours.image_features @ ours.text_features.T + (ours.logit_bias or 0)  # (N, B)
    check_close("image_embeds", given.image_embeds, ours.image_features, found)
    check_close("text_embeds", given.text_embeds, ours.text_features, found)
    check_close("logits_per_image", given.logits_per_image, logits, found, atol=ATOL * max(1.0, ours.logit_scale.item()))


def _compare_pictures(folder: Path, model: ImageTextModel, found: dict[str, float]) -> None:
    """Compare the written image processor with the model's own preprocessing, pixel by pixel."""
    from transformers import AutoImageProcessor

    processor = AutoImageProcessor.from_pretrained(folder)
    level = 1 / 255 / model.std.min().item()
    for picture in fixed_pictures():
        pixels = processor(picture, return_tensors="pt").pixel_values[0]  # (3, H, W)
        check_close("pixel_values", pixels, model.preprocess(picture), found, atol=LEVELS * level)
