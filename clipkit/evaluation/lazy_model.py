"""A model that is built when it has something to encode. What is known of it before that, the embedding store remembers."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch

from clipkit import __version__
from clipkit.evaluation.feature_rows import ranks_of
from clipkit.evaluation.store import EmbeddingStore, ModelIdentity, identify, text_key
from clipkit.model.folder import load_model
from clipkit.model.image_text import ImageTextModel
from clipkit.training.distributed import from_main

LIBRARIES = ("open_clip_torch", "timm")  # that make a model out of its files


@dataclass(frozen=True)
class ModelFacts:
    """What can be said of a model without building it."""

    identity: ModelIdentity
    source_sha256: str | None  # of the weights file; None for weights without one
    logit_scale: float  # > 0, 1/temperature
    num_parameters: int
    image_size: int  # pixels a side
    context_length: int  # tokens


class LazyModel:
    """Stands in for an ImageTextModel; any use of its towers, tokenizer or preprocessing builds that.

    Importing open_clip and timm takes longer than an evaluation whose embeddings are all in the store.

    Attributes:
      device: where it is, or will be.
      facts: known before it is built.
    """

    def __init__(self, load: Callable[[], ImageTextModel], device: torch.device, facts: ModelFacts) -> None:
        self._load = load
        self.device = device
        self.facts = facts

    def __getattr__(self, name: str) -> Any:
        return getattr(self._built, name)

    @cached_property
    def _built(self) -> ImageTextModel:
        model = self._load()
        if text_key(identify(model)) != text_key(self.facts.identity):
            raise ValueError("the files of the model changed while it was measured (is it being trained?); run this again")
        return model


def open_model(source: str, *, pretrained: str | None, device: torch.device,
               store: EmbeddingStore | None) -> ImageTextModel:
    """Load a model; or, where the store remembers the files of its folder, a LazyModel that loads it when it is needed.

    All processes must call this.

    Args:
      source, pretrained, device: as in `load_model`.
      store: that of the first process is read and written.

    Raises:
      FileNotFoundError, ValueError: as `load_model` raises them.
    """
    load = partial(load_model, source, pretrained=pretrained, device=device)
    if store is None or pretrained is not None or not Path(source).is_dir():
        return load()
    built: list[ImageTextModel] = []

    def find() -> dict[str, Any]:
        built.append(load())
        return asdict(facts_of(built[0]))

    is_first = ranks_of(True)[0] == 0
    known = from_main(store.fact(["model", _files_of(source), _versions()], find) if is_first else None)
    identity = ModelIdentity(**{**known["identity"], "probe_tokens": tuple(known["identity"]["probe_tokens"])})
    if built:
        return built[0]
    return cast(ImageTextModel, LazyModel(load, device, ModelFacts(**{**known, "identity": identity})))


def facts_of(model: ImageTextModel) -> ModelFacts:
    """Collect what can be said of a model without building it."""
    if isinstance(model, LazyModel):
        return model.facts
    return ModelFacts(identify(model), model.source_sha256, logit_scale_of(model),
                      sum(parameter.numel() for parameter in model.parameters()), model.image_size,
                      model.tokenize.context_length)


def logit_scale_of(model: ImageTextModel) -> float:
    """Return 1/temperature."""
    return model.facts.logit_scale if isinstance(model, LazyModel) else model.towers.logit_scale.detach().float().exp().item()


def count_cut(model: ImageTextModel, texts: list[str], store: EmbeddingStore | None) -> int:
    """Count the texts with more tokens than the text encoder takes; the tokenizer is asked once about the same texts."""
    def count() -> int:
        return model.tokenize.count_cut(texts)

    return store.fact(["cut", text_key(identify(model)), texts], count) if store else count()


def _files_of(source: str) -> list[list[str | int]]:
    """Path, size and time of change of the files that a model is loaded from."""
    folder = Path(source) / "model" if (Path(source) / "model").is_dir() else Path(source)
    return [[str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns]
            for file in sorted(folder.iterdir()) if file.is_file()]


def _versions() -> list[str]:
    return [__version__, *(version(library) for library in LIBRARIES)]
