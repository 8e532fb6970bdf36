"""What frozen encoders make of training data and of tasks: every picture and every caption, encoded once and kept."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from clipkit.data.samples import SampleError, captions_by_field, group_id
from clipkit.data.tars import RawSample
from clipkit.evaluation.classification import accuracies
from clipkit.evaluation.classifier import encode_prompts
from clipkit.evaluation.encode import EncodedTask, encode_task, encode_texts
from clipkit.evaluation.feature_rows import Progress
from clipkit.evaluation.image_sets import RETRIEVAL, ShardImages, Target
from clipkit.evaluation.results import Result
from clipkit.evaluation.sample_fields import json_fields
from clipkit.evaluation.store import EmbeddingStore
from clipkit.evaluation.tasks import Task
from clipkit.evaluation.text_features import average_prompts
from clipkit.model.image_text import ImageTextModel
from clipkit.model.locked_pair import Projections

TEXTS_AT_ONCE = 64  # more leave a CPU's cache
LENGTH_GROUPS = 16  # of the captions


class LockedFeatures(NamedTuple):
    """Features of training data. Legend: N pictures, F and W widths, T distinct captions."""

    images: Tensor  # (N, F) fp32, before the projection
    texts: Tensor  # (T, W) fp32, unit norm
    captions: list[Tensor]  # N, each (captions of the picture,) int64 rows of `texts`
    group_ids: Tensor  # (N,) int64
    num_bad: int  # samples left out


class LockedTask(NamedTuple):
    """A classification task, encoded."""

    task: Task
    images: EncodedTask  # with trunk features
    prompts: dict[str, tuple[list[str], Tensor]]  # rule -> T texts, their features (T, W)


def training_task(name: str, shards: Sequence[str], *, caption_fields: Sequence[str] | None, group_by: str) -> Task:
    """Open training shards: every caption of each picture, and its group as its label.

    Args:
      name: for messages.
      shards: paths and URLs.
      caption_fields: json fields that hold captions, "txt" the .txt; None = `captions`, else the .txt.
      group_by: "none", "caption", or a json field; pictures of equal value are no negatives of each other.
    """
    target = partial(_target, caption_fields=caption_fields, group_by=group_by)
    meaning = f"all of {caption_fields and list(caption_fields)}, grouped by {group_by}"
    return Task(name, "train", RETRIEVAL, ShardImages(tuple(shards), target, meaning))


def locked_features(image: ImageTextModel, text: ImageTextModel, task: Task, *, batch_size: int, workers: int,
                    store: EmbeddingStore, progress: Callable[[str], Progress]) -> LockedFeatures:
    """Encode training data with both encoders, or read from the store what was encoded before.

    Args:
      image: encodes pictures; has features before its projection.
      text: encodes captions.
      task: from `training_task`.
      batch_size: pictures encoded at once.
      workers: processes that read pictures.
      store: keeps the features; what is interrupted goes on there.
      progress: makes the callback of one part out of its name.

    Raises:
      ValueError: no picture can be used, or a feature is not finite.
      OSError: the data cannot be read.
    """
    encoded = encode_task(image, task, batch_size=batch_size, store=store, trunk=True, workers=workers,
                          progress=progress("pictures"))
    texts = list(dict.fromkeys(caption for of_image in encoded.captions for caption in of_image))
    row_of = {caption: row for row, caption in enumerate(texts)}
    return LockedFeatures(
        trunk_of(encoded), encode_by_length(text, texts, store, progress("captions")),
        [torch.tensor([row_of[caption] for caption in of_image]) for of_image in encoded.captions],
        torch.tensor([groups[0] for groups in encoded.label_sets]), encoded.num_bad.total())


def encode_by_length(model: ImageTextModel, texts: list[str], store: EmbeddingStore, progress: Progress) -> Tensor:
    """Encode texts, those of about one length together: a tower that masks its padding has little then. (T, W) unit norm."""
    order = torch.tensor([len(text.split()) for text in texts]).argsort(stable=True)  # (T,)
    features, done = [], 0
    for rows in order.chunk(LENGTH_GROUPS):
        features.append(encode_texts(model, [texts[row] for row in rows.tolist()], batch_size=TEXTS_AT_ONCE, store=store))
        done += len(rows)
        progress(done, len(texts))
    return torch.cat(features)[order.argsort().to(features[0].device)]


def locked_task(image: ImageTextModel, text: ImageTextModel, task: Task, *, batch_size: int, store: EmbeddingStore,
                progress: Progress | None = None) -> LockedTask:
    """Encode a classification task with both encoders, or read it from the store. Arguments as in `locked_features`."""
    encoded = encode_task(image, task, batch_size=batch_size, store=store, trunk=True, progress=progress)
    prompts = {rule: encode_prompts(text, texts, batch_size=TEXTS_AT_ONCE, store=store) for rule, texts in task.prompts.items()}
    return LockedTask(task, encoded, prompts)


def measure_projections(projections: Projections, locked: LockedTask) -> list[Result]:
    """Measure learned projections on a task's frozen features: acc1 and acc5 under each prompt rule."""
    task, encoded, prompts = locked
    with torch.no_grad():
        images = projections.project_image(trunk_of(encoded))  # (N, D)
        weights = {rule: average_prompts(projections.project_text(features), texts, task.prompts[rule])  # (C, D)
                   for rule, (texts, features) in prompts.items()}
    return [Result(task.name, task.split, task.kind, metric, value, len(images), low, high, len(task.classes), rule,
                   encoded.num_bad.total())
            for rule, weight in weights.items() for metric, value, low, high in accuracies(images, weight, encoded.labels)]


def trunk_of(encoded: EncodedTask) -> Tensor:
    assert encoded.trunk_features is not None
    return encoded.trunk_features


def _target(raw: RawSample, *, caption_fields: Sequence[str] | None, group_by: str) -> Target:
    fields = json_fields(raw)
    found = captions_by_field(raw.text, fields, caption_fields)
    captions = tuple(dict.fromkeys(caption for of_field in found for caption in of_field))
    if not captions:
        raise SampleError("no caption", f"nothing in {', '.join(caption_fields or ('captions', '.txt'))}")
    return Target(labels=(group_id(group_by, captions[0], fields),), captions=captions)
