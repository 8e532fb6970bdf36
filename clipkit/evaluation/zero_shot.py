"""Measure a model on tasks by text alone: zero-shot classification, and retrieval both ways."""

from collections.abc import Sequence
from pathlib import Path

import torch

from clipkit.evaluation.classifier import class_weights
from clipkit.evaluation.encode import EncodedTask, encode_task, encode_texts
from clipkit.evaluation.results import Result
from clipkit.evaluation.retrieval import best_ranks, recall_at
from clipkit.evaluation.statistics import clustered_interval, wilson_interval
from clipkit.evaluation.tasks import CLASSIFICATION, Task, load_task
from clipkit.model.image_text import ImageTextModel

RECALL_AT = (1, 5, 10)
ACCURACY_AT = (1, 5)


def evaluate(model: ImageTextModel, tasks: Sequence[str | Task], *, batch_size: int = 256,
             cache_dir: str | Path | None = None) -> list[Result]:
    """Measure a model.

    Images and texts are spread over the processes of torch.distributed, if there are several: all of them must call
    this, and all get the same results.

    Args:
      model: measured in evaluation mode and fp32; each of its modules is left in the mode it was in.
      tasks: as in `load_task`, or loaded.
      batch_size: images, or texts, that one process encodes at once.
      cache_dir: folder for unpacked data, None = the user's cache.

    Returns:
      The results in the order of the tasks: acc1 and acc5 for each prompt rule, or recall@1, 5, 10 both ways.

    Raises:
      FileNotFoundError: a task does not exist.
      ValueError: a task has no image that can be used, or features are not finite.
    """
    results = []
    for name in tasks:
        task = load_task(name, cache_dir=cache_dir) if isinstance(name, str) else name
        encoded = encode_task(model, task, batch_size=batch_size, spread=True)
        measure = _classification if task.kind == CLASSIFICATION else _retrieval
        results += measure(model, task, encoded, batch_size)
    return results


def _classification(model: ImageTextModel, task: Task, encoded: EncodedTask, batch_size: int) -> list[Result]:
    results = []
    n, num_classes = len(encoded.labels), len(task.classes)
    for rule, prompts in task.prompts.items():
        weight = class_weights(model, prompts, batch_size=batch_size, spread=True)  # (C, D)
        class_numbers = torch.arange(num_classes, device=weight.device)  # (C,)
        ranks = best_ranks(encoded.image_features, weight, encoded.labels, class_numbers)  # (N,)
        for k in ACCURACY_AT:
            if k < num_classes:
                accuracy = recall_at(ranks, k)
                low, high = wilson_interval(accuracy, n)
                results.append(Result(task=task.name, split=task.split, kind=task.kind, metric=f"acc{k}",
                                      value=accuracy, n=n, ci_low=low, ci_high=high, num_classes=num_classes,
                                      prompts=rule, n_bad=encoded.num_bad.total()))
    return results


def _retrieval(model: ImageTextModel, task: Task, encoded: EncodedTask, batch_size: int) -> list[Result]:
    captions = [caption for of_image in encoded.captions for caption in of_image]
    text_features = encode_texts(model, captions, batch_size=batch_size, spread=True)  # (N captions, D)
    counts = torch.tensor([len(of_image) for of_image in encoded.captions], device=text_features.device)  # (N,)
    images = encoded.labels  # (N,) the number of each image
    image_of_caption = images.repeat_interleave(counts)  # (N captions,)
    directions = {
        "image_retrieval": best_ranks(text_features, encoded.image_features, image_of_caption, images),  # (N captions,)
        "text_retrieval": best_ranks(encoded.image_features, text_features, images, image_of_caption),  # (N,)
    }
    results = []
    for direction, ranks in directions.items():
        clusters = image_of_caption if direction == "image_retrieval" else images  # captions of one image hang together
        for k in RECALL_AT:
            low, high = clustered_interval(ranks < k, clusters)
            results.append(Result(task=task.name, split=task.split, kind=task.kind, metric=f"{direction}_recall@{k}",
                                  value=recall_at(ranks, k), n=len(ranks), ci_low=low, ci_high=high, num_classes=None,
                                  prompts="captions", n_bad=encoded.num_bad.total()))
    return results
