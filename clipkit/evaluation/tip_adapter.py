"""Tip-Adapter: class texts and a cache of a few labelled pictures, added up. Nothing is trained; draws: few_shot.py."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from clipkit.evaluation.calibration import PAPER_SCALE
from clipkit.evaluation.few_shot import Images, Learner
from clipkit.evaluation.linear_probe import check_images

ALPHAS = (0.0, *(2.0**power for power in range(-4, 9)))  # weight of the cache; at 0 the texts decide alone
BETAS = tuple(2.0**power for power in range(-1, 8))  # how fast a picture's weight falls with distance
SCORES_AT_ONCE = 2**22  # of queries and cached pictures, 16 MB in fp32


def tip_adapter(weight: Tensor) -> Learner:
    """Make a Learner out of a zero-shot classifier.

    Logits are 100 * image @ weight.T + alpha * sum over a class's cached pictures of exp(-beta * (1 - cosine)). alpha and
    beta are those with the best accuracy on the validation pictures; of equals the smaller alpha, then the smaller beta.

    Args:
      weight: (C, D) unit norm, one row a class.

    Raises:
      ValueError: a feature is not finite, shapes do not fit, or a label is outside the classes.

    Source: Zhang et al. 2022 (arXiv:2111.03930), section 3.1.
    """

    def learn(train: Images, validation: Images, num_classes: int) -> tuple[Mapping[str, float], Callable[[Tensor], Tensor]]:
        check_images("train", *train, num_classes)
        check_images("validation", *validation, num_classes)
        hits = {(alpha, beta): 0 for alpha in ALPHAS for beta in BETAS}
        rows = max(1, SCORES_AT_ONCE // len(train[0]))
        for features, labels in zip(validation[0].split(rows), validation[1].split(rows), strict=True):
            by_text, cosine = text_logits(features, weight), features.float() @ train[0].float().T  # (rows, C), (rows, M)
            for beta in BETAS:
                by_cache = _sum_by_class(cosine, train[1], num_classes, beta)  # (rows, C)
                for alpha in ALPHAS:
                    guesses = torch.add(by_text, by_cache, alpha=alpha).argmax(dim=1)  # (rows,)
                    hits[alpha, beta] += int((guesses == labels).sum())
        alpha, beta = max(hits, key=lambda tried: (hits[tried], -tried[0], -tried[1]))
        return {"alpha": alpha, "beta": beta}, lambda features: torch.add(
            text_logits(features, weight), cache_logits(features, *train, num_classes, beta), alpha=alpha)

    return learn


def text_logits(features: Tensor, weight: Tensor) -> Tensor:
    """Score features (N, D) against the class texts (C, D), at the paper's scale. (N, C)"""
    return PAPER_SCALE * features.float() @ weight.float().T


@torch.no_grad()
def cache_logits(features: Tensor, cached: Tensor, labels: Tensor, num_classes: int, beta: float) -> Tensor:
    """Add up for each class how near its cached pictures are.

    Args:
      features: (N, D), unit norm.
      cached: (M, D), unit norm.
      labels: (M,) int64, classes of the cached.
      num_classes: C.
      beta: >= 0.

    Returns:
      (N, C) fp32.
    """
    chunks = features.split(max(1, SCORES_AT_ONCE // len(cached)))
    return torch.cat([_sum_by_class(chunk.float() @ cached.float().T, labels, num_classes, beta) for chunk in chunks])


def _sum_by_class(cosine: Tensor, labels: Tensor, num_classes: int, beta: float) -> Tensor:
    """From the cosines (N, M) with cached pictures to the sums of their classes. (N, C)"""
    affinity = (beta * (cosine - 1)).exp()  # (N, M)
    return affinity.new_zeros(len(cosine), num_classes).index_add_(1, labels, affinity)
