"""Throughput and the share of time spent waiting for data. Evaluation and checkpoints can be left out of both."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, TypeVar

Item = TypeVar("Item")


class Rates(NamedTuple):
    samples_per_second: float
    data_wait_fraction: float  # of the time that was measured
    seconds: float  # measured time


class StepTimer:
    """Measures training between two calls of `take`. Asks nothing of the device: call `take` after a wait for it."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock
        self.start = clock()
        self.wait_seconds = 0.0
        self.paused_seconds = 0.0

    def batches(self, loader: Iterable[Item]) -> Iterator[Item]:
        """Yield the loader's batches, and measure the time that each was waited for; what came before them is left out."""
        iterator = iter(loader)
        self.take(0)
        while True:
            asked = self.clock()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            self.wait_seconds += self.clock() - asked
            yield batch

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out what happens inside: evaluation, checkpoints."""
        begin = self.clock()
        try:
            yield
        finally:
            self.paused_seconds += self.clock() - begin

    def take(self, samples: int) -> Rates:
        """Return the rates since the last call, in which `samples` were trained on, and begin anew."""
        end = self.clock()
        seconds = max(end - self.start - self.paused_seconds, 1e-9)
        rates = Rates(samples / seconds, min(1.0, self.wait_seconds / seconds), seconds)
        self.start, self.wait_seconds, self.paused_seconds = end, 0.0, 0.0
        return rates
