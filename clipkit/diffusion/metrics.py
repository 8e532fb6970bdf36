"""How good generated pictures are: do they show the prompt, look like real ones, copy them? Features in, numbers out.

How well an autoencoder gives pictures back: reconstruction.py.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from clipkit.evaluation.retrieval import rank_targets
from clipkit.evaluation.statistics import bca_interval_of_ratio, clustered_interval

MIN_FID_SAMPLES = 10_000  # below, its bias is as large as the differences that it is read for (Binkowski et al. 2018)
ROWS_AT_ONCE = 1024


class Measure(NamedTuple):
    """A number, what it rests on, and who judged."""

    value: float
    n: int  # generated pictures
    ci_low: float | None  # 95 % interval; None for what has none
    ci_high: float | None
    scored_by: str  # the model whose features were used; not the one that conditions the generator, or it judges itself


def clip_score(image_features: Tensor, text_features: Tensor, wanted: Tensor, *, scored_by: str) -> Measure:
    """Mean cosine of generated pictures and their prompts, in hundredths.

    Args:
      image_features: (N, D), unit norm, of the generated pictures.
      text_features: (P, D), unit norm, of the prompts.
      wanted: (N,) int64, each picture's prompt. In the interval, prompts are resampled with all of their pictures.
      scored_by: name or hash of the model that gave the features.

    Raises:
      ValueError: the numbers don't fit each other or a feature is not finite.

    Source: Hessel et al. 2021 (arXiv:2104.08718), with weight 100 in the place of 2.5, and nothing cut at 0.
    """
    _check(image_features, text_features, wanted)
    cosines = 100 * (image_features.double() * text_features.double()[wanted]).sum(dim=1)  # (N,)
    _, prompt = wanted.unique(return_inverse=True)  # (N,)
    prompt = prompt.numpy(force=True)
    low, high = bca_interval_of_ratio(np.bincount(prompt, weights=cosines.numpy(force=True)), np.bincount(prompt))
    return Measure(cosines.mean().item(), len(cosines), low, high, scored_by)


def prompt_accuracy(image_features: Tensor, text_features: Tensor, wanted: Tensor, *, scored_by: str) -> Measure:
    """Share of the generated pictures for which their own prompt is the nearest of all P. Chance is 1 / P.

    With `wanted` shuffled it must fall to chance; if it stays, the score has other reasons than the prompts. Arguments as in
    `clip_score`.
    """
    _check(image_features, text_features, wanted)
    prompts = torch.arange(len(text_features), device=wanted.device)  # (P,)
    hits = rank_targets(image_features, text_features, wanted, prompts).rank == 0  # (N,)
    low, high = clustered_interval(hits, wanted)
    return Measure(hits.double().mean().item(), len(hits), low, high, scored_by)


def polynomial_kernel(a: Tensor, b: Tensor) -> Tensor:
    """(a . b / D + 1)^3 of rows (N, D) and (M, D): (N, M). Binkowski et al. 2018, section 4 (arXiv:1801.01401)."""
    return (a @ b.T / a.shape[1] + 1) ** 3


def gaussian_kernel(a: Tensor, b: Tensor) -> Tensor:
    """1000 exp(-|a - b|^2 / 200) of rows (N, D) and (M, D): (N, M). Jayasumana et al. 2024, section 4 (arXiv:2401.09603)."""
    return 1000 * torch.exp(-torch.cdist(a, b).square() / (2 * 10**2))


KERNELS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"kid": polynomial_kernel, "cmmd": gaussian_kernel}


def kernel_distance(real: Tensor, generated: Tensor, *, metric: str = "kid", scored_by: str) -> Measure:
    """Distance of two sets of pictures: the unbiased estimate of the squared maximum mean discrepancy of their features.

    All pictures are compared with all, not subsets of them. Around 0 for sets of one kind, below as often as above. The
    interval is the jackknife's.

    Args:
      real: (N, D), at least 3.
      generated: (M, D), at least 3. For "cmmd" both of unit norm.
      metric: one of KERNELS.
      scored_by: name or hash of the model that gave the features.

    Raises:
      ValueError: the metric is unknown, there are fewer than 3 pictures on a side, or a feature is not finite.

    Source: Gretton et al. 2012, lemma 6 (Journal of Machine Learning Research 13).
    """
    if metric not in KERNELS:
        raise ValueError(f"the distance is {metric!r}; choose one of {sorted(KERNELS)}, or fid")
    _check_sets(real, generated, least=3, metric=metric)
    kernel, x, y = KERNELS[metric], real.double(), generated.double()
    n, m = len(x), len(y)
    within_x, within_y = _row_sums(kernel, x, x, diagonal=False), _row_sums(kernel, y, y, diagonal=False)  # (N,), (M,)
    from_x, from_y = _row_sums(kernel, x, y), _row_sums(kernel, y, x)  # (N,), (M,)

    def distance(xx: Tensor, yy: Tensor, xy: Tensor, rows: int, columns: int) -> Tensor:
        return xx / (rows * (rows - 1)) + yy / (columns * (columns - 1)) - 2 * xy / (rows * columns)

    xx, yy, xy = within_x.sum(), within_y.sum(), from_x.sum()
    value = distance(xx, yy, xy, n, m)
    without_x = distance(xx - 2 * within_x, yy, xy - from_x, n - 1, m)  # (N,)
    without_y = distance(xx, yy - 2 * within_y, xy - from_y, n, m - 1)  # (M,)
    variance = (n - 1) * without_x.var(correction=0) + (m - 1) * without_y.var(correction=0)
    half_width = 1.96 * variance.sqrt()
    return Measure(value.item(), m, (value - half_width).item(), (value + half_width).item(), scored_by)


def fid(real: Tensor, generated: Tensor, *, scored_by: str) -> Measure:
    """Distance of the normal distributions with the mean and covariance of two sets of features.

    Args:
      real: (N, D), at least MIN_FID_SAMPLES.
      generated: (M, D), likewise.
      scored_by: name or hash of the model that gave the features.

    Raises:
      ValueError: there are too few pictures, or a feature is not finite.

    Source: Heusel et al. 2017, equation 6 (arXiv:1706.08500).
    """
    _check_sets(real, generated, least=MIN_FID_SAMPLES, metric="fid")
    x, y = real.double(), generated.double()
    root = _square_root(x.T.cov())  # (D, D)
    cross = torch.linalg.eigvalsh(root @ y.T.cov() @ root).clamp(min=0).sqrt().sum()
    value = (x.mean(dim=0) - y.mean(dim=0)).square().sum() + x.var(dim=0).sum() + y.var(dim=0).sum() - 2 * cross
    return Measure(value.item(), len(y), None, None, scored_by)


def nearest_images(generated: Tensor, training: Tensor, *, k: int = 3) -> tuple[Tensor, Tensor]:
    """Find the training pictures that each generated one is most like: what a copy would be a copy of.

    Args:
      generated: (M, D), unit norm.
      training: (N, D), unit norm.
      k: how many, at most N are given.

    Returns:
      (indices, cosines), each (M, min(k, N)): the nearest first. To be read beside those of real pictures that were not in
      the training set: alike ones are near without being copied.

    Raises:
      ValueError: k is below 1, a set is empty, or a feature is not finite.
    """
    if k < 1:
        raise ValueError(f"k is {k}; ask for at least 1 training picture")
    _check_sets(training, generated, least=1, metric="the copying check")
    k = min(k, len(training))
    found = [(rows.float() @ training.float().T).topk(k, dim=1) for rows in generated.split(ROWS_AT_ONCE)]
    return torch.cat([one.indices for one in found]), torch.cat([one.values for one in found])


def _row_sums(kernel: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor, *, diagonal: bool = True) -> Tensor:
    """Sum the kernel over b for each row of a, a few rows at a time; without the diagonal, each row's own place."""
    sums = []
    for start in range(0, len(a), ROWS_AT_ONCE):
        values = kernel(a[start:start + ROWS_AT_ONCE], b)  # (rows, M)
        own = 0 if diagonal else values.diagonal(offset=start)  # (rows,)
        sums.append(values.sum(dim=1) - own)
    return torch.cat(sums)


