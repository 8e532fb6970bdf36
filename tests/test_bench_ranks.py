"""Ranks of the benchmark over processes: their times are summed, and one that fails is told."""

import os
from types import SimpleNamespace

import pytest

from scripts.bench.ranks import on_ranks

pytestmark = pytest.mark.multiprocess


class StubTrainer:
    """Takes as many seconds as its rank plus one, and a hundred at the first step."""

    version = "stub 1"

    def __init__(self, failing: bool) -> None:
        if failing and os.environ["RANK"] == "1":
            os._exit(3)
        self.rank, self.done = int(os.environ["RANK"]), 0
        self.clock = SimpleNamespace(found=lambda: {"seconds": self.rank + 1 if self.done > 1 else 100, "memory": self.rank})

    def steps(self, number: int) -> None:
        assert os.environ["WORLD_SIZE"] == "2"
        self.done += number


def test_seconds_are_summed_over_ranks_and_memory_is_the_most_of_one():
    answer = on_ranks(StubTrainer, processes=2, steps=3, failing=False)
    assert answer == {"seconds": [3, 3, 3], "memory": 1, "version": "stub 1"}


def test_a_rank_that_fails_ends_the_others():
    with pytest.raises(RuntimeError, match="one of 2 ranks ended"):
        on_ranks(StubTrainer, processes=2, steps=1, failing=True)
