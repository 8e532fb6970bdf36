"""The lines that load an export in each library that can: for its README, to be run inside the folder."""

from collections.abc import Mapping
from typing import Any

DIFFUSERS = '''
from transformers import CLIPTextModel, CLIPTokenizer

parts = {"text_encoder": CLIPTextModel.from_pretrained("."), "tokenizer": CLIPTokenizer.from_pretrained(".")}
# StableDiffusionPipeline.from_pretrained("<a pipeline trained with this text encoder>", **parts)
'''
TEXT_ENCODER = {
    "transformers": '''
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

tokenizer = CLIPTokenizer.from_pretrained(".")
text_encoder = CLIPTextModelWithProjection.from_pretrained(".")
tokens = tokenizer(["a red square"], padding="max_length", truncation=True, return_tensors="pt").input_ids
text_features = text_encoder(tokens).text_embeds  # (1, D), not normalised
''',
    "diffusers": DIFFUSERS,
}
TRANSFORMERS = {
    "transformers": '''
from PIL import Image
from transformers import pipeline

classify = pipeline("zero-shot-image-classification", model=".")
labels = ["a red square", "a blue circle"]
print(classify(Image.open("picture.png"), candidate_labels=labels, hypothesis_template="{}"))
''',
    "clipkit": '''
import clipkit

model = clipkit.load_model(".")
text_features = model.encode_text(model.tokenize(["a red square"]))  # (1, D), unit norm
''',
}
# Only of a CLIP: diffusers' pipelines take no SigLIP text tower, and sentence-transformers pads SigLIP's texts otherwise.
CLIP_ONLY = {
    "sentence-transformers": '''
from sentence_transformers import SentenceTransformer

model = SentenceTransformer(".")
text_features = model.encode(["a red square"], normalize_embeddings=True)  # (1, D)
''',
    "diffusers": DIFFUSERS,
}
OPEN_CLIP = {
    "open_clip": '''
import open_clip

model, _, preprocess = open_clip.create_model_and_transforms("local-dir:.")
tokenize = open_clip.get_tokenizer("local-dir:.")
text_features = model.eval().encode_text(tokenize(["a red square"]), normalize=True)  # (1, D), unit norm
''',
    "clipkit": TRANSFORMERS["clipkit"],
}
ONNX_RUNTIME = '''
import json
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image
from transformers import AutoTokenizer

settings = json.loads(Path("clipkit_onnx.json").read_text(encoding="utf-8"))
cfg = settings["preprocess_cfg"]
picture = Image.open("picture.png").convert("RGB")
{resize}
pixel_values = ((np.asarray(picture, np.float32) / 255 - cfg["mean"]) / cfg["std"]).astype(np.float32).transpose(2, 0, 1)[None]
texts = ["a red square", "a blue circle"]
tokenizer = AutoTokenizer.from_pretrained(".")
input_ids = tokenizer(texts, padding="max_length", truncation=True, max_length=settings["context_length"],
                      return_tensors="np").input_ids.astype(np.int64)
image_features = onnxruntime.InferenceSession("image_encoder.onnx").run(None, {{"pixel_values": pixel_values}})[0]  # (1, D)
text_features = onnxruntime.InferenceSession("text_encoder.onnx").run(None, {{"input_ids": input_ids}})[0]  # (2, D)
logits = settings["logit_scale"] * image_features @ text_features.T + (settings["logit_bias"] or 0)  # (1, 2)
'''
RESIZE = {
    "squash": '''picture = picture.resize(({side}, {side}), Image.Resampling.{interpolation})''',
    "shortest": '''short = min(picture.size)
picture = picture.resize([int({side} * length / short) for length in picture.size], Image.Resampling.{interpolation})
left, top = (round((length - {side}) / 2) for length in picture.size)
picture = picture.crop((left, top, left + {side}, top + {side}))''',
}


def loading_code(export_format: str, facts: Mapping[str, Any], preprocess_cfg: Mapping[str, Any]) -> dict[str, str]:
    """Return the code by library.

    Args:
      export_format: A format of `clipkit export`.
      facts: What the format's writer returned.
      preprocess_cfg: The model's.
    """
    if export_format == "onnx":
        return {"ONNX Runtime": ONNX_RUNTIME.format(resize=_resize_code(preprocess_cfg))}
    if export_format == "transformers":
        return TRANSFORMERS | (CLIP_ONLY if facts["model_class"] == "CLIPModel" else {})
    return {"text_encoder": TEXT_ENCODER, "open_clip": OPEN_CLIP}[export_format]


def _resize_code(preprocess_cfg: Mapping[str, Any]) -> str:
    size = preprocess_cfg["size"]
    sides = {size} if isinstance(size, int) else set(size)
    mode = preprocess_cfg["resize_mode"]
    if mode not in RESIZE or len(sides) != 1:
        return f"# resize and pad the picture here: resize_mode {mode!r}, size {size}"
    interpolation = "BILINEAR" if preprocess_cfg["interpolation"] == "bilinear" else "BICUBIC"
    return RESIZE[mode].format(side=sides.pop(), interpolation=interpolation)
