"""What a task's labelled train split is worth: a linear probe, nearest pictures, and learning from a few images a class."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from clipkit.evaluation.classification import accuracies
from clipkit.evaluation.classifier import class_weights
from clipkit.evaluation.encode import EncodedTask, encode_task
from clipkit.evaluation.few_shot import Learner, few_shot, learn_probe
from clipkit.evaluation.knn import nearest_vote
from clipkit.evaluation.linear_probe import linear_probe
from clipkit.evaluation.outcome import Outcome, join, named_table
from clipkit.evaluation.results import Result
from clipkit.evaluation.retrieval import Ranking, rank_scores
from clipkit.evaluation.statistics import mean_per_class_recall, mean_per_class_recall_interval, wilson_interval
from clipkit.evaluation.store import EmbeddingStore
from clipkit.evaluation.tasks import Task
from clipkit.evaluation.tip_adapter import tip_adapter
from clipkit.model.image_text import ImageTextModel

if TYPE_CHECKING:
    from pandas import DataFrame

SHOTS = (1, 2, 4, 8, 16)  # Zhou et al. 2022 (CoOp), section 4.1


class ProbeSettings(NamedTuple):
    """How probes learn."""

    features: Sequence[str] = ("projected",)  # compared with texts; or "trunk", before the projection (the paper's); or both
    shots: Sequence[int] = SHOTS  # images a class, of few_shot and tip_adapter
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
    from pandas import DataFrame

    outcomes = []
    for place in settings.features:
        train, test = _both_splits(model, task, batch_size, store, workers, trunk=place == "trunk")
        probe = linear_probe((_features(train, place), train.labels.cpu()), (_features(test, place), test.labels.cpu()),
                             num_classes=len(task.classes))
        ranking = rank_scores(probe.logits, F.one_hot(test.labels.cpu(), len(task.classes)).bool())
        measured = _Measured(task, "linear_probe", f"{place} features", test, ranking, probe.logits.softmax(dim=1).amax(dim=1))
        curve = DataFrame(probe.curve, columns=["regularisation", "validation_accuracy"])
        curve = curve.assign(num_validation=probe.num_validation, chosen=curve["regularisation"] == probe.regularisation)
        outcomes.append(_outcome(measured, "lp", {"lp_lambda": probe.regularisation}, {"lambdas": curve}))
    return join(outcomes)


def measure_knn(model: ImageTextModel, task: Task, settings: ProbeSettings, *, batch_size: int,
                store: EmbeddingStore | None, workers: int) -> Outcome:
    """Let the nearest pictures of the train split vote on the task's images. Arguments and errors as above."""
    from pandas import DataFrame

    outcomes = []
    for place in settings.features:
        train, test = _both_splits(model, task, batch_size, store, workers, trunk=place == "trunk")
        found = nearest_vote((F.normalize(_features(train, place), dim=1), train.labels.cpu()),
                             (F.normalize(_features(test, place), dim=1), test.labels.cpu()), num_classes=len(task.classes))
        right = F.one_hot(test.labels.cpu(), len(task.classes)).bool()  # (N, C)
        ranking = rank_scores(found.votes, right)
        without_vote = found.votes[right] == 0  # (N,) a class without a vote is no answer: it comes last
        ranking = ranking._replace(rank=ranking.rank.masked_fill(without_vote, len(task.classes) - 1))
        measured = _Measured(task, "knn", f"{place} features", test, ranking, found.votes.amax(dim=1))
        tried = DataFrame(found.curve, columns=["neighbours", "temperature", "validation_accuracy"])
        is_chosen = (tried["neighbours"] == found.num_neighbours) & (tried["temperature"] == found.temperature)
        outcomes.append(_outcome(measured, "knn", {"knn_k": found.num_neighbours, "knn_temperature": found.temperature},
                                 {"neighbours": tried.assign(num_validation=found.num_validation, chosen=is_chosen)}))
    return join(outcomes)


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
    train, test = _both_splits(model, task, batch_size, store, workers, trunk=False)
    return _measure_draws(task, train, test, settings, kind="few_shot", metric="fewshot_k{}_acc1",
                          rule=f"{settings.num_seeds} draws", learn=learn_probe)


