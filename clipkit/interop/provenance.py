"""Where an export comes from: source, hash of the weights, versions, what was found; and which versions were tried."""

import json
import re
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from clipkit import __version__
from clipkit.interop.whole_folder import PROVENANCE
from clipkit.training.atomic_files import write_text_atomically

VERSIONS = ("torch", "open_clip_torch", "timm", "transformers", "tokenizers", "diffusers", "onnx", "onnxruntime", "safetensors")
# First and last minor versions whose results were compared; the self-check guards the others.
TRIED = {"transformers": ((4, 56), (5, 23)), "diffusers": ((0, 35), (0, 42))}


def run_of(source: str) -> Path | None:
    """The run folder that a model source (runs/emoji or runs/emoji/model) belongs to; None if it is no run's."""
    if not source:
        return None
    path = Path(source).expanduser()
    run = path.parent if path.resolve().name == "model" else path
    return run if (run / "config.yaml").is_file() else None


def source_name(source: str) -> str:
    """The short name of a model source: of a run or a folder its last part, else open_clip's name."""
    path = run_of(source) or Path(source).expanduser()
    return path.resolve().name if source and path.is_dir() else source.replace("/", "-")


def write_provenance(folder: Path, *, model: Any, source: str, pretrained: str | None, facts: Mapping[str, Any],
                     export_format: str) -> None:
    """Write clipkit_export.json: what was exported from which weights, with which versions, and how closely it agrees."""
    versions = {name: installed(name) for name in VERSIONS if installed(name)}
    record = {"format": export_format, "clipkit_version": __version__,
              "source": {"model": source_name(source), "pretrained": pretrained and source_name(pretrained),
                         "weights_sha256": model.source_sha256}, "versions": versions, **facts}
    write_text_atomically(folder / PROVENANCE, json.dumps(record, indent=2, ensure_ascii=False) + "\n")


def installed(name: str) -> str | None:
    """The version of an installed distribution; None if it is not there."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def require(name: str) -> None:
    """Raise ValueError, one line with the command that installs it, unless a package is installed."""
    if installed(name) is None:
        raise ValueError(f'the export needs {name}, which is not installed: pip install "clipkit-vl[export]"')


def untried_versions() -> list[str]:
    """One line for each installed library whose version is outside the range that was tried."""
    lines = []
    for name, (first, last) in TRIED.items():
        version = installed(name)
        number = tuple(int(part) for part in re.findall(r"\d+", version)[:2]) if version else first
        if not first <= number <= last:
            lines.append(f"{name} {version} is outside the versions that were tried, {'.'.join(map(str, first))} to "
                         f"{'.'.join(map(str, last))}; the export compares what it wrote all the same")
    return lines
