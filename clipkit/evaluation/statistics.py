"""Intervals for proportions. Every reported number has one."""

import math

import torch
from torch import Tensor

Z_95 = 1.959963984540054  # 97.5 % point of the normal distribution: a two-sided 95 % interval


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
    n = len(hits)
    proportion = hits.double().mean().item() if n else 0.0
    _, cluster = clusters.unique(return_inverse=True)  # (N,) 0 .. number of clusters - 1
    residuals = torch.zeros(int(cluster.max()) + 1 if n else 0, dtype=torch.float64, device=hits.device)
    residuals.index_add_(0, cluster, hits.double() - proportion)
    variance = residuals.square().sum().item() / max(n, 1) ** 2
    binomial = proportion * (1 - proportion)
    effective_n = binomial / variance if variance > 0 else float(len(residuals))
    return wilson_interval(proportion, min(effective_n, float(n)))
