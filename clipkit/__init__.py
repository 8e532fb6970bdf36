"""Train, measure and hand on CLIP models. Public names load on first use: importing clipkit costs nothing."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clipkit.evaluation.classifier import load_classifier, zero_shot_classifier
    from clipkit.interop.export import export_text_encoder
    from clipkit.model.folder import load_model

__version__ = "0.1.0"

__all__ = ["__version__", "export_text_encoder", "load_classifier", "load_model", "zero_shot_classifier"]

PUBLIC = {"export_text_encoder": "clipkit.interop.export", "load_classifier": "clipkit.evaluation.classifier",
          "load_model": "clipkit.model.folder", "zero_shot_classifier": "clipkit.evaluation.classifier"}


def __getattr__(name: str) -> Any:
    if name in PUBLIC:
        return getattr(importlib.import_module(PUBLIC[name]), name)
    raise AttributeError(f"module 'clipkit' has no attribute {name!r}")
