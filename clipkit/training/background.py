"""Writing beside training: one piece of work at a time, in a thread, on copies of what is written."""

import threading
from collections.abc import Callable, Mapping
from typing import Any

import torch.distributed as dist
from torch import Tensor

from clipkit.training.distributed import gather_objects

LAST_WAIT_SECONDS = 5.0


class BackgroundWriter:
    """Runs work beside the training of all processes. All processes make it, start and wait together.

    Attributes:
      group: Of all processes, for what the work has to agree on: training uses the default one at the same time.
    """

    def __init__(self) -> None:
        self.group: Any = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def start(self, work: Callable[[], None]) -> None:
        """Begin a piece of work; the one before is done (`wait`)."""
        assert self._thread is None

        def run() -> None:
            try:
                work()
            except Exception as error:  # told by wait()
                self._error = error

        # A daemon: a process that ends by an error does not wait; what it leaves unfinished is removed when the run goes on.
        self._thread = threading.Thread(target=run, name="checkpoint", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Wait until the work is done, on all processes.

        Raises:
          OSError, ValueError: it failed, on any process; on all of them.
        """
        if self._thread is not None:
            self._thread.join()
        error, self._thread, self._error = self._error, None, None
        for one in gather_objects(error):
            if one is not None:
                raise one

    def close(self) -> None:
        """Let this process's work end, after an error too; where others may be gone, for a few seconds only."""
        if self._thread is not None:
            self._thread.join(None if self.group is None else LAST_WAIT_SECONDS)


def copies_on_host(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Copy tensors, whole or shared out, to the host's memory: training may change its own at once."""
    if any(tensor.is_cuda for tensor in tensors.values()):
        from torch.distributed.checkpoint.staging import BlockingAsyncStager

        return BlockingAsyncStager(cache_staged_state_dict=False).stage(dict(tensors))
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}
