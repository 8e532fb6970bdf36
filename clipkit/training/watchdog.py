"""Says in one line which of several processes is lost or late, at which step, and ends the wait for it.

A thread of each process tells the store that the processes met in, every second, how far its process is. It asks nothing of
the device, so it speaks also where a collective hangs, on any backend.
"""

import contextlib
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from clipkit.training.stop import EXIT_STOPPED

BEAT_SECONDS = 1.0
ORDER = "watchdog/order"
SILENT_SECONDS = 4.0  # a process whose beat stands still for so long is gone: killed, stopped, or without its machine
WAITS_IN = ("torch/distributed/", "torch/autograd/graph.py")  # where the main thread is while it waits for the others
MAX_WORDS = 500  # of an error that is handed on
TOO_LONG = "the step took too long"
AGAIN = "run the same command again to go on from the last checkpoint"


class LostProcessError(ConnectionError):
    """Another process is gone, failed or late; the text names it and the step."""

    exit_code = EXIT_STOPPED  # a scheduler may start the same command again


class Beat(NamedTuple):
    """How far a process is."""

    number: int  # of the beat
    step: int  # in work, from 1
    place: str  # of its main thread
    waits: bool  # for the others


class Watchdog:
    """Watches the processes from one of them, between start() and stop()."""

    def __init__(self, *, rank: int, world_size: int, timeout_seconds: float, store: Any) -> None:
        """
        Args:
          rank, world_size: Of this process.
          timeout_seconds: How long a step may take; longer, and this process ends with one line.
          store: A torch.distributed store that all processes share.
        """
        self.rank, self.world_size, self.timeout_seconds = rank, world_size, timeout_seconds
        self.store: Any = store.clone()  # a connection of its own: the main thread's may be busy for long
        self.keeper = "the launcher" if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else "rank 0"  # of the store
        self.step, self.number = 1, 0
        self.deadline: float | None = None
        self.order = ""  # to end, and why: the same words on all processes
        self.ended = threading.Event()
        self.verdict = threading.Lock()  # whoever has it, of the two threads, speaks for this process; never given back
        self.launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        self.main_thread = threading.main_thread().ident or 0
        self.thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> None:
        self.thread.start()

    def stop(self) -> None:
        self.ended.set()
        self.thread.join()

    def step_done(self, step: int, *, pause: bool) -> None:
        """Take note of a finished step. After a `pause` (an evaluation, a save) the next step has no time limit."""
        self.step = step + 1
        self.deadline = None if pause else time.monotonic() + self.timeout_seconds

    def fail(self, error: BaseException) -> None:
        """Tell the others why this process ends: they end too, with these words."""
        self.verdict.acquire()
        own_words = str(error).partition("Original Traceback")[0]  # behind it comes a loader worker's
        words = " ".join(own_words.split())[:MAX_WORDS] or type(error).__name__
        self._give_order(f"rank {self.rank} failed at step {self.step}: {words}")

    def explain(self, cause: str) -> str:
        """Say who is to blame when the others cannot be reached, in one line; takes some seconds.

        Args:
          cause: What the main thread met, for the case that nobody is found.
        """
        self.verdict.acquire()
        return self._find(cause)

    def _watch(self) -> None:
        while not self.ended.wait(BEAT_SECONDS):
            self._beat()
            if self.order:
                self._end()  # the main thread had a beat's time to meet the end by itself
            self.order = self._ordered()
            if self.launcher and os.getppid() != self.launcher:  # nobody would end this process, or collect its error
                self.launcher = None
                print(f"clipkit: the launcher of rank {self.rank} is gone: stopping", file=sys.stderr, flush=True)
                os.kill(os.getpid(), signal.SIGTERM)
            if self.deadline and time.monotonic() > self.deadline:
                self._end()

    def _end(self) -> None:
        """End this process from beside its main thread, which may never come back, unless that one does so itself."""
        if not self.verdict.acquire(blocking=False):
            return
        print(f"clipkit: {self.order or self._find(TOO_LONG)}", file=sys.stderr, flush=True)
        for worker in multiprocessing.active_children():
            worker.kill()
        os._exit(EXIT_STOPPED)

    def _beat(self) -> None:
        self.number += 1
        place, waits = where_is(sys._current_frames().get(self.main_thread))
        met_error = sys._current_exceptions().get(self.main_thread) not in (None, (None, None, None))  # on its way out
        beat = Beat(self.number, self.step, place, waits or met_error)
        if self.store is not None:
            try:
                self.store.set(f"watchdog/{self.rank}", json.dumps(beat))
            except RuntimeError:  # with its keeper
                self.store = None
                if self.keeper == "rank 0":
                    self.deadline = time.monotonic() + SILENT_SECONDS

    def _beats(self) -> dict[int, Beat]:
        """The last beats of all processes that ever had one."""
        keys = {rank: f"watchdog/{rank}" for rank in range(self.world_size)}
        return {rank: Beat(*json.loads(self.store.get(key))) for rank, key in keys.items() if self.store.check([key])}

    def _ordered(self) -> str:
        with contextlib.suppress(RuntimeError, AttributeError):  # the store is gone
            return self.store.get(ORDER).decode() if self.store.check([ORDER]) else ""
        return ""

    def _give_order(self, words: str) -> str:
        """Let all processes end with these words, unless they were told others before; returns what they are told."""
        with contextlib.suppress(RuntimeError, AttributeError):
            words = self.store.compare_set(ORDER, "", words).decode()
            if self.rank == 0:
                time.sleep(3 * BEAT_SECONDS)  # it may keep the store, which the others have to read first
        return words

    def _find(self, cause: str) -> str:
        with contextlib.suppress(RuntimeError, AttributeError):
            before = after = self._beats()
            until = time.monotonic() + SILENT_SECONDS
            while time.monotonic() < until and not self._ordered() and not moved(before, after, self.world_size):
                time.sleep(BEAT_SECONDS / 4)
                self._beat()
                after = self._beats()
            return self._give_order(blame(before, after, world_size=self.world_size, own_rank=self.rank, cause=cause,
                                          timeout_seconds=self.timeout_seconds))
        return f"rank {self.rank} at step {self.step} cannot reach the others ({self.keeper} is gone: {cause}); {AGAIN}"


