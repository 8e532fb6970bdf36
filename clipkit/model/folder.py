"""The model folder (open_clip's local-dir format): write it, and load a model from a run, a folder or a name."""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipkit.data.hub import MODEL_PREFIX, fetch_model
from clipkit.data.tokenize import Tokenizer, make_tokenizer
from clipkit.interop.clip_bpe import is_clip_bpe, read_bpe
from clipkit.interop.from_transformers import OWN_TOKENIZER, model_cfg_from_transformers, preprocess_cfg_from_transformers
from clipkit.interop.transformers_weights import open_clip_weights
from clipkit.model.build import CONFIG_NAME, build_model, complete_preprocess_cfg, file_sha256, make_towers
from clipkit.model.image_text import ImageTextModel
from clipkit.model.weights_file import read_json_object, read_weights
from clipkit.training.atomic_files import fsync_file, one_line_os_error, remove_quietly

WEIGHTS_NAME = "open_clip_model.safetensors"
OPEN_CLIP_WEIGHTS = (WEIGHTS_NAME, "open_clip_pytorch_model.bin")  # what is read; open_clip wrote the second before
# transformers' names, in the order of preference; an index names the files that the tensors are spread over.
TRANSFORMERS_WEIGHTS = ("model.safetensors", "model.safetensors.index.json",
                        "pytorch_model.bin", "pytorch_model.bin.index.json")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "spiece.model", "tokenizer.model")


def save_model_folder(model: ImageTextModel, folder: Path, weights: dict[str, Tensor] | None = None) -> None:
    """Write configuration and tokenizer once; replace the weights in one move.

    Args:
      model: The model whose configuration and weights are written.
      folder: Made if missing.
      weights: Written in the place of the model's own (an average of them, say); keys as in `model.towers`. Matrices that
        LoRA adapts are written merged, under open_clip's names.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / CONFIG_NAME).exists():
        model.tokenize.save(folder)
        if hasattr(getattr(model.towers, "text", None), "pooler"):  # a Hugging Face text tower has a configuration of its own
            model.towers.text.config.save_pretrained(folder)
        _replace(folder / CONFIG_NAME, lambda path: path.write_text(json.dumps(model.config, indent=2) + "\n"))
    tensors = model.towers.state_dict() if weights is None else weights
    plain = _plain(tensors)
    _replace(folder / WEIGHTS_NAME, lambda path: save_file(plain, path, metadata={"format": "pt"}))


def _plain(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights as open_clip's own model has them: adapted matrices merged, on the CPU."""
    from clipkit.training.lora import merged_weights

    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in merged_weights(weights).items()}
    for name in [name for name in plain if name.endswith(".running_mean")]:  # a frozen norm counts no batches; loaded, it does
        plain.setdefault(name.removesuffix("running_mean") + "num_batches_tracked", torch.zeros((), dtype=torch.int64))
    return plain


def load_model(source: str | Path, *, pretrained: str | None = None, device: str | torch.device = "cpu") -> ImageTextModel:
    """Load a model for use, in evaluation mode.

    Args:
      source: A run folder (runs/emoji), a model folder (runs/emoji/model), a run's checkpoint
        (runs/emoji/checkpoints/step-00000820), a transformers folder of a CLIP or a
        fixed-resolution SigLIP (config.json, weights, preprocessor_config.json, tokenizer), the same on the Hugging Face
        hub (hf-hub:<org>/<name>[@revision]), or an open_clip name (ViT-B-32).
      pretrained: open_clip tag or weights file, with an open_clip name.
      device: Where the model goes.

    Raises:
      FileNotFoundError: the folder holds no model, a part of one is missing, or the hub has no such model or cannot be
        reached.
      ValueError: the name or the tag is unknown, `pretrained` comes with a folder, or open_clip's classes cannot represent
        the model.
    """
    path, on_hub = Path(source), str(source).startswith(MODEL_PREFIX)
    if pretrained is not None and (on_hub or path.is_dir()):
        place = "model" if on_hub else "folder"
        raise ValueError(f"pretrained is {pretrained!r}, but the {place} {source} has its own weights; leave pretrained out")
    if on_hub:
        path = fetch_model(str(source), (*OPEN_CLIP_WEIGHTS, *TRANSFORMERS_WEIGHTS)).folder
    if path.is_dir():
        model = _load_folder(path / "model" if (path / "model").is_dir() else path)
    elif os.sep in str(source):
        raise FileNotFoundError(f"there is no folder {source}; give a run folder, a model folder, a transformers "
                                "folder or an open_clip name")
    else:
        model = build_model(str(source), pretrained=pretrained)
    return model.to(device).eval()


