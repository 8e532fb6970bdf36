"""A process that trains: its threads, its allocator, and the others it works with."""

import contextlib
from collections.abc import Iterator

import torch

from clipkit.training.allocator import keep_freed_memory
from clipkit.training.distributed import Process, start_process, stop_process


@contextlib.contextmanager
def training_process(device: str, *, timeout_seconds: float, threads: int | None) -> Iterator[Process]:
    """Set this process up for training and meet the others; part from them at the end.

    Args:
      device: As in `start_process`.
      timeout_seconds: As there.
      threads: Of torch on the CPU; None = torch's own choice.
    """
    if threads:
        torch.set_num_threads(threads)
    process = start_process(device, timeout_seconds)
    if process.device.type == "cpu":
        keep_freed_memory()
    try:
        yield process
    finally:
        stop_process()
