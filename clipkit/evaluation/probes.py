"""Probes: a linear classifier on the frozen features of a task's labelled train split, with all images or a few a class."""

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from clipkit.evaluation.encode import EncodedTask, encode_task
from clipkit.evaluation.few_shot import few_shot
from clipkit.evaluation.linear_probe import linear_probe
from clipkit.evaluation.results import Result
from clipkit.evaluation.statistics import mean_per_class_recall, mean_per_class_recall_interval, wilson_interval
from clipkit.evaluation.store import EmbeddingStore
from clipkit.evaluation.tasks import Task
from clipkit.model.image_text import ImageTextModel

if TYPE_CHECKING:
    from pandas import DataFrame

SHOTS = (1, 2, 4, 8, 16)  # Zhou et al. 2022 (CoOp), section 4.1


def measure_linear_probe(model: ImageTextModel, task: Task, *, batch_size: int, store: EmbeddingStore | None, workers: int,
                         features: Sequence[str] = ("projected",), **_: object) -> tuple[list[Result], "DataFrame"]:
    """Fit the paper's linear probe on the train split, and measure it on the task's images.

    Args:
      model, batch_size, store, workers: as in `measure`.
      task: with a train split.
      features: "projected" (what the model compares with texts), "trunk" (before the projection; the paper's), or both.

    Raises:
      ValueError: the task has no train split, or the tower has no features before the projection.
    """
    from pandas import concat

    results, predictions = [], []
    for place in features:
        train, test = _both_splits(model, task, batch_size, store, workers, trunk=place == "trunk")
        probe = linear_probe((_features(train, place), train.labels.cpu()), (_features(test, place), test.labels.cpu()),
                             num_classes=len(task.classes))
        about = {"task": task.name, "split": task.split, "kind": "linear_probe", "n": probe.n, "prompts": f"{place} features",
                 "num_classes": len(task.classes), "n_bad": test.num_bad.total()}
        right, guesses = test.labels.numpy(force=True), probe.guesses.numpy()
        ranks = _ranks(probe.logits, test.labels.cpu())
        for k in (1, 5):
            if k < len(task.classes):
                value = float((ranks < k).mean())
                low, high = wilson_interval(value, probe.n)
                results.append(Result(metric=f"lp_acc{k}", value=value, ci_low=low, ci_high=high, **about))
        low, high = mean_per_class_recall_interval(right, guesses)
        results.append(Result(metric="lp_mean_per_class_recall", value=mean_per_class_recall(right, guesses), ci_low=low,
                              ci_high=high, **about))
        results.append(Result(metric="lp_lambda", value=probe.regularisation, ci_low=None, ci_high=None, **about))
        predictions.append(_rows(task, "linear_probe", f"{place} features", test, guesses, ranks, probe.logits))
    return results, concat(predictions, ignore_index=True)


def measure_few_shot(model: ImageTextModel, task: Task, *, batch_size: int, store: EmbeddingStore | None, workers: int,
                     shots: Sequence[int] = SHOTS, num_seeds: int = 3, **_: object) -> tuple[list[Result], None]:
    """Fit probes on a few images a class, several draws each, on the features that are compared with texts.

    Args:
      model, batch_size, store, workers: as in `measure`.
      task: with a train split.
      shots: images a class.
      num_seeds: draws for each number of shots.

    Raises:
      ValueError: the task has no train split.
    """
    train, test = _both_splits(model, task, batch_size, store, workers, trunk=False)
    names = "\n".join(f"{key} {label}" for key, label in zip(train.keys, train.labels.tolist(), strict=True))
    found = few_shot((train.image_features.cpu(), train.labels.cpu()), (test.image_features.cpu(), test.labels.cpu()),
                     num_classes=len(task.classes), fingerprint=hashlib.sha256(names.encode("utf-8", "replace")).hexdigest(),
                     shots=shots, num_seeds=num_seeds)
    return [Result(task=task.name, split=task.split, kind="few_shot", metric=f"fewshot_k{result.shots}_acc1",
                   value=result.accuracy, n=result.n, ci_low=result.ci_low, ci_high=result.ci_high,
                   num_classes=len(task.classes), prompts=f"{num_seeds} draws", n_bad=test.num_bad.total())
            for result in found], None


PROBES = {"linear_probe": measure_linear_probe, "few_shot": measure_few_shot}


def _both_splits(model: ImageTextModel, task: Task, batch_size: int, store: EmbeddingStore | None, workers: int, *,
                 trunk: bool) -> tuple[EncodedTask, EncodedTask]:
    if task.train is None:
        raise ValueError(f"task {task.name} has no labelled train split, which a probe learns from; give a set with a train "
                         "split (<set>/train/), or leave kind out")
    train, test = (encode_task(model, part, batch_size=batch_size, spread=True, store=store, workers=workers, trunk=trunk)
                   for part in (task.train, task))
    return train, test


def _features(encoded: EncodedTask, place: str) -> Tensor:
    chosen = encoded.image_features if place == "projected" else encoded.trunk_features
    assert chosen is not None
    return chosen.cpu()


def _ranks(logits: Tensor, labels: Tensor) -> np.ndarray:
    """(N,) rank of the right class, equal scores by class number."""
    right = logits.gather(1, labels[:, None])  # (N, 1)
    before = logits.new_tensor(range(logits.shape[1]))[None, :] < labels[:, None]  # (N, C)
    return ((logits > right) | ((logits == right) & before)).sum(dim=1).numpy()


def _rows(task: Task, kind: str, rule: str, test: EncodedTask, guesses: np.ndarray, ranks: np.ndarray,
          logits: Tensor) -> "DataFrame":
    from pandas import DataFrame

    names = np.array(task.classes, dtype=object)  # (C,)
    right = test.labels.numpy(force=True)
    return DataFrame({"task": task.name, "kind": kind, "prompts": rule, "direction": "", "key": test.keys, "label": right,
                      "label_name": names[right], "guess": guesses, "guess_name": names[guesses],
                      "probability": logits.softmax(dim=1).amax(dim=1).numpy(), "rank": ranks,
                      "tied": (logits == logits.amax(dim=1, keepdim=True)).sum(dim=1).numpy() > 1})
