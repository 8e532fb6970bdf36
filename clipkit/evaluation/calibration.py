"""Whether probabilities mean what they say: calibration error, log-likelihood, Brier score, and the temperature's fit."""

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from clipkit.evaluation.statistics import mean_interval, wilson_interval

PAPER_SCALE = 100.0  # Radford et al. 2021 hold the scale at 100 at most; their released models stand there
NUM_BINS = 15  # Guo et al. 2017
SCALE_BOUNDS = (1e-2, 1e4)  # within which a temperature is looked for


class ReliabilityBin(NamedTuple):
    """Images whose guess has a probability in (low, high]."""

    low: float
    high: float
    n: int
    confidence: float  # mean probability of the guess
    accuracy: float  # share that is right
    ci_low: float  # 95 % interval of the accuracy
    ci_high: float


class Probabilities(NamedTuple):
    """What the probabilities of N images say. fp32."""

    guess_probability: Tensor  # (N,) of the first guess
    hits: Tensor  # (N,) bool, whether it is right
    nll: Tensor  # (N,) nats, of the right class
    brier: Tensor  # (N,) squared distance to the one-hot answer, 0 to 2


class Calibration(NamedTuple):
    """Each as (value, ci_low, ci_high)."""

    ece: tuple[float, float, float]
    nll: tuple[float, float, float]
    brier: tuple[float, float, float]


class FittedTemperature(NamedTuple):
    """A scale fitted on one half of the images; both measurements are of the other half."""

    scale: float
    before: Calibration  # at the scale that was given
    after: Calibration
    n: int  # images measured


def probabilities_at(similarity: Tensor, labels: Tensor, scale: float) -> Probabilities:
    """Turn similarities (N, C) into what calibration needs of the probabilities softmax(scale * similarity).

    Args:
      similarity: (N, C), cosine of image and class.
      labels: (N,) int64, right classes.
      scale: > 0, 1/temperature. `PAPER_SCALE`, or the model's own.

    Raises:
      ValueError: a similarity is not finite.
    """
    if not similarity.isfinite().all():
        raise ValueError("similarities hold NaN or infinity; the model cannot be measured: look at its weights and inputs")
    log_probabilities = (similarity.float() * scale).log_softmax(dim=1)  # (N, C)
    probabilities = log_probabilities.exp()
    guess_probability, guess = probabilities.max(dim=1)  # (N,)
    brier = (probabilities - F.one_hot(labels, similarity.shape[1])).square().sum(dim=1)
    return Probabilities(guess_probability, guess == labels, F.nll_loss(log_probabilities, labels, reduction="none"), brier)


def measure_calibration(probabilities: Probabilities, *, num_bins: int = NUM_BINS) -> Calibration:
    """Summarise the probabilities of at least two images, with 95 % intervals."""
    confidence, hits = probabilities.guess_probability.numpy(force=True), probabilities.hits.numpy(force=True)
    nll, brier = probabilities.nll.double().numpy(force=True), probabilities.brier.double().numpy(force=True)
    return Calibration((expected_calibration_error(confidence, hits, num_bins=num_bins),
                        *calibration_error_interval(confidence, hits, num_bins=num_bins)),
                       (float(nll.mean()), *mean_interval(nll)), (float(brier.mean()), *mean_interval(brier)))


def expected_calibration_error(confidence: np.ndarray, hits: np.ndarray, *, num_bins: int = NUM_BINS) -> float:
    """Return the mean distance of confidence and accuracy over bins of equal width, weighted by their images.

    Args:
      confidence: (N,), probability of the guess, 0 to 1.
      hits: (N,) bool, whether the guess is right.
      num_bins: over (0, 1].

    Raises:
      ValueError: there are no images, or a confidence is not a probability.

    Source: Guo et al. 2017, section 2 (arXiv:1706.04599).
    """
    gaps, _ = _bin_gaps(confidence, hits, num_bins)
    return float(np.abs(gaps).sum())


