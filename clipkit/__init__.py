"""Train, measure and hand on CLIP models. Public names load on first use: importing clipkit costs nothing."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clipkit.evaluation.classifier import zero_shot_classifier
    from clipkit.model.folder import load_model

__version__ = "0.1.0"

__all__ = ["__version__", "load_model", "zero_shot_classifier"]

PUBLIC = {"load_model": "clipkit.model.folder", "zero_shot_classifier": "clipkit.evaluation.classifier"}


def __getattr__(name: str) -> Any:
    if name in PUBLIC:
        return getattr(importlib.import_module(PUBLIC[name]), name)
    raise AttributeError(f"module 'clipkit' has no attribute {name!r}")