def _load_folder(folder: Path) -> ImageTextModel:
    weights = next((folder / name for name in OPEN_CLIP_WEIGHTS if (folder / name).is_file()), None)
    if (folder / CONFIG_NAME).is_file() and weights is not None:
        config = _read_config(folder / CONFIG_NAME)
        return _assemble(folder, config["model_cfg"], config["preprocess_cfg"], read_weights(weights), file_sha256(weights))
    if (folder / "config.json").is_file():
        return _load_transformers_folder(folder)
    if (folder / "state.json").is_file() and (folder.parent.parent / "model" / CONFIG_NAME).is_file():
        return _load_checkpoint(folder, folder.parent.parent / "model")
    raise FileNotFoundError(f"{folder} holds no model: it has neither {CONFIG_NAME} with {WEIGHTS_NAME} (clipkit, open_clip) "
                            "nor config.json with model.safetensors (a transformers CLIP or SigLIP); give a folder that has")


def _load_checkpoint(folder: Path, model_folder: Path) -> ImageTextModel:
    """The model of a run's checkpoint, whole or in parts: the average of its weights, where it has one."""
    from clipkit.training.checkpoint import load_checkpoint

    config, saved = _read_config(model_folder / CONFIG_NAME), load_checkpoint(folder)
    return _assemble(model_folder, config["model_cfg"], config["preprocess_cfg"], _plain(saved.ema or saved.model),
                     file_sha256(folder / "manifest.json"))


def _read_config(path: Path) -> dict[str, Any]:
    config = {"preprocess_cfg": {}, **read_json_object(path)}
    for name, part in (("model_cfg", config), ("preprocess_cfg", config), ("vision_cfg", config.get("model_cfg")),
                       ("text_cfg", config.get("model_cfg"))):
        if not isinstance(part, dict) or not isinstance(part.get(name), dict):
            raise ValueError(f"{path} is no open_clip configuration (it has no object {name!r}); copy or fetch it again")
    return config


def _load_transformers_folder(folder: Path) -> ImageTextModel:
    config = read_json_object(folder / "config.json")
    try:
        model_cfg = model_cfg_from_transformers(config)
        if not _has_clip_bpe(folder):
            model_cfg["text_cfg"]["hf_tokenizer_name"] = OWN_TOKENIZER
        preprocess_cfg = preprocess_cfg_from_transformers(_image_processor(folder), config["model_type"],
                                                          model_cfg["vision_cfg"]["image_size"])
        files = _weights_files(folder)
        tensors = {name: tensor for path in files for name, tensor in read_weights(path).items()}
        weights = open_clip_weights(tensors, config["model_type"])
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    except (KeyError, TypeError, AttributeError, ArithmeticError) as error:  # a value of another kind than it should be
        raise ValueError(f"{folder}: its configuration cannot be used ({type(error).__name__}: {error}); copy or fetch it again"
                         ) from error
    hashes = [file_sha256(path) for path in files]
    sha256 = hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()
    return _assemble(folder, model_cfg, preprocess_cfg, weights, sha256)


def _assemble(folder: Path, model_cfg: dict[str, Any], preprocess_cfg: Mapping[str, Any], weights: Mapping[str, Tensor],
              sha256: str) -> ImageTextModel:
    towers = _make_towers(_with_own_text_config(model_cfg, folder), folder)
    wanted = towers.state_dict()
    for name in sorted({*wanted, *weights}):
        shapes = [tuple(tensors[name].shape) if name in tensors else "nothing" for tensors in (wanted, weights)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"{folder}: the weights do not fit the configuration: for {name} (open_clip's name) it asks for "
                             f"{shapes[0]}, the weights have {shapes[1]}")
    towers.load_state_dict(weights)
    config = {"model_cfg": model_cfg, "preprocess_cfg": complete_preprocess_cfg(towers, preprocess_cfg)}
    model = ImageTextModel(towers, config, _tokenizer(folder, model_cfg["text_cfg"]))
    model.source_sha256 = sha256
    return model


