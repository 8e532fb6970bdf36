"""Intervals: of proportions, means, medians, macro averages and whole suites. Every reported number has one."""

import math
from collections.abc import Callable, Iterator, Sequence
from statistics import NormalDist

import numpy as np
import torch
from torch import Tensor

Z_95 = 1.959963984540054  # 97.5 % point of the normal distribution: a two-sided 95 % interval
MAX_EXACT_JACKKNIFE = 1000  # trials; of more, groups are left out in the place of single ones
CHUNK_NUMBERS = 2**22  # weights that a bootstrap holds at once: 32 MB


def wilson_interval(proportion: float, n: float) -> tuple[float, float]:
    """Return the 95 % Wilson score interval of a proportion.

    Args:
      proportion: share of hits, 0 to 1.
      n: number of independent trials; need not be whole (see `clustered_interval`).

    Raises:
      ValueError: there are no trials.

    Source: Wilson 1927, Journal of the American Statistical Association 22.
    """
    if n <= 0:
        raise ValueError(f"n is {n}; an interval needs at least one trial")
    centre = (proportion + Z_95**2 / (2 * n)) / (1 + Z_95**2 / n)
    half_width = Z_95 / (1 + Z_95**2 / n) * math.sqrt(proportion * (1 - proportion) / n + Z_95**2 / (4 * n**2))
    # The bounds of no and of only hits are 0 and 1; rounding must not leave them.
    low = 0.0 if proportion == 0 else max(0.0, centre - half_width)
    return low, 1.0 if proportion == 1 else min(1.0, centre + half_width)


def clustered_interval(hits: Tensor, clusters: Tensor) -> tuple[float, float]:
    """Return the 95 % interval of a share of hits whose trials come in clusters (five captions of one image, say).

    The variance is that of the clusters' sums; the interval is Wilson's at the number of independent trials with
    that variance, at most the number of trials. With one trial a cluster it is `wilson_interval`.

    Args:
      hits: (N,) bool, one a trial.
      clusters: (N,) int64, equal for trials of one cluster.

    Source: Korn and Graubard 1998, Survey Methodology 24 (effective sample size); Cochran 1977, section 3.12.
    """
    return wilson_interval(hits.double().mean().item() if len(hits) else 0.0, _effective_n(hits, clusters))


def _effective_n(hits: Tensor, clusters: Tensor) -> float:
    """The number of independent trials whose share of hits varies as much as that of these clustered ones."""
    n = len(hits)
    proportion = hits.double().mean().item() if n else 0.0
    _, cluster = clusters.unique(return_inverse=True)  # (N,) 0 .. number of clusters - 1
    residuals = torch.zeros(int(cluster.max()) + 1 if n else 0, dtype=torch.float64, device=hits.device)
    residuals.index_add_(0, cluster, hits.double() - proportion)
    variance = residuals.square().sum().item() / max(n, 1) ** 2
    binomial = proportion * (1 - proportion)
    effective_n = binomial / variance if variance > 0 else float(len(residuals))
    return min(effective_n, float(n))


def clustered_bootstrap_interval(hits: Tensor, clusters: Tensor, *, seed: int = 0,
                                 num_resamples: int = 2000) -> tuple[float, float]:
    """Return what `clustered_interval` does in closed form by resampling whole clusters (BCa). Arguments as there."""
    _, cluster = np.unique(clusters.numpy(force=True), return_inverse=True)  # (N,)
    sums = np.bincount(cluster, weights=hits.numpy(force=True))  # (clusters,)
    return bca_interval_of_ratio(sums, np.bincount(cluster), seed=seed, num_resamples=num_resamples)


def mean_interval(values: np.ndarray | Sequence[float]) -> tuple[float, float]:
    """Return the 95 % t interval of the mean of independent values (N,).

    Raises:
      ValueError: there are fewer than two values.
    """
    from scipy.special import stdtrit

    values = np.asarray(values, np.float64)
    n = len(values)
    if n < 2:
        raise ValueError(f"there are {n} values; the interval of a mean needs at least 2")
    half_width = float(stdtrit(n - 1, 0.975) * values.std(ddof=1) / math.sqrt(n))
    mean = float(values.mean())
    return mean - half_width, mean + half_width


