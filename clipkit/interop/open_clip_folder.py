"""The model folder from any source, loaded by open_clip itself and compared."""

from pathlib import Path
from typing import Any

import torch

from clipkit.config.export import ExportConfig
from clipkit.interop.fixed_pictures import fixed_pictures
from clipkit.interop.self_check import TEXTS, check_close
from clipkit.model.folder import save_model_folder
from clipkit.model.image_text import ImageTextModel, stack_images

ACTIVATION_ATOL = 1e-2  # a timm tower whose activation open_clip does not read: 2e-4 seen with random weights


def write_open_clip(model: ImageTextModel, folder: Path, config: ExportConfig) -> dict[str, Any]:
    """Write open_clip's local-dir format, load it with open_clip and compare.

    Args:
      model: On the CPU, fp32.
      folder: Exists and is empty.
      config: Not read: the format has no choices.

    Returns:
      What clipkit_export.json says of it.

    Raises:
      ValueError: open_clip cannot represent the model, or gives other values.
    """
    from open_clip import create_model_and_transforms, get_tokenizer

    model_cfg = model.config["model_cfg"]
    if model_cfg["text_cfg"].get("kind") == "cbow":
        raise ValueError("text_cfg.kind is 'cbow', which open_clip cannot load; the run's model folder is clipkit's own, use "
                         "format=onnx for other libraries")
    save_model_folder(model, folder)
    loaded: Any = create_model_and_transforms(f"local-dir:{folder}")
    theirs, _, preprocess = loaded
    tokens = get_tokenizer(f"local-dir:{folder}")(list(TEXTS))  # (B, L)
    found: dict[str, float] = {}
    check_close("token ids", tokens, model.tokenize(TEXTS), found, atol=0)
    images = stack_images(model, fixed_pictures())  # (N, 3, H, W)
    check_close("preprocessing", torch.stack([preprocess(picture) for picture in fixed_pictures()]), images, found, atol=0)
    unread = model_cfg["vision_cfg"].get("timm_model_name") and model_cfg["vision_cfg"].get("act_kwargs")
    with torch.no_grad():
        check_close("image_features", theirs.eval().encode_image(images, normalize=True), model.encode_image(images), found,
                    atol=ACTIVATION_ATOL if unread else 1e-5)
        check_close("text_features", theirs.encode_text(tokens, normalize=True), model.encode_text(tokens), found)
        check_close("logit_scale", theirs.logit_scale, model.towers.logit_scale, found)
    note = "open_clip does not read vision_cfg.act_kwargs of a timm tower and takes exact GELU; clipkit reads it"
    return {"greatest_differences": found, **({"notes": [note]} if unread else {})}
