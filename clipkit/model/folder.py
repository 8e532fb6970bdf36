"""The model folder (open_clip's local-dir format): write it, and load a model from a run, a folder or a name."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from clipkit.data.tokenize import make_tokenizer
from clipkit.model.build import build_model, make_towers
from clipkit.model.image_text import ImageTextModel

CONFIG_NAME = "open_clip_config.json"
WEIGHTS_NAME = "open_clip_model.safetensors"


def save_model_folder(model: ImageTextModel, folder: Path, weights: dict[str, Tensor] | None = None) -> None:
    """Write configuration and tokenizer once; replace the weights in one move.

    Args:
      model: The model whose configuration and weights are written.
      folder: Made if missing.
      weights: Written in the place of the model's own (an average of them, say); keys as in `model.towers`.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / CONFIG_NAME).exists():
        model.tokenize.save(folder)
        _replace(folder / CONFIG_NAME, lambda path: path.write_text(json.dumps(model.config, indent=2) + "\n"))
    tensors = model.towers.state_dict() if weights is None else weights
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    _replace(folder / WEIGHTS_NAME, lambda path: save_file(plain, path, metadata={"format": "pt"}))


def load_model(source: str | Path, *, pretrained: str | None = None, device: str | torch.device = "cpu") -> ImageTextModel:
    """Load a model for use, in evaluation mode.

    Args:
      source: A run folder (runs/emoji), a model folder (runs/emoji/model), or an open_clip name (ViT-B-32).
      pretrained: open_clip tag or weights file, with an open_clip name.
      device: Where the model goes.

    Raises:
      FileNotFoundError: the folder holds no model.
      ValueError: the name or the tag is unknown.
    """
    path = Path(source)
    if path.is_dir():
        model = _load_folder(path / "model" if (path / "model").is_dir() else path)
    elif os.sep in str(source):
        raise FileNotFoundError(f"there is no folder {source}; give a run folder, a model folder or an open_clip name")
    else:
        model = build_model(str(source), pretrained=pretrained)
    return model.to(device).eval()


def _load_folder(folder: Path) -> ImageTextModel:
    from safetensors.torch import load_file

    for name in (CONFIG_NAME, WEIGHTS_NAME):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} has no {name}; give a run folder or a model folder that `clipkit pretrain` "
                                    "or `clipkit export` wrote")
    config = json.loads((folder / CONFIG_NAME).read_text())
    towers = make_towers(config["model_cfg"])
    towers.load_state_dict(load_file(folder / WEIGHTS_NAME))
    model = ImageTextModel(towers, config, make_tokenizer(config["model_cfg"]["text_cfg"], folder))
    model.source_sha256 = _sha256(folder / WEIGHTS_NAME)
    return model


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    """Write beside `path`, then move into its place: a reader sees the old file or the new one."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    write(beside)
    with beside.open("rb") as file:
        os.fsync(file.fileno())
    beside.replace(path)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
