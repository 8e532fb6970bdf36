"""Probes: a linear classifier on the frozen features of a task's labelled train split, with all images or a few a class."""

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from clipkit.evaluation.encode import EncodedTask, encode_task
from clipkit.evaluation.few_shot import few_shot
from clipkit.evaluation.linear_probe import linear_probe
from clipkit.evaluation.outcome import Outcome, named_table
from clipkit.evaluation.results import Result
from clipkit.evaluation.retrieval import Ranking, rank_scores
from clipkit.evaluation.statistics import mean_per_class_recall, mean_per_class_recall_interval, wilson_interval
from clipkit.evaluation.store import EmbeddingStore
from clipkit.evaluation.tasks import Task
from clipkit.model.image_text import ImageTextModel

if TYPE_CHECKING:
    from pandas import DataFrame

SHOTS = (1, 2, 4, 8, 16)  # Zhou et al. 2022 (CoOp), section 4.1


class ProbeSettings(NamedTuple):
    """How probes learn."""

    features: Sequence[str] = ("projected",)  # compared with texts; or "trunk", before the projection (the paper's); or both
    shots: Sequence[int] = SHOTS  # images a class, of few_shot
    num_seeds: int = 3  # draws for each number of shots


def measure_linear_probe(model: ImageTextModel, task: Task, settings: ProbeSettings, *, batch_size: int,
                         store: EmbeddingStore | None, workers: int) -> Outcome:
    """Fit the paper's linear probe on the train split, and measure it on the task's images.

    Args:
      model, batch_size, store, workers: as in `measure`.
      task: with a train split.
      settings: whose features are taken.

    Raises:
      ValueError: the task has no train split, or the tower has no features before the projection.
    """
    from pandas import DataFrame, concat

    results, predictions, curves = [], [], []
    for place in settings.features:
        train, test = _both_splits(model, task, batch_size, store, workers, trunk=place == "trunk")
        probe = linear_probe((_features(train, place), train.labels.cpu()), (_features(test, place), test.labels.cpu()),
                             num_classes=len(task.classes))
        about = {"task": task.name, "split": task.split, "kind": "linear_probe", "n": probe.n, "prompts": f"{place} features",
                 "num_classes": len(task.classes), "n_bad": test.num_bad.total()}
        right, guesses = test.labels.numpy(force=True), probe.guesses.numpy()
        ranking = rank_scores(probe.logits, F.one_hot(test.labels.cpu(), len(task.classes)).bool())
        ranks = ranking.rank.numpy()
        for k in (1, 5):
            if k < len(task.classes):
                value = float((ranks < k).mean())
                low, high = wilson_interval(value, probe.n)
                results.append(Result(metric=f"lp_acc{k}", value=value, ci_low=low, ci_high=high, **about))
        low, high = mean_per_class_recall_interval(right, guesses)
        results.append(Result(metric="lp_mean_per_class_recall", value=mean_per_class_recall(right, guesses), ci_low=low,
                              ci_high=high, **about))
        results.append(Result(metric="lp_lambda", value=probe.regularisation, ci_low=None, ci_high=None, **about))
        predictions.append(_rows(task, "linear_probe", f"{place} features", test, ranking, probe.logits))
        curve = DataFrame(probe.curve, columns=["regularisation", "validation_accuracy"])
        curves.append(named_table(curve.assign(num_validation=probe.num_validation,
                                               chosen=curve["regularisation"] == probe.regularisation),
                                  task=task.name, kind="linear_probe", prompts=f"{place} features"))
    return Outcome(results, concat(predictions, ignore_index=True), (), {"lambdas": concat(curves, ignore_index=True)})


def measure_few_shot(model: ImageTextModel, task: Task, settings: ProbeSettings, *, batch_size: int,
                     store: EmbeddingStore | None, workers: int) -> Outcome:
    """Fit probes on a few images a class, several draws each, on the features that are compared with texts.

    Args:
      model, batch_size, store, workers: as in `measure`.
      task: with a train split.
      settings: shots and draws.

    Raises:
      ValueError: the task has no train split.
    """
    from pandas import DataFrame

    train, test = _both_splits(model, task, batch_size, store, workers, trunk=False)
    names = "\n".join(f"{key} {label}" for key, label in zip(train.keys, train.labels.tolist(), strict=True))
    found = few_shot((train.image_features.cpu(), train.labels.cpu()), (test.image_features.cpu(), test.labels.cpu()),
                     num_classes=len(task.classes), fingerprint=hashlib.sha256(names.encode("utf-8", "replace")).hexdigest(),
                     shots=settings.shots, num_seeds=settings.num_seeds)
    notes = tuple(f"{len(result.short_classes)} of {len(task.classes)} classes of {task.name} have fewer than {result.shots} "
                  "training images: all of theirs are used" for result in found if result.short_classes)
    rule = f"{settings.num_seeds} draws"
    draws = DataFrame([{"shots": result.shots, "draw": draw, "accuracy": accuracy, "regularisation": regularisation}
                       for result in found for draw, (accuracy, regularisation) in
                       enumerate(zip(result.accuracies, result.regularisations, strict=True))])
    return Outcome([Result(task=task.name, split=task.split, kind="few_shot", metric=f"fewshot_k{result.shots}_acc1",
                   value=result.accuracy, n=result.n, ci_low=result.ci_low, ci_high=result.ci_high,
                   num_classes=len(task.classes), prompts=rule, n_bad=test.num_bad.total()) for result in found], None, notes,
                   {"draws": named_table(draws, task=task.name, kind="few_shot", prompts=rule)})


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


def _rows(task: Task, kind: str, rule: str, test: EncodedTask, ranking: Ranking, logits: Tensor) -> "DataFrame":
    from pandas import DataFrame

    names = np.array(task.classes, dtype=object)  # (C,)
    right, guesses = test.labels.numpy(force=True), ranking.guess.numpy()
    return DataFrame({"task": task.name, "kind": kind, "prompts": rule, "direction": "", "key": test.keys, "label": right,
                      "label_name": names[right], "guess": guesses, "guess_name": names[guesses],
                      "probability": logits.softmax(dim=1).amax(dim=1).numpy(), "rank": ranking.rank.numpy(),
                      "tied": ranking.tied.numpy()})
