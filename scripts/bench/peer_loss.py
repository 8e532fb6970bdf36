"""open_clip's own losses as an arm of scripts/bench/loss.py; runs where open_clip_torch 3.3 is.

Their file is taken from the installed package as it is, without the package's import, which takes longer than the benchmark.
"""

import importlib.util
import sys
from collections.abc import Callable
from importlib.metadata import distribution, version
from typing import Any

from torch import Tensor

from scripts.bench.loss import serve


def open_clip_losses() -> Any:
    """The module open_clip.loss; it needs torch only."""
    spec = importlib.util.spec_from_file_location(
        "open_clip_loss", str(distribution("open_clip_torch").locate_file("open_clip/loss.py")))
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make(name: str) -> Callable[..., Tensor]:
    losses = open_clip_losses()
    if name == "siglip":
        return losses.SigLipLoss()
    loss = losses.ClipLoss()
    return lambda image_features, text_features, logit_scale, logit_bias: loss(image_features, text_features, logit_scale)


if __name__ == "__main__":
    serve(make, version=f"open_clip_torch {version('open_clip_torch')}", device=sys.argv[1])
