"""A module as it is called in training: wrapped for several processes, or compiled. Its weights stay where they are."""

from typing import Any

from torch import compile as compile_module
from torch import nn

from clipkit.training.distributed import Process


def make_parallel(module: nn.Module, process: Process, *, compile: bool) -> Any:
    """Wrap a module so that its gradients are averaged over the processes (DDP), and compile it, as asked."""
    parallel = module
    if process.world_size > 1:
        # without device_ids, so that DDP moves no inputs: tokens may stay on the host (model/trim.py)
        parallel = nn.parallel.DistributedDataParallel(module)
    return compile_module(parallel) if compile else parallel
