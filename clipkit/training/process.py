"""A process that trains: its threads, its allocator, the others it works with; their loss and a worker's in one line."""

import contextlib
from collections.abc import Iterator

import torch
import torch.distributed as dist

from clipkit.training.allocator import keep_freed_memory
from clipkit.training.distributed import Process, start_process, stop_process
from clipkit.training.watchdog import LostProcessError, Watchdog


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
    try:
        process = start_process(device, timeout_seconds)
    except RuntimeError as error:
        if not is_of_the_network(error):
            raise
        raise LostProcessError(f"the processes did not meet ({first_line(error)}); see that all of them were started, with one "
                               "MASTER_ADDR, MASTER_PORT and WORLD_SIZE, and that they come within "
                               "parallel.timeout_seconds") from error
    if process.device.type == "cpu":
        keep_freed_memory()
    try:
        if process.world_size == 1:
            with worker_errors():
                yield process
        else:
            with worker_errors(), watched(process, timeout_seconds) as process_with_watchdog:
                yield process_with_watchdog
    finally:
        stop_process()


@contextlib.contextmanager
def watched(process: Process, timeout_seconds: float) -> Iterator[Process]:
    """Give a process its watchdog; errors of the network become one line that says which process is lost or late.

    Raises:
      LostProcessError: the others cannot be reached, or did not come in time.
    """
    watchdog = Watchdog(rank=process.rank, world_size=process.world_size, timeout_seconds=timeout_seconds,
                        store=dist.distributed_c10d._get_default_store())
    watchdog.start()
    try:
        yield process._replace(watchdog=watchdog)
    except RuntimeError as error:
        if is_of_the_network(error):
            raise LostProcessError(watchdog.explain(first_line(error))) from error
        watchdog.fail(error)
        raise
    except BaseException as error:
        watchdog.fail(error)
        raise
    finally:
        watchdog.stop()


@contextlib.contextmanager
def worker_errors() -> Iterator[None]:
    """Say in one line that a loader worker died.

    Raises:
      ChildProcessError: it did.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if "DataLoader worker" not in str(error):
            raise
        raise ChildProcessError(f"a loader worker failed ({first_line(error)}); it may have run out of memory, main or shared: "
                                "lower data.workers or data.block_samples, and run the same command again to go on from the "
                                "last checkpoint") from error


def is_of_the_network(error: RuntimeError) -> bool:
    """Whether a collective failed, and not what it was given."""
    return isinstance(error, dist.DistError) or any(word in str(error) for word in ("gloo/transport", "onnection closed"))


def first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
