"""What every export has in common: it is written hidden, checked, described, and appears whole or not at all."""

import contextlib
import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from clipkit.config.export import END_OF_TEXT, ExportConfig
from clipkit.config.schema import parse
from clipkit.interop.model_card import model_card
from clipkit.interop.onnx_export import write_onnx_folder
from clipkit.interop.open_clip_folder import write_open_clip
from clipkit.interop.provenance import installed, run_of, source_name, write_provenance
from clipkit.interop.text_encoder import write_text_encoder
from clipkit.interop.to_transformers import write_transformers
from clipkit.interop.whole_folder import refuse_taken, whole_folder
from clipkit.model.folder import load_model
from clipkit.model.image_text import ImageTextModel
from clipkit.model.interpolate import interpolated_model
from clipkit.training.atomic_files import write_text_atomically

FORMATS: dict[str, Callable[[ImageTextModel, Path, ExportConfig], dict[str, Any]]] = {
    "text_encoder": write_text_encoder, "transformers": write_transformers, "onnx": write_onnx_folder,
    "open_clip": write_open_clip,
}


def export_model(model: ImageTextModel, config: ExportConfig) -> tuple[Path, dict[str, Any]]:
    """Write a model in another library's format, checked with that library.

    Args:
      model: On the CPU, fp32, in evaluation mode.
      config: What `clipkit export` takes.

    Returns:
      The folder, and what its clipkit_export.json says of the agreement.

    Raises:
      ValueError: the folder is taken, the format cannot represent the model, the base does not fit it, or the check found
        another function.
      OSError: the folder cannot be written. In all cases nothing is left behind.
    """
    out = output_folder(config)
    if config.interpolate is not None:
        model = interpolated_model(load_base(config), model, config.interpolate)
    with whole_folder(out, overwrite=config.overwrite) as folder:
        with _without_progress_bars():
            facts = FORMATS[config.format](model, folder, config)
        if config.base is not None:
            facts |= {"interpolated": {"base": source_name(config.base), "alpha": config.interpolate}}
        write_text_atomically(folder / "README.md", model_card(model, config, facts))
        write_provenance(folder, model=model, source=config.model, pretrained=config.pretrained, facts=facts,
                         export_format=config.format)
    return out, facts


def load_base(config: ExportConfig) -> ImageTextModel:
    """Load what the model was fine-tuned from; `pretrained` is about an open_clip name."""
    base = str(config.base)
    return load_model(base, pretrained=None if Path(base).expanduser().is_dir() else config.pretrained)


def output_folder(config: ExportConfig) -> Path:
    """Where the export goes: `out`, else export/<format> in the run, else export/<model>/<format>."""
    if config.out:
        return Path(config.out).expanduser()
    run = run_of(config.model)
    return (run / "export" if run else Path("export") / source_name(config.model)) / config.format


def export_text_encoder(model: ImageTextModel | str | Path, out: str | Path, *,
                        layer: Literal["last", "penultimate"] = "last", pad_token_id: int = END_OF_TEXT,
                        single_file: bool = False, overwrite: bool = False) -> Path:
    """Write a text tower as the folder that transformers and every diffusers pipeline read.

    Args:
      model: A model, or what `load_model` takes; a run's figures go into the folder's README.
      out: The folder to make.
      layer: "penultimate" ends at the layer before the last, as Stable Diffusion 2 does.
      pad_token_id: Token that fills up rows; 0 is open_clip's.
      single_file: Adds one fp16 file under the names that ComfyUI-style tools read.
      overwrite: Replace an export that is there.

    Returns:
      The folder.

    Raises:
      ValueError: `out` is taken, transformers cannot represent the tower, or the self-check found another function.
      OSError: the folder cannot be written.
    """
    source = "" if isinstance(model, ImageTextModel) else str(model)
    config = parse(ExportConfig, {"model": source, "pretrained": None, "base": None, "interpolate": None,
                                  "format": "text_encoder", "out": str(out), "overwrite": overwrite, "layer": layer,
                                  "pad_token_id": pad_token_id, "single_file": single_file, "single_file_dtype": "fp16"})
    refuse_taken(output_folder(config), overwrite=overwrite)
    return export_model(_at_rest(model) if isinstance(model, ImageTextModel) else load_model(model), config)[0]


def _at_rest(model: ImageTextModel) -> ImageTextModel:
    """A copy on the CPU, fp32, in evaluation mode; the model itself may be at work."""
    still = ImageTextModel(copy.deepcopy(model.towers).float().cpu(), model.config, model.tokenize).eval()
    still.source_sha256 = model.source_sha256
    return still


@contextlib.contextmanager
def _without_progress_bars() -> Iterator[None]:
    """transformers draws one for each file that it writes and reads."""
    if installed("transformers") is None:
        yield
        return
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