def calibration_error_interval(confidence: np.ndarray, hits: np.ndarray, *, num_bins: int = NUM_BINS, seed: int = 0,
                               num_resamples: int = 1000) -> tuple[float, float]:
    """Return a 95 % interval of the expected calibration error (arguments as there).

    Chance alone makes the error of few images too large, so a bootstrap around the value would miss the truth. Instead:
    the errors for which the value is no surprise, the bins' gaps standing to each other as they were seen, with their
    standard errors. It reaches to 0 where a calibrated model could have given the value, and always holds the value.
    """
    gaps, errors = _bin_gaps(confidence, hits, num_bins)
    value = np.abs(gaps).sum()
    direction = gaps / value if value > 0 else np.full(num_bins, 1 / num_bins)
    noise = errors * np.random.default_rng(seed).standard_normal((num_resamples, num_bins))
    candidates = np.linspace(0, value + 4 * errors.sum(), 200)
    seen = np.stack([np.abs(true * direction + noise).sum(axis=1) for true in candidates])  # (200, num_resamples)
    low, high = np.quantile(seen, [0.025, 0.975], axis=1)
    plausible = np.append(candidates[(low <= value) & (value <= high)], value)
    return float(plausible.min()), float(min(plausible.max(), 1.0))


def reliability_table(confidence: np.ndarray, hits: np.ndarray, *, num_bins: int = NUM_BINS) -> list[ReliabilityBin]:
    """Return the bins of the reliability diagram that have images (arguments as in `expected_calibration_error`)."""
    number = _bin_numbers(confidence, num_bins)  # (N,)
    table = []
    for found in np.unique(number):
        inside = number == found
        accuracy, n = float(hits[inside].mean()), int(inside.sum())
        table.append(ReliabilityBin(float(found / num_bins), float((found + 1) / num_bins), n,
                                    float(confidence[inside].mean(dtype=np.float64)), accuracy,
                                    *wilson_interval(accuracy, n)))
    return table


def fit_scale(similarity: Tensor, labels: Tensor) -> float:
    """Return the scale (1/temperature) with the least mean NLL, within `SCALE_BOUNDS`. Arguments as in `probabilities_at`.

    Source: Guo et al. 2017, section 4.2.
    """
    from scipy.optimize import minimize_scalar

    low, high = (math.log(bound) for bound in SCALE_BOUNDS)
    found = minimize_scalar(lambda log_scale: probabilities_at(similarity, labels, math.exp(log_scale)).nll.double().mean()
                            .item(), bounds=(low, high), method="bounded", options={"xatol": 1e-5})
    return math.exp(found.x)


def temperature_on_half(similarity: Tensor, labels: Tensor, *, scale: float, seed: int = 0) -> FittedTemperature:
    """Fit the scale on one half of the images, drawn by `seed`, and measure it, and the one given, on the other.

    Raises:
      ValueError: there are fewer than 4 images.
    """
    n = len(labels)
    if n < 4:
        raise ValueError(f"there are {n} images; a temperature fitted on one half and measured on the other needs 4")
    order = torch.from_numpy(np.random.default_rng(seed).permutation(n)).to(labels.device)
    fitted, measured = order[:n // 2], order[n // 2:]
    best = fit_scale(similarity[fitted], labels[fitted])
    before, after = (measure_calibration(probabilities_at(similarity[measured], labels[measured], at))
                     for at in (scale, best))
    return FittedTemperature(best, before, after, len(measured))


def _bin_numbers(confidence: np.ndarray, num_bins: int) -> np.ndarray:
    if len(confidence) == 0 or not ((confidence >= 0) & (confidence <= 1)).all():
        raise ValueError(f"{len(confidence)} confidences; give at least one, all of them probabilities from 0 to 1")
    return np.clip(np.ceil(np.asarray(confidence, np.float64) * num_bins).astype(int) - 1, 0, num_bins - 1)


def _bin_gaps(confidence: np.ndarray, hits: np.ndarray, num_bins: int) -> tuple[np.ndarray, np.ndarray]:
    """Hits less confidence of each bin as a share of all images, and its standard error, each (num_bins,)."""
    number = _bin_numbers(confidence, num_bins)  # (N,)
    gap = hits.astype(np.float64) - confidence  # (N,)
    n = np.maximum(np.bincount(number, minlength=num_bins), 1)
    sums = np.bincount(number, weights=gap, minlength=num_bins)
    squares = np.bincount(number, weights=gap**2, minlength=num_bins)
    return sums / len(gap), np.sqrt(np.maximum(squares - sums**2 / n, 0)) / len(gap)
