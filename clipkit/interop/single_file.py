"""A text encoder as one safetensors file under transformers' names, as ComfyUI-style tools and SD 3 and Flux users swap it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DTYPES = {"fp16": torch.float16, "fp32": torch.float32}
# Place in the pipelines -> file name, and what a tower in it has to be: such files carry no configuration, so that their
# readers take all of this, the activation too, for granted.
PLACES: dict[str, tuple[str, dict[str, Any]]] = {
    "CLIP-L": ("clip_l.safetensors", {
        "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
        "projection_dim": 768, "max_position_embeddings": 77, "vocab_size": 49408, "hidden_act": "quick_gelu"}),
    "bigG": ("clip_g.safetensors", {
        "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20,
        "projection_dim": 1280, "max_position_embeddings": 77, "vocab_size": 49408, "hidden_act": "gelu"}),
}


def write_single_file(folder: Path, weights: Mapping[str, Tensor], described: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """Write the tensors as one file and read it back.

    Args:
      folder: Exists.
      weights: State dict of a CLIPTextModelWithProjection, fp32.
      described: The arguments of its CLIPTextConfig; they say which place it fits.
      dtype: "fp16" or "fp32".

    Returns:
      File name, dtype, place (None where it fits none) and, for each place, what first stands against it.

    Raises:
      ValueError: a number is beyond the range of the dtype.
    """
    from safetensors.torch import load_file, save_file

    differing = {place: [key for key, wanted in wants.items() if described[key] != wanted]
                 for place, (_, wants) in PLACES.items()}
    place = next((place for place, keys in differing.items() if not keys), None)
    misfits = {} if place else {one: f"{keys[0]} is {described[keys[0]]}, not {PLACES[one][1][keys[0]]}"
                                for one, keys in differing.items()}
    name = PLACES[place][0] if place else "text_encoder.safetensors"
    tensors = {key: tensor.to(DTYPES[dtype]).contiguous() for key, tensor in weights.items()}
    beyond = next((key for key, tensor in tensors.items() if not tensor.isfinite().all()), None)
    if beyond is not None:
        raise ValueError(f"{beyond} has numbers that {dtype} cannot hold; use single_file_dtype=fp32")
    save_file(tensors, folder / name, metadata={"format": "pt"})
    again = load_file(folder / name)
    if again.keys() != tensors.keys() or not all(torch.equal(again[key], tensor) for key, tensor in tensors.items()):
        raise ValueError(f"nothing was written: {name} does not read back as it was written; the disk may be damaged")
    return {"file": name, "dtype": dtype, "place": place, "misfits": misfits}