def median_interval(values: Tensor, clusters: Tensor | None = None) -> tuple[float, float]:
    """Return the 95 % interval of a median (of ranks, say): two of the sorted values, whatever the distribution.

    Of fewer than 6 values it is their whole range, which covers the median less often than in 95 of 100 cases.

    Args:
      values: (N,).
      clusters: (N,) int64, equal for values that hang together; None = all are independent.

    Raises:
      ValueError: there are no values.

    Source: Conover 1999, Practical Nonparametric Statistics, section 3.2; for clusters Woodruff 1952, Journal of the
    American Statistical Association 47.
    """
    from scipy.stats import binom

    n = len(values)
    if n == 0:
        raise ValueError("there are 0 values; the interval of a median needs at least one")
    ordered = values.sort().values
    independent = float(n)
    if clusters is not None:
        independent = _effective_n(values <= ordered[(n - 1) // 2], clusters)
    trials = max(1, round(independent))
    below = int(binom.ppf(0.025, trials, 0.5) * n / trials)  # values that the lower bound leaves below it, and one
    below = max(below, 1)
    return ordered[below - 1].item(), ordered[n - below].item()


def average_interval(results: Sequence[tuple[float, float, float]]) -> tuple[float, float, float]:
    """Average the results of a suite of tasks on independent data.

    Each task's distances to its two bounds add up in squares, on either side: where intervals are symmetric, that is
    the propagation of standard errors.

    Args:
      results: (value, ci_low, ci_high) of each task.

    Returns:
      (average, ci_low, ci_high).

    Raises:
      ValueError: there are no results.

    Source: Zou and Donner 2008, Statistics in Medicine 27.
    """
    if not results:
        raise ValueError("there are 0 results; an average needs at least one")
    value, low, high = np.array(results, np.float64).T  # each (tasks,)
    average = float(value.mean())
    return (average, average - float(np.linalg.norm(value - low)) / len(value),
            average + float(np.linalg.norm(high - value)) / len(value))


def mean_per_class_recall(labels: np.ndarray, guesses: np.ndarray) -> float:
    """Return the mean over classes of the share of a class's images that are guessed right.

    Args:
      labels: (N,) int, right classes; a class without images has no part in the mean.
      guesses: (N,) int.
    """
    hits, weight = _weighted_hits(labels, guesses)
    return float(hits.sum() / weight.sum())


def mean_per_class_recall_interval(labels: np.ndarray, guesses: np.ndarray, *, seed: int = 0,
                                   num_resamples: int = 2000) -> tuple[float, float]:
    """Return the 95 % BCa interval of the mean per-class recall: images are resampled.

    The mean over classes is the mean over images in which each weighs 1 / (images of its class); a resample keeps the
    weights. (With fresh ones, a class of few images would be missing from many resamples, and with it its part of the mean.)
    On a balanced set it is the interval of the accuracy. If no resample differs (all hits, say), it is Wilson's.

    Args:
      labels: (N,) int, right classes.
      guesses: (N,) int.
      seed: of the resamples.
      num_resamples: how many.

    Raises:
      ValueError: there are no labels, or not one guess for each.
    """
    hits, weight = _weighted_hits(labels, guesses)
    low, high = bca_interval_of_ratio(hits, weight, seed=seed, num_resamples=num_resamples)
    return (low, high) if low < high else wilson_interval(low, len(labels))


def _weighted_hits(labels: np.ndarray, guesses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each image's weight, 1 / (images of its class), if it is guessed right, else 0; and the weight. (N,) each."""
    if len(labels) == 0 or len(labels) != len(guesses):
        raise ValueError(f"there are {len(labels)} labels and {len(guesses)} guesses; give one guess for each label")
    _, number, counts = np.unique(labels, return_inverse=True, return_counts=True)
    weight = 1 / counts[number]  # (N,)
    return weight * (np.asarray(labels) == np.asarray(guesses)), weight


def bca_interval_of_ratio(sums: np.ndarray, sizes: np.ndarray, *, seed: int = 0,
                          num_resamples: int = 2000) -> tuple[float, float]:
    """Return the 95 % BCa interval of sum(sums) / sum(sizes) over clusters (C,), which are resampled as wholes."""
    kinds, counts = np.unique(np.stack([sums, sizes], axis=1), axis=0, return_counts=True)  # (kinds, 2), (kinds,)
    return bca_interval(lambda weights: (weights @ kinds[:, 0]) / (weights @ kinds[:, 1]), counts, seed=seed,
                        num_resamples=num_resamples)


def difference_interval(differences: np.ndarray, sizes: np.ndarray, *, seed: int = 0,
                        num_resamples: int = 2000) -> tuple[float, float]:
    """Return the 95 % interval of the difference between two shares of the same questions, which come in clusters.

    BCa; where no cluster tells the two apart (or all do, alike), as if one more had gone either way.

    Args:
      differences: (C,) int, hits of the one less hits of the other in each cluster.
      sizes: (C,) questions in each.
      seed, num_resamples: as in `bca_interval`.
    """
    low, high = bca_interval_of_ratio(differences, sizes, seed=seed, num_resamples=num_resamples)
    if low < high:
        return low, high
    margin = Z_95 * 2**0.5 / (len(sizes) + 2)
    return max(low - margin, -1.0), min(high + margin, 1.0)


def bca_interval(statistic: Callable[[np.ndarray], np.ndarray], counts: np.ndarray, *, seed: int = 0,
                 num_resamples: int = 2000) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of a statistic, corrected for bias and skewness.

    scipy.stats.bootstrap gives the same, but hands each resample over value by value and leaves out each trial in
    turn, which at 50,000 images is 2.5 billion values. Here a resample is how often each trial was drawn, and trials
    that are alike are drawn as one number.

    Args:
      statistic: takes weights (R, K), how often each kind of trial is in each of R samples, and returns the values (R,).
      counts: (K,) int, how often each kind is in the data; all 1 where no two trials are alike.
      seed: of the resamples.
      num_resamples: how many; 2000 hold a bound to about a twentieth of the interval's width.

    Returns:
      (low, high); equal, if no resample differs from the data.

    Source: Efron 1987, Journal of the American Statistical Association 82.
    """
    rng = np.random.default_rng(seed)
    counts = np.asarray(counts)
    value = statistic(counts[None].astype(np.float64))[0]
    resampled = np.concatenate([statistic(weights) for weights in _resamples(counts, num_resamples, rng)])
    if np.ptp(resampled) == 0:
        return float(value), float(value)
    parts = [(statistic(weights), times) for weights, times in _left_out(counts, rng)]
    left_out, times = (np.concatenate(column) for column in zip(*parts, strict=True))  # each (trials or groups,)
    influence = np.average(left_out, weights=times) - left_out
    spread = (times * influence**2).sum() ** 1.5
    acceleration = (times * influence**3).sum() / (6 * spread) if spread > 0 else 0.0
    normal = NormalDist()
    share_below = ((resampled < value).mean() + (resampled <= value).mean()) / 2
    bias = normal.inv_cdf(np.clip(share_below, 0.5 / num_resamples, 1 - 0.5 / num_resamples))
    points = [bias + z for z in (-Z_95, Z_95)]
    low, high = np.quantile(resampled, [normal.cdf(bias + z / (1 - acceleration * z)) for z in points])
    return float(low), float(high)


def _resamples(counts: np.ndarray, num_resamples: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Draw as many trials as there are, with replacement, in chunks of (R, K)."""
    n, kinds = int(counts.sum()), len(counts)
    rows = max(1, CHUNK_NUMBERS // kinds)
    for start in range(0, num_resamples, rows):
        rows = min(rows, num_resamples - start)
        if n > kinds:
            yield rng.multinomial(n, counts / n, size=rows).astype(np.float64)
        else:  # one by one is quicker than a binomial number for each
            drawn = rng.integers(n, size=(rows, n)) + kinds * np.arange(rows)[:, None]
            yield np.bincount(drawn.ravel(), minlength=rows * kinds).reshape(rows, kinds).astype(np.float64)


def _left_out(counts: np.ndarray, rng: np.random.Generator) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The data without one trial, for each kind (R, K), and how many trials are of that kind (R,).

    Of many trials that are all different, groups are left out: the skewness that this is for stays the same.
    """
    kinds = len(counts)
    group = np.arange(kinds)
    if kinds > MAX_EXACT_JACKKNIFE and (counts == 1).all():
        group = rng.permutation(kinds) % MAX_EXACT_JACKKNIFE
    groups = np.unique(group[counts > 0])
    rows = max(1, CHUNK_NUMBERS // kinds)
    for start in range(0, len(groups), rows):
        chunk = groups[start:start + rows]
        yield counts - (group == chunk[:, None]).astype(np.float64), np.maximum(counts[chunk], 1)
