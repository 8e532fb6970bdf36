"""Exact ranking of targets by dot product, in chunks. In classification the targets are the class vectors."""

from typing import NamedTuple

import torch
from torch import Tensor

SCORES_AT_ONCE = 2**20  # of queries and targets, 4 MB in fp32


class Ranking(NamedTuple):
    """How each query's targets come out. Legend: Q queries."""

    rank: Tensor  # (Q,) int64 of the best target that belongs to the query, 0 = first
    guess: Tensor  # (Q,) int64, the first target
    tied: Tensor  # (Q,) bool: another target has exactly the score of the first


@torch.no_grad()
def rank_targets(queries: Tensor, targets: Tensor, query_groups: Tensor, target_groups: Tensor, *,
                 chunk_size: int | None = None) -> Ranking:
    """Rank all targets for each query, exactly, and say where the best one that belongs to it comes.

    Targets are ordered by falling score (fp32); equal scores by index, the lower first.

    Args:
      queries: (Q, D), unit norm.
      targets: (N, D), unit norm.
      query_groups: (Q,) int64.
      target_groups: (N,) int64; a target belongs to the queries with an equal group. Several may.
      chunk_size: queries that are scored at once; bounds the memory, leaves the result. None = SCORES_AT_ONCE scores.

    Raises:
      ValueError: a feature is not finite, or no target belongs to a query.
    """
    if not (queries.isfinite().all() and targets.isfinite().all()):
        raise ValueError("features hold NaN or infinity; the model cannot be measured: look at its weights and inputs")
    chunk_size = chunk_size or max(1, SCORES_AT_ONCE // max(1, len(targets)))
    # Filled in place: small results between the large freed parts would leave holes, and the heap would grow with each.
    numbers = torch.empty(2, len(queries), dtype=torch.int64, device=queries.device)
    ranking = Ranking(numbers[0], numbers[1], torch.empty(len(queries), dtype=torch.bool, device=queries.device))
    for start in range(0, len(queries), chunk_size):
        rows = slice(start, start + chunk_size)
        chunk, groups = queries[rows], query_groups[rows]
        scores = chunk.float() @ targets.float().T  # (chunk, N)
        belongs = groups[:, None] == target_groups[None, :]  # (chunk, N)
        if not belongs.any(dim=1).all():
            raise ValueError("a query has no target that belongs to it; each needs at least one")
        found = rank_scores(scores, belongs)
        ranking.rank[rows], ranking.guess[rows], ranking.tied[rows] = found
    return ranking


def rank_scores(scores: Tensor, belongs: Tensor) -> Ranking:
    """Rank targets by given scores (Q, N); belongs (Q, N) bool: which are right, at least one in a row."""
    index = torch.arange(scores.shape[1], device=scores.device)  # (N,)
    at_top = scores == scores.amax(dim=1, keepdim=True)  # (Q, N)
    best_score = scores.masked_fill(~belongs, -torch.inf).amax(dim=1, keepdim=True)  # (Q, 1)
    as_good = scores == best_score  # (Q, N)
    best_index = (belongs & as_good).to(torch.uint8).argmax(dim=1, keepdim=True)  # (Q, 1) the first of equals
    ahead = (scores > best_score) | (as_good & (index < best_index))  # (Q, N)
    return Ranking(ahead.sum(dim=1), at_top.to(torch.uint8).argmax(dim=1), at_top.sum(dim=1) > 1)


def best_ranks(queries: Tensor, targets: Tensor, query_groups: Tensor, target_groups: Tensor, *,
               chunk_size: int | None = None) -> Tensor:
    """Return the ranks (Q,) alone; a query is a hit at k if its rank is below k. Arguments as in `rank_targets`."""
    return rank_targets(queries, targets, query_groups, target_groups, chunk_size=chunk_size).rank


def recall_at(ranks: Tensor, k: int) -> float:
    """Return the share of queries whose rank (0 = first) is below k."""
    return (ranks < k).double().mean().item()