def _square_root(matrix: Tensor) -> Tensor:
    """The root of a symmetric positive semi-definite matrix."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def _check(image_features: Tensor, text_features: Tensor, wanted: Tensor) -> None:
    if len(image_features) != len(wanted) or not len(wanted):
        raise ValueError(f"there are {len(image_features)} pictures and {len(wanted)} prompts of theirs; give one for each")
    if wanted.min() < 0 or wanted.max() >= len(text_features):
        raise ValueError(f"the pictures' prompts are numbered {int(wanted.min())} to {int(wanted.max())}; give indices of the "
                         f"{len(text_features)} text_features, from 0")
    if not (image_features.isfinite().all() and text_features.isfinite().all()):
        raise ValueError("features hold NaN or infinity; pictures cannot be judged by them: look at the scoring model")


def _check_sets(real: Tensor, generated: Tensor, *, least: int, metric: str) -> None:
    if min(len(real), len(generated)) < least:
        advice = "use kid, which is unbiased at any number" if metric == "fid" else "give more pictures"
        raise ValueError(f"{metric} of {len(real):,} real and {len(generated):,} generated pictures: it needs at least "
                         f"{least:,} of each; {advice}")
    if not (real.isfinite().all() and generated.isfinite().all()):
        raise ValueError("features hold NaN or infinity; pictures cannot be judged by them: look at the scoring model")