def measure_tip_adapter(model: ImageTextModel, task: Task, settings: ProbeSettings, *, batch_size: int,
                        store: EmbeddingStore | None, workers: int) -> Outcome:
    """Add the nearest of a few labelled images to the class texts, under each prompt rule; the draws are few_shot's.

    Arguments and errors as in `measure_few_shot`. Accuracy by the texts alone stands beside it.
    """
    train, test = _both_splits(model, task, batch_size, store, workers, trunk=False)
    outcomes = []
    for rule, prompts in task.prompts.items():
        weight = class_weights(model, prompts, batch_size=batch_size, spread=True, store=store).cpu()  # (C, D)
        _, value, low, high = accuracies(test.image_features.cpu(), weight, test.labels.cpu())[0]
        outcomes.append(Outcome([_result(task, "tip_adapter", rule, test)("zeroshot_acc1", value, low, high)], None, ()))
        outcomes.append(_measure_draws(task, train, test, settings, kind="tip_adapter", metric="tip_adapter_k{}_acc1",
                                       rule=rule, learn=tip_adapter(weight)))
    return join(outcomes)


PROBES = {"linear_probe": measure_linear_probe, "knn": measure_knn, "few_shot": measure_few_shot,
          "tip_adapter": measure_tip_adapter}


class _Measured(NamedTuple):
    """What a classifier that learned from labels says of a task's images."""

    task: Task
    kind: str
    rule: str
    test: EncodedTask
    ranking: Ranking
    probability: Tensor  # (N,) of the guess


def _outcome(measured: _Measured, prefix: str, chosen: Mapping[str, float], tables: "Mapping[str, DataFrame]") -> Outcome:
    """Accuracies, what was chosen on validation images, the answer to each question, and tables, told what they are of."""
    task, kind, rule, test, ranking, _ = measured
    result = _result(task, kind, rule, test)
    right, guesses, ranks = test.labels.numpy(force=True), ranking.guess.numpy(), ranking.rank.numpy()
    results = []
    for k in (1, 5):
        if k < len(task.classes):
            value = float((ranks < k).mean())
            results.append(result(f"{prefix}_acc{k}", value, *wilson_interval(value, len(ranks))))
    results.append(result(f"{prefix}_mean_per_class_recall", mean_per_class_recall(right, guesses),
                          *mean_per_class_recall_interval(right, guesses)))
    results += [result(metric, value, None, None) for metric, value in chosen.items()]
    return Outcome(results, _rows(measured), (), {title: named_table(table, task=task.name, kind=kind, prompts=rule)
                                                  for title, table in tables.items()})


def _result(task: Task, kind: str, rule: str, test: EncodedTask) -> Callable[..., Result]:
    """Results of one way of learning, made of (metric, value, ci_low, ci_high)."""
    about = {"task": task.name, "split": task.split, "kind": kind, "n": len(test.keys), "prompts": rule,
             "num_classes": len(task.classes), "n_bad": test.num_bad.total()}
    return lambda metric, value, low, high: Result(metric=metric, value=value, ci_low=low, ci_high=high, **about)


def _rows(measured: _Measured) -> "DataFrame":
    from pandas import DataFrame

    task, kind, rule, test, ranking, probability = measured
    names = np.array(task.classes, dtype=object)  # (C,)
    right, guesses = test.labels.numpy(force=True), ranking.guess.numpy()
    return DataFrame({"task": task.name, "kind": kind, "prompts": rule, "direction": "", "key": test.keys, "label": right,
                      "label_name": names[right], "guess": guesses, "guess_name": names[guesses],
                      "probability": probability.numpy(), "rank": ranking.rank.numpy(), "tied": ranking.tied.numpy()})


def _measure_draws(task: Task, train: EncodedTask, test: EncodedTask, settings: ProbeSettings, *, kind: str, metric: str,
                   rule: str, learn: Learner) -> Outcome:
    """Learn from each number of shots, several draws each; `metric` has a {} for the number."""
    from pandas import DataFrame

    names = "\n".join(f"{key} {label}" for key, label in zip(train.keys, train.labels.tolist(), strict=True))
    found = few_shot((train.image_features.cpu(), train.labels.cpu()), (test.image_features.cpu(), test.labels.cpu()),
                     num_classes=len(task.classes), fingerprint=hashlib.sha256(names.encode("utf-8", "replace")).hexdigest(),
                     shots=settings.shots, num_seeds=settings.num_seeds, learn=learn)
    notes = tuple(f"{len(one.short_classes)} of {len(task.classes)} classes of {task.name} have fewer than {one.shots} "
                  "training images: all of theirs are used" for one in found if one.short_classes)
    draws = DataFrame([{"shots": one.shots, "draw": draw, "accuracy": accuracy, **chosen} for one in found
                       for draw, (accuracy, chosen) in enumerate(zip(one.accuracies, one.chosen, strict=True))])
    result = _result(task, kind, rule, test)
    return Outcome([result(metric.format(one.shots), one.accuracy, one.ci_low, one.ci_high) for one in found],
                   None, notes, {"draws": named_table(draws, task=task.name, kind=kind, prompts=rule)})


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