def moved(before: Mapping[int, Beat], after: Mapping[int, Beat], world_size: int) -> bool:
    """Whether every process has had a beat since."""
    return all(rank in after and after[rank] != before.get(rank) for rank in range(world_size))


def blame(before: Mapping[int, Beat], after: Mapping[int, Beat], *, world_size: int, own_rank: int, cause: str,
          timeout_seconds: float) -> str:
    """Name the processes that the others wait for: those that are silent, else those that are the furthest behind.

    Args:
      before, after: {rank: its last beat}, some seconds apart.
      world_size: How many there should be.
      own_rank: Of this process, which is there.
      cause: What this process met.
      timeout_seconds: How long was waited.

    Returns:
      One line.
    """
    here = after.get(own_rank, Beat(0, 1, "", False)).step
    silent = [rank for rank in range(world_size)
              if rank != own_rank and (rank not in after or after[rank] == before.get(rank))]
    if silent:
        step = min((after[rank].step for rank in silent if rank in after), default=here)
        return f"{_ranks(silent)} gone at step {step} (killed, stopped, or without its machine); {AGAIN}"
    last = min(beat.step for beat in after.values())
    behind = {rank: beat for rank, beat in after.items() if beat.step == last}
    late = {rank: beat for rank, beat in behind.items() if not beat.waits} or behind
    if len(late) == world_size and cause != TOO_LONG:
        return f"the processes lost each other at step {last} ({cause}); {AGAIN}"
    places = "; ".join(f"rank {rank} is in {beat.place}" for rank, beat in sorted(late.items()))
    return (f"{_ranks(sorted(late))} late: step {last} was not done in {timeout_seconds:g} s (parallel.timeout_seconds; "
            f"{places}); {AGAIN}, or raise parallel.timeout_seconds if it only is slow")


def where_is(frame: FrameType | None) -> tuple[str, bool]:
    """The innermost place outside of torch that a thread is in, and whether it waits for other processes."""
    waits = False
    while frame is not None:
        path = Path(frame.f_code.co_filename).as_posix()
        waits = waits or any(part in path for part in WAITS_IN)
        if "/torch/" not in path:
            return f"{frame.f_code.co_name} ({Path(path).name}:{frame.f_lineno})", waits
        frame = frame.f_back
    return "torch", waits


def _ranks(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")
    return f"rank {shown} is" if len(ranks) == 1 else f"ranks {shown} are"
