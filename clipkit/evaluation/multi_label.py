"""Pictures with several right classes: average precision and AUROC, over the classes that can be measured."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from clipkit.evaluation.statistics import bca_interval

# How similarities (N, C) become scores that images are ranked by, class by class. The softmax over classes asks which
# picture is most of all of this class: the paper's VOC 2007 figures need it (github.com/openai/CLIP, issue 153).
RANKINGS = ("softmax", "similarity")
POINTS = ("all", "11")


@dataclass(frozen=True)
class MultiLabelScores:
    """The scores of a multi-label task. NaN: the class has no positive (or no negative) image."""

    mean_average_precision: float
    ci_low: float  # 95 % interval of the mean average precision
    ci_high: float
    macro_auroc: float
    micro_auroc: float  # over all image-class pairs
    average_precision: np.ndarray  # (C,)
    auroc: np.ndarray  # (C,)
    num_without_positives: int  # classes left out of the mean average precision
    num_without_auroc: int  # classes left out of the macro AUROC: no positive or no negative
    n: int  # images


def multi_label_scores(similarity: np.ndarray, targets: np.ndarray, *, ranking: str = "softmax", scale: float = 100.0,
                       points: str = "all", seed: int = 0, num_resamples: int = 1000) -> MultiLabelScores:
    """Measure how well images are ranked for each class.

    Args:
      similarity: (N, C), cosine of image and class.
      targets: (N, C) bool, the right classes of each image.
      ranking: one of RANKINGS.
      scale: of the softmax, 1/temperature.
      points: one of POINTS: the area below all points, or PASCAL VOC 2007's mean of 11 precisions.
      seed: of the bootstrap over images.
      num_resamples: of the bootstrap.

    Raises:
      ValueError: shapes differ, a similarity is not finite, no class has a positive image, or an unknown choice.
    """
    targets = np.asarray(targets, bool)
    _check(similarity, targets, ranking, points)
    scores = softmax_over_classes(similarity, scale) if ranking == "softmax" else similarity  # (N, C)
    positives = targets.sum(axis=0)  # (C,)
    precise = average_precision(scores, targets, points=points)  # (C,)
    curves = [_curve(scores[:, c], targets[:, c], points) for c in np.flatnonzero(positives)]
    low, high = bca_interval(partial(_mean_average_precision, curves), np.ones(len(targets), int), seed=seed,
                             num_resamples=num_resamples)
    mean = float(np.nanmean(precise))
    areas = auroc(scores, targets)  # (C,)
    return MultiLabelScores(
        mean_average_precision=mean, ci_low=min(low, mean), ci_high=max(high, mean),
        macro_auroc=float(np.nanmean(areas)) if np.isfinite(areas).any() else float("nan"),
        micro_auroc=float(auroc(scores.reshape(-1, 1), targets.reshape(-1, 1))[0]), average_precision=precise, auroc=areas,
        num_without_positives=int((positives == 0).sum()), num_without_auroc=int(np.isnan(areas).sum()), n=len(targets))


def average_precision(scores: np.ndarray, targets: np.ndarray, *, points: str = "all") -> np.ndarray:
    """Return the average precision of each class (C,), NaN for a class without positives.

    Images with the same score stand at one place of the ranking: their order in the data has no part.

    Args:
      scores: (N, C).
      targets: (N, C) bool.
      points: "all" is sklearn's average_precision_score; "11" is the mean over recalls 0, 0.1, ... 1 of the best
        precision at that recall or above.

    Source: Everingham et al. 2010, International Journal of Computer Vision 88, section 4.2 (11 points).
    """
    everything = np.ones((1, len(scores)))
    return np.array([_curve(scores[:, c], targets[:, c], points)(everything)[0] if targets[:, c].any() else np.nan
                     for c in range(targets.shape[1])])


def auroc(scores: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Return for each class the chance that a positive image scores above a negative one (ties: half), (C,).

    NaN for a class without positives or without negatives. Arguments as in `average_precision`.
    """
    from scipy.stats import rankdata

    positives = targets.sum(axis=0)  # (C,)
    pairs = (positives * (len(targets) - positives)).astype(np.float64)
    rank_sums = np.where(targets, rankdata(scores, axis=0), 0.0).sum(axis=0)  # (C,)
    above = rank_sums - positives * (positives + 1) / 2
    return np.divide(above, pairs, out=np.full(len(pairs), np.nan), where=pairs > 0)


def softmax_over_classes(similarity: np.ndarray, scale: float) -> np.ndarray:
    """softmax(scale * similarity) over classes (N, C), as its logarithm: the same order, and nothing underflows to a tie."""
    logits = scale * similarity.astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def _curve(scores: np.ndarray, targets: np.ndarray, points: str) -> Callable[[np.ndarray], np.ndarray]:
    """Sort one class's images once; the result takes weights of images (R, N) and returns average precisions (R,)."""
    order = np.argsort(-scores, kind="stable")  # (N,)
    positive = np.flatnonzero(targets[order])  # (P,) places of the positives in the ranking
    last_of_tie = np.searchsorted(-scores[order], -scores[order][positive], side="right") - 1  # (P,)

    def evaluate(weights: np.ndarray) -> np.ndarray:
        ranked = weights[:, order]  # (R, N)
        seen = ranked.cumsum(axis=1)[:, last_of_tie]  # (R, P) images down to each positive's score
        gained = ranked[:, positive]  # (R, P)
        # Positives down to the same score: of those with one score, the last one's sum.
        last_positive = np.searchsorted(last_of_tie, last_of_tie, side="right") - 1  # (P,)
        found = gained.cumsum(axis=1)[:, last_positive]  # (R, P)
        precision = np.divide(found, seen, out=np.zeros(seen.shape), where=seen > 0)
        total = gained.sum(axis=1)  # (R,), 0 where a resample has no positive
        if points == "all":
            return np.divide((gained * precision).sum(axis=1), total, out=np.full(len(total), np.nan), where=total > 0)
        recall = np.divide(found, total[:, None], out=np.full(found.shape, np.nan), where=total[:, None] > 0)
        # Rounded: 0.3 is a recall of 3 in 10, whatever the last binary digit.
        best = [np.where(recall.round(9) >= tenth / 10, precision, 0).max(axis=1) for tenth in range(11)]
        return np.where(total > 0, np.mean(best, axis=0), np.nan)

    return evaluate


def _mean_average_precision(curves: list[Callable[[np.ndarray], np.ndarray]], weights: np.ndarray) -> np.ndarray:
    """Over the classes that have positives in the resample. Weights (R, N), result (R,)."""
    values = np.stack([curve(weights) for curve in curves])  # (classes, R)
    present = np.isfinite(values)
    return np.where(present, values, 0).sum(axis=0) / np.maximum(present.sum(axis=0), 1)


def _check(similarity: np.ndarray, targets: np.ndarray, ranking: str, points: str) -> None:
    for name, choice, choices in (("ranking", ranking, RANKINGS), ("points", points, POINTS)):
        if choice not in choices:
            raise ValueError(f"{name} is {choice!r}; choose one of {list(choices)}")
    if similarity.shape != targets.shape:
        raise ValueError(f"similarity {similarity.shape} and targets {targets.shape} must have one shape: images x classes")
    if not np.isfinite(similarity).all():
        raise ValueError("similarities hold NaN or infinity; the model cannot be measured: look at its weights and inputs")
    if not targets.any():
        raise ValueError("no image has a right class; average precision needs at least one positive")
