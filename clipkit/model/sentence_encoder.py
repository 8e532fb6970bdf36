"""Sentence encoders of the kind that sentence-transformers writes, as Hugging Face text towers of open_clip."""

import contextlib
import importlib.util
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

SENTENCE_PREFIX = "sentence:"
# What 1_Pooling/config.json says (the long names before sentence-transformers 5.2) -> open_clip's pooler.
POOLERS = {"mean": "mean_pooler", "pooling_mode_mean_tokens": "mean_pooler", "cls": "cls_last_hidden_state_pooler",
           "pooling_mode_cls_token": "cls_last_hidden_state_pooler"}
TRANSFORMER_SHAPE = ("vocab_size", "width", "heads", "layers")
MODULES = ("Transformer", "Pooling", "Normalize")  # of a sentence encoder; others (Dense) have no place in open_clip's tower


def sentence_text_cfg(source: str, context_length: int) -> tuple[int, dict[str, Any]]:
    """Describe a sentence encoder as an open_clip text_cfg without a projection.

    Args:
      source: an installed package that ships one, or a folder with config.json, weights and tokenizer.
      context_length: tokens of a text; the rest is cut off.

    Returns:
      (width of its features, text_cfg).

    Raises:
      FileNotFoundError: there is no such package or folder.
      ValueError: open_clip's text tower cannot represent it, or it takes fewer tokens.
    """
    from open_clip.hf_configs import arch_dict

    folder = find_sentence_encoder(source)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    kind = config.get("model_type")
    if kind not in arch_dict:
        raise ValueError(f"{folder} is a {kind!r}, which open_clip has no text tower for; choose one of "
                         f"{', '.join(sorted(arch_dict))}")
    names = arch_dict[kind]["config_names"]
    longest = config.get(names["context_length"], context_length)
    if context_length > longest:
        raise ValueError(f"context_length is {context_length}, and {folder} takes at most {longest} tokens; give fewer")
    return config[names["width"]], {"hf_model_name": str(folder), "hf_tokenizer_name": str(folder), "hf_proj_type": None,
                                    "hf_pooler_type": _pooler(folder), "context_length": context_length}


def described_text_cfg(text_cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Complete a text_cfg whose hf_model_name is "sentence:<source>"; what it says itself goes before.

    The shape of a Transformer, as it stays from settings that are merged, is left out: the encoder has its own.

    Raises:
      FileNotFoundError, ValueError: as `sentence_text_cfg` raises them.
    """
    given = {name: value for name, value in text_cfg.items() if name not in ("hf_model_name", *TRANSFORMER_SHAPE)}
    source = text_cfg["hf_model_name"].removeprefix(SENTENCE_PREFIX)
    _, found = sentence_text_cfg(source, given.get("context_length", 77))
    return {**found, "hf_proj_type": "linear", **given}


def find_sentence_encoder(source: str) -> Path:
    """Find the folder of a sentence encoder: given itself, or inside an installed package."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        found = [folder] if (folder / "config.json").is_file() else []
    else:
        spec = importlib.util.find_spec(source.replace("-", "_")) if source.replace("-", "_").isidentifier() else None
        if spec is None or not spec.submodule_search_locations:
            raise FileNotFoundError(f"text is sentence:{source}, which is neither a folder nor an installed package; run: "
                                    f"pip install {source}")
        found = [path.parent for path in sorted(Path(spec.submodule_search_locations[0]).rglob("config.json"))
                 if any(path.parent.glob("*.safetensors"))]
    if len(found) != 1:
        raise FileNotFoundError(f"{source} holds {len(found)} models (config.json with weights); give sentence:<folder> of one")
    return found[0].resolve()


def _pooler(folder: Path) -> str:
    """open_clip's name of the pooling; the mean where nothing is said."""
    modules = folder / "modules.json"
    kinds = [one["type"].rpartition(".")[2] for one in json.loads(modules.read_text())] if modules.is_file() else []
    foreign = [kind for kind in kinds if kind not in MODULES]
    if foreign:
        raise ValueError(f"{folder} has a module {foreign[0]!r}, which open_clip's text tower has no place for; choose a "
                         f"sentence encoder of {', '.join(MODULES)} alone")
    file = folder / "1_Pooling" / "config.json"
    said = json.loads(file.read_text()) if file.is_file() else {"pooling_mode": "mean"}
    chosen = said.get("pooling_mode") or [mode for mode, on in said.items() if mode.startswith("pooling_mode_") and on]
    names = [chosen] if isinstance(chosen, str) else chosen
    if len(names) != 1 or names[0] not in POOLERS:
        raise ValueError(f"{file} asks for the pooling {', '.join(names) or 'none'}; open_clip's text tower has one of "
                         f"{', '.join(POOLERS)}")
    return POOLERS[names[0]]


@contextlib.contextmanager
def silent_loading() -> Iterator[None]:
    """transformers draws a progress bar for the weights that it reads, and lists the pooler that no one asked for."""
    try:
        from transformers.utils import logging
    except ImportError as error:
        raise ValueError('a sentence encoder is read by transformers, which is not installed: pip install "clipkit-vl[export]"'
                         ) from error
    shown, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shown:
            logging.enable_progress_bar()
