"""What is due after a step: a log line, an evaluation, a checkpoint, the end. All processes decide alike."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

from clipkit.training.distributed import any_process


class Due(NamedTuple):
    log: bool
    evaluation: bool
    checkpoint: bool
    stop: bool


class Timetable:
    """Tells after each step what is due.

    Wishes that one process alone has (a signal, the clock) are agreed on at log steps, so that the processes talk, and
    the host waits for the device, only there; a single process need not ask and acts at once.
    """

    def __init__(self, *, total_steps: int, log_every: int, evaluate_every: int | None, checkpoint_steps: int | None,
                 checkpoint_minutes: float | None, world_size: int = 1, watchdog: Any = None,
                 clock: Callable[[], float] = time.monotonic) -> None:
        self.total_steps, self.log_every = total_steps, log_every
        self.evaluate_every = evaluate_every or max(1, total_steps // 8)
        self.checkpoint_steps, self.checkpoint_minutes = checkpoint_steps, checkpoint_minutes
        self.world_size, self.watchdog, self.clock, self.saved_at = world_size, watchdog, clock, clock()

    def after(self, done: int, *, stop: bool) -> Due:
        """Tell what is due when `done` steps are done and this process was asked to stop, or not."""
        last = done == self.total_steps
        log = last or done % self.log_every == 0
        overdue = self.checkpoint_minutes is not None and self.clock() - self.saved_at > 60 * self.checkpoint_minutes
        if self.world_size > 1:
            stop, overdue = any_process(stop, overdue) if log else (False, False)
        regular = self.checkpoint_steps is not None and done % self.checkpoint_steps == 0
        checkpoint = last or regular or overdue or stop
        if checkpoint:
            self.saved_at = self.clock()
        evaluation = done % self.evaluate_every == 0 and not last  # the last weights have the final evaluation
        if self.watchdog:
            self.watchdog.step_done(done, pause=evaluation or checkpoint or last)
        return Due(log, evaluation, checkpoint, stop and not last)
