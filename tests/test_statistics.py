"""Intervals against scipy, and their limit cases."""

import pytest
import torch
from scipy.stats import binomtest

from clipkit.evaluation.statistics import clustered_interval, wilson_interval


@pytest.mark.parametrize(("hits", "n"), [(0, 10), (10, 10), (1, 3), (400, 1358), (49_999, 50_000)])
def test_the_wilson_interval_is_scipys(hits: int, n: int) -> None:
    expected = binomtest(hits, n).proportion_ci(0.95, method="wilson")
    assert wilson_interval(hits / n, n) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_an_interval_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="n is 0; an interval needs at least one trial"):
        wilson_interval(0.0, 0)


def test_clusters_of_one_give_the_plain_interval() -> None:
    hits = torch.rand(200, generator=torch.Generator().manual_seed(0)) < 0.3
    plain = wilson_interval(hits.double().mean().item(), 200)
    assert clustered_interval(hits, torch.arange(200)) == pytest.approx(plain)


def test_repeated_trials_count_once() -> None:
    hits = torch.rand(200, generator=torch.Generator().manual_seed(0)) < 0.3
    once = clustered_interval(hits, torch.arange(200))
    five_times = clustered_interval(hits.repeat_interleave(5), torch.arange(200).repeat_interleave(5))
    assert five_times == pytest.approx(once)


def test_a_clustered_interval_of_hits_alone_is_that_of_the_clusters() -> None:
    hits, clusters = torch.ones(50, dtype=torch.bool), torch.arange(10).repeat_interleave(5)
    assert clustered_interval(hits, clusters) == wilson_interval(1.0, 10)
