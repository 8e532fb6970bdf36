"""Faults that arise inside a rank or its workers. Each function returns what a rank calls before it begins."""

import os
import resource
import signal
import time
from collections.abc import Callable
from typing import Any

from scripts.faults.ranks import Hook


def sleeps(rank: int, step: int, seconds: float) -> Hook:
    """A rank that sleeps before the loss of a step."""
    return _at_loss(rank, step, lambda loss: time.sleep(seconds) or loss)


def loss_is_nan(rank: int, step: int, *, for_ever: bool = False) -> Hook:
    """A rank whose loss is NaN in a step, or from it on; so are its gradients."""
    return _at_loss(rank, step, lambda loss: loss * float("nan"), for_ever=for_ever)


def step_left_out(step: int) -> Hook:
    """All ranks pass over one update: what a step with NaN has to come to."""
    def install(_rank: int) -> None:
        import torch

        from clipkit.training import optim

        update, calls = optim.optimizer_step, 0

        def update_or_not(optimizer: Any, grad_norm: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls != step:
                return update(optimizer, grad_norm)
            optimizer.zero_grad(set_to_none=True)
            return torch.ones(())

        optim.optimizer_step = update_or_not
    return install


def _at_loss(rank: int, step: int, change: Callable[[Any], Any], *, for_ever: bool = False) -> Hook:
    def install(this_rank: int) -> None:
        from clipkit import losses

        make, calls = losses.make_loss, 0

        def make_changed(*arguments: Any, **named: Any) -> Any:
            loss_function = make(*arguments, **named)

            def changed(*features: Any, **options: Any) -> Any:
                nonlocal calls
                calls += 1
                now = calls == step or (for_ever and calls > step)
                loss = loss_function(*features, **options)
                return change(loss) if now and this_rank == rank else loss
            return changed

        losses.make_loss = make_changed
    return install


def worker_out_of_memory(rank: int, worker: int, sample: int, how: str) -> Hook:
    """A loader worker that meets the end of memory at its n-th sample."""
    def install(this_rank: int) -> None:
        from torch.utils.data import get_worker_info

        from clipkit.data.parts import GoodExamples

        following, calls = GoodExamples.__next__, 0

        def next_example(self: Any) -> Any:
            nonlocal calls
            calls += 1
            info = get_worker_info()
            if calls == sample and this_rank == rank and info is not None and info.id == worker:
                OUT_OF_MEMORY[how]()
            return following(self)

        GoodExamples.__next__ = next_example
    return install


def _raise() -> None:
    raise MemoryError


def _limit() -> None:
    """The system refuses the next large piece."""
    with open("/proc/self/statm", encoding="ascii") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**20, resource.RLIM_INFINITY))
    bytearray(2**28)


def _kill() -> None:
    """As the kernel's OOM killer ends a process."""
    os.kill(os.getpid(), signal.SIGKILL)


OUT_OF_MEMORY: dict[str, Callable[[], None]] = {"MemoryError": _raise, "RLIMIT_AS": _limit, "killed": _kill}
