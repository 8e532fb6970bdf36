"""From the features of labelled pictures and class texts to the numbers of zero-shot classification."""

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from clipkit.evaluation.calibration import PAPER_SCALE, calibration_error_interval, expected_calibration_error
from clipkit.evaluation.retrieval import best_ranks, rank_targets, recall_at
from clipkit.evaluation.statistics import (
    mean_interval,
    mean_per_class_recall,
    mean_per_class_recall_interval,
    wilson_interval,
)

if TYPE_CHECKING:
    from pandas import DataFrame

ACCURACY_AT = (1, 5)
ROWS_AT_ONCE = 1024  # images scored together; bounds the memory, leaves the result
Number = tuple[str, float, float, float]  # metric, value, ci_low, ci_high


class ClassScores(NamedTuple):
    """What the classes' scores say about each image. Legend: N images."""

    rank: Tensor  # (N,) int64 of the right class, 0 = first; equal scores by class number
    guess: Tensor  # (N,) int64
    tied: Tensor  # (N,) bool: another class has exactly the guess's score
    probability: Tensor  # (N,) of the guess, at the model's own scale
    probability_100: Tensor  # (N,) at scale 100
    nll: Tensor  # (N,) nats, of the right class
    nll_100: Tensor  # (N,)


def accuracies(image_features: Tensor, weight: Tensor, labels: Tensor) -> list[Number]:
    """Measure top-1 and top-5 accuracy: all that training looks at.

    Args:
      image_features: (N, D) unit norm.
      weight: (C, D) unit norm, one row a class.
      labels: (N,) int64.

    Raises:
      ValueError: a feature is not finite.
    """
    class_numbers = torch.arange(len(weight), device=weight.device)  # (C,)
    return _accuracies(best_ranks(image_features, weight, labels, class_numbers), len(weight))


@torch.no_grad()
def score_classes(image_features: Tensor, weight: Tensor, labels: Tensor, *, logit_scale: float) -> ClassScores:
    """Score every class for every image, in fp32 and a part of the images at a time.

    Args:
      image_features: (N, D) unit norm.
      weight: (C, D) unit norm, one row a class.
      labels: (N,) int64, right classes.
      logit_scale: the model's own 1/temperature; a bias would leave the probabilities as they are.

    Raises:
      ValueError: a feature is not finite.
    """
    class_numbers = torch.arange(len(weight), device=weight.device)  # (C,)
    parts = []
    for features, right in zip(image_features.split(ROWS_AT_ONCE), labels.split(ROWS_AT_ONCE), strict=True):
        ranking = rank_targets(features, weight, right, class_numbers)
        similarity = features.float() @ weight.float().T  # (rows, C)
        columns = []
        for scale in (logit_scale, PAPER_SCALE):
            logs = (scale * similarity).log_softmax(dim=1)  # (rows, C)
            columns += [logs.gather(1, ranking.guess[:, None])[:, 0].exp(), -logs.gather(1, right[:, None])[:, 0]]
        parts.append(ClassScores(*ranking, columns[0], columns[2], columns[1], columns[3]))
    return ClassScores(*(torch.cat(column) for column in zip(*parts, strict=True)))


def classification_numbers(scores: ClassScores, labels: Tensor, num_classes: int) -> list[Number]:
    """Summarise the scores: accuracies, mean per-class recall, calibration at both scales, and the share of ties."""
    right, guesses = labels.numpy(force=True), scores.guess.numpy(force=True)
    numbers = _accuracies(scores.rank, num_classes)
    numbers.append(("mean_per_class_recall", mean_per_class_recall(right, guesses),
                    *mean_per_class_recall_interval(right, guesses)))
    hits = scores.rank.numpy(force=True) == 0
    for suffix, probability, nll in (("", scores.probability, scores.nll), ("_100", scores.probability_100, scores.nll_100)):
        confidence, losses = probability.numpy(force=True), nll.double().numpy(force=True)
        numbers.append((f"ece{suffix}", expected_calibration_error(confidence, hits),
                        *calibration_error_interval(confidence, hits)))
        if len(losses) > 1:
            numbers.append((f"nll{suffix}", float(losses.mean()), *mean_interval(losses)))
    tie_rate = scores.tied.double().mean().item()
    numbers.append(("tie_rate", tie_rate, *wilson_interval(tie_rate, len(hits))))
    return numbers


def prediction_columns(scores: ClassScores, labels: Tensor, classes: tuple[str, ...]) -> "DataFrame":
    """One row an image: the right class, the guess, and how sure it is."""
    from pandas import DataFrame

    names = np.array(classes, dtype=object)  # (C,)
    right, guesses = labels.numpy(force=True), scores.guess.numpy(force=True)
    rest = {name: getattr(scores, name).numpy(force=True)
            for name in ("probability", "probability_100", "nll", "nll_100", "rank", "tied")}
    return DataFrame({"label": right, "label_name": names[right], "guess": guesses, "guess_name": names[guesses], **rest})


def _accuracies(ranks: Tensor, num_classes: int) -> list[Number]:
    values = [(k, recall_at(ranks, k)) for k in ACCURACY_AT if k < num_classes]
    return [(f"acc{k}", value, *wilson_interval(value, len(ranks))) for k, value in values]
