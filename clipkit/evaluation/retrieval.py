"""Exact ranking of targets by dot product, in chunks. In classification the targets are the class vectors."""

from typing import NamedTuple

import torch
from torch import Tensor


class Ranking(NamedTuple):
    """How each query's targets come out. Legend: Q queries."""

    rank: Tensor  # (Q,) int64 of the best target that belongs to the query, 0 = first
    guess: Tensor  # (Q,) int64, the first target
    tied: Tensor  # (Q,) bool: another target has exactly the score of the first


@torch.no_grad()
def rank_targets(queries: Tensor, targets: Tensor, query_groups: Tensor, target_groups: Tensor, *,
                 chunk_size: int = 1024) -> Ranking:
    """Rank all targets for each query, exactly, and say where the best one that belongs to it comes.

    Targets are ordered by falling score (fp32); equal scores by index, the lower first.

    Args:
      queries: (Q, D), unit norm.
      targets: (N, D), unit norm.
      query_groups: (Q,) int64.
      target_groups: (N,) int64; a target belongs to the queries with an equal group. Several may.
      chunk_size: queries that are scored at once; bounds the memory, leaves the result.

    Raises:
      ValueError: a feature is not finite, or no target belongs to a query.
    """
    if not (queries.isfinite().all() and targets.isfinite().all()):
        raise ValueError("features hold NaN or infinity; the model cannot be measured: look at its weights and inputs")
    index = torch.arange(len(targets), device=targets.device)  # (N,)
    parts = []
    for chunk, groups in zip(queries.split(chunk_size), query_groups.split(chunk_size), strict=True):
        scores = chunk.float() @ targets.float().T  # (chunk, N)
        belongs = groups[:, None] == target_groups[None, :]  # (chunk, N)
        if not belongs.any(dim=1).all():
            raise ValueError("a query has no target that belongs to it; each needs at least one")
        best_score = scores.masked_fill(~belongs, -torch.inf).amax(dim=1, keepdim=True)  # (chunk, 1)
        best_index = torch.where(belongs & (scores == best_score), index, len(targets)).amin(dim=1, keepdim=True)
        ahead = (scores > best_score) | ((scores == best_score) & (index < best_index))  # (chunk, N)
        at_top = scores == scores.amax(dim=1, keepdim=True)  # (chunk, N)
        parts.append(Ranking(ahead.sum(dim=1), at_top.int().argmax(dim=1), at_top.sum(dim=1) > 1))
    return Ranking(*(torch.cat(column) for column in zip(*parts, strict=True)))


def best_ranks(queries: Tensor, targets: Tensor, query_groups: Tensor, target_groups: Tensor, *,
               chunk_size: int = 1024) -> Tensor:
    """Return the ranks (Q,) alone; a query is a hit at k if its rank is below k. Arguments as in `rank_targets`."""
    return rank_targets(queries, targets, query_groups, target_groups, chunk_size=chunk_size).rank


def recall_at(ranks: Tensor, k: int) -> float:
    """Return the share of queries whose rank (0 = first) is below k."""
    return (ranks < k).double().mean().item()
