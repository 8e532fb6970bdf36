"""Classification by the nearest labelled pictures: a vote weighted by likeness, its settings chosen on validation pictures."""

from dataclasses import dataclass

import torch
from torch import Tensor

from clipkit.evaluation.linear_probe import VALIDATION_SHARE, check_images, stratified_split

NEIGHBOURS = (1, 2, 5, 10, 20, 50, 100, 200)  # k
TEMPERATURES = (0.01, 0.03, 0.07, 0.2)  # DINO's 0.07, and some around it: the cosines of a CLIP lie close together
SCORES_AT_ONCE = 2**22  # of queries and targets, 16 MB in fp32


@dataclass(frozen=True)
class NearestVote:
    """A weighted vote of the nearest pictures, on test pictures. Legend: N test images, C classes."""

    votes: Tensor  # (N, C) float64 shares, a row adds up to 1
    num_neighbours: int  # k
    temperature: float
    curve: tuple[tuple[int, float, float], ...]  # (k, temperature, accuracy on validation) of each pair that was tried
    num_validation: int


def nearest_vote(train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], *, num_classes: int) -> NearestVote:
    """Let the nearest training pictures vote on the class of each test picture.

    A vote weighs exp(cosine / temperature). k and the temperature are those with the best accuracy on a stratified
    fifth of train, the same for every model; of equals the largest k, then the highest temperature. All of train votes
    on the test pictures.

    Args:
      train: features (N, D), unit norm, and labels (N,) int64.
      test: the same; looked at once, at the end.
      num_classes: C; labels are 0 to C - 1.

    Raises:
      ValueError: a feature is not finite, shapes do not fit, a label is outside the classes, or no class has two
        training pictures.

    Source: Wu et al. 2018 (arXiv:1805.01978), section 3.4; Caron et al. 2021, DINO (arXiv:2104.14294).
    """
    check_images("train", *train, num_classes)
    check_images("test", *test, num_classes)
    kept, taken = stratified_split(train[1], VALIDATION_SHARE)
    if not len(taken):
        raise ValueError("no class has more than 2 training images, and k is chosen on a fifth of them; give more, or leave "
                         "out kind=knn")
    candidates = [k for k in NEIGHBOURS if k <= len(kept)]
    likeness, index = nearest(train[0][taken], train[0][kept], candidates[-1])
    labels, right = train[1][kept][index], train[1][taken]  # (V, k), (V,)
    curve = []
    for k in candidates:
        for temperature in TEMPERATURES:
            guesses = weighted_votes(likeness[:, :k], labels[:, :k], num_classes, temperature).argmax(dim=1)  # (V,)
            curve.append((k, temperature, (guesses == right).double().mean().item()))
    k, temperature, _ = max(curve, key=lambda tried: (tried[2], tried[0], tried[1]))
    likeness, index = nearest(test[0], train[0], k)
    votes = weighted_votes(likeness, train[1][index], num_classes, temperature)
    return NearestVote(votes, k, temperature, tuple(curve), len(taken))


@torch.no_grad()
def nearest(queries: Tensor, targets: Tensor, k: int, *, chunk_size: int | None = None) -> tuple[Tensor, Tensor]:
    """Find the k targets most like each query, exactly; of equally alike ones those of lower index.

    Args:
      queries: (Q, D), unit norm.
      targets: (N, D), unit norm.
      k: at most N.
      chunk_size: queries that are scored at once; bounds the memory, leaves the result. None = SCORES_AT_ONCE scores.

    Returns:
      Their cosines (Q, k) fp32, falling; their indices (Q, k) int64.
    """
    chunk_size = chunk_size or max(1, SCORES_AT_ONCE // len(targets))
    parts = []
    for chunk in queries.split(chunk_size):
        scores = chunk.float() @ targets.float().T  # (chunk, N)
        least = scores.topk(k).values[:, -1:]  # (chunk, 1) topk alone leaves open which of equals it takes
        above, level = scores > least, scores == least  # (chunk, N)
        found = above | (level & (level.cumsum(dim=1) <= k - above.sum(dim=1, keepdim=True)))  # k in a row
        index = found.nonzero()[:, 1].view(-1, k)  # rising
        likeness, order = scores.gather(1, index).sort(dim=1, descending=True, stable=True)
        parts.append((likeness, index.gather(1, order)))
    likeness, index = (torch.cat(column) for column in zip(*parts, strict=True))
    return likeness, index


def weighted_votes(likeness: Tensor, labels: Tensor, num_classes: int, temperature: float) -> Tensor:
    """Add up the votes of neighbours.

    Args:
      likeness: (Q, k) cosines, falling.
      labels: (Q, k) int64 classes of the neighbours.
      num_classes: C.
      temperature: > 0.

    Returns:
      (Q, C) float64, a row adds up to 1.
    """
    weights = ((likeness - likeness[:, :1]).double() / temperature).exp()  # (Q, k) the first is 1
    votes = weights.new_zeros(len(labels), num_classes).scatter_add_(1, labels, weights)
    return votes / votes.sum(dim=1, keepdim=True)