def _make_towers(model_cfg: dict[str, Any], folder: Path) -> Any:
    try:  # its weights are here: none are fetched
        return make_towers({**model_cfg, "vision_cfg": {**model_cfg["vision_cfg"], "timm_model_pretrained": False}})
    except ValueError:
        raise
    except Exception as error:  # what the libraries make of wrong values can end in any way
        cause = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise ValueError(f"{folder}: its configuration builds no model ({cause}); copy or fetch it again") from error


def _with_own_text_config(model_cfg: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A Hugging Face text tower without weights of its own, built from the config.json beside it rather than by its name."""
    if "hf_model_name" not in model_cfg["text_cfg"]:
        return model_cfg
    beside = {"hf_model_name": str(folder)} if (folder / "config.json").is_file() else {}
    if beside and "auto_map" in read_json_object(folder / "config.json"):
        raise ValueError(f"{folder}/config.json names code of the model's own (auto_map), which is never run; give a model of "
                         "transformers' own classes")
    return {**model_cfg, "text_cfg": {**model_cfg["text_cfg"], **beside, "hf_model_pretrained": False}}


def _tokenizer(folder: Path, text_cfg: Mapping[str, Any]) -> Tokenizer:
    if not text_cfg.get("hf_tokenizer_name"):
        return make_tokenizer(text_cfg, folder)
    try:
        return make_tokenizer(text_cfg, folder)
    except (ImportError, OSError, ValueError) as error:
        cause = str(error).strip().split("\n")[0]
        raise ValueError(f"{folder}: its tokenizer was not loaded ({type(error).__name__}: {cause}); it needs transformers, "
                         'for sentencepiece files two packages more: pip install "clipkit-vl[export]" sentencepiece protobuf'
                         ) from error


def _has_clip_bpe(folder: Path) -> bool:
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise FileNotFoundError(f"{folder} has no tokenizer; looked for {', '.join(TOKENIZER_FILES)}; save the model's "
                                "processor beside it")
    files = read_bpe(folder)
    return files is not None and is_clip_bpe(*files)


def _image_processor(folder: Path) -> dict[str, Any]:
    if (folder / "preprocessor_config.json").is_file():
        return read_json_object(folder / "preprocessor_config.json")
    if (folder / "processor_config.json").is_file():  # transformers 5 writes one file for both sides
        both = read_json_object(folder / "processor_config.json")
        if "image_processor" in both:
            return both["image_processor"]
    raise FileNotFoundError(f"{folder} has no preprocessor_config.json: how pictures are prepared is unknown; save the model's "
                            "processor beside it")


def _weights_files(folder: Path) -> list[Path]:
    found = [folder / name for name in TRANSFORMERS_WEIGHTS if (folder / name).is_file()]
    if not found:
        raise FileNotFoundError(f"{folder} has config.json but no weights; looked for {', '.join(TRANSFORMERS_WEIGHTS)}")
    if found[0].suffix != ".json":
        return found[:1]
    names = sorted(set(map(str, read_json_object(found[0])["weight_map"].values())))
    for name in names:
        if Path(name).name != name or not (folder / name).is_file():
            raise FileNotFoundError(f"{found[0]} names {name}, which is no file of the folder; fetch the missing part")
    return [folder / name for name in names]


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    """Write beside `path`, then move into its place: a reader sees the old file or the new one.

    Raises:
      OSError: it cannot be written (the old one stays); one line.
    """
    beside = path.with_name(f".tmp-{path.name}")  # always one name: what a killed process left is written over
    try:
        remove_quietly(beside)  # a link that stands there would be followed
        write(beside)
        fsync_file(beside)
        beside.replace(path)
    except Exception as error:
        remove_quietly(beside)
        if isinstance(error, OSError) or type(error).__name__ == "SafetensorError":
            raise one_line_os_error(error, path) from error
        raise
