"""How many CPU threads a step is fastest with."""

import os
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from clipkit.model.image_text import ImageTextModel
from clipkit.training.estimate import forward_backward

PROBE_ROWS = 64
WORTH = 0.9  # of the time with fewer threads: what does not save a tenth is left to loaders and other programs


def settle_threads(model: ImageTextModel, saved: Mapping[str, Any] | None, *, batch_size: int, workers: int,
                   local_world_size: int, precision: str) -> int:
    """Let torch use the number of threads that a few rows are fastest with, or that the run began with.

    Args:
      model: On the CPU.
      saved: State of the checkpoint that the run goes on from; another number would change the order of sums.
      batch_size: Rows of this process.
      workers: Loader processes of this process; they keep their cores.
      local_world_size: Processes on this machine.
      precision: As in training.

    Returns:
      The number.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    most = max(1, cores // local_world_size - workers)
    if saved and "threads" in saved:
        threads = int(saved["threads"])
    else:
        threads = fastest(lambda: forward_backward(model, rows=min(PROBE_ROWS, batch_size), precision=precision), most)
    torch.set_num_threads(threads)
    return threads


def fastest(work: Callable[[], object], most: int, clock: Callable[[], float] = time.perf_counter) -> int:
    """Try 1, 2, 4, ... threads, the last time of two for each; stop where more save less than a tenth."""
    best, best_seconds = 1, float("inf")
    for threads in (2**power for power in range(most.bit_length())):
        torch.set_num_threads(threads)
        for _ in range(2):  # the first time pays for what libraries set up once
            begin = clock()
            work()
            seconds = clock() - begin
        if seconds > WORTH * best_seconds:
            break
        best, best_seconds = threads, seconds
    return best
