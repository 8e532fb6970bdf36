"""Processes: who this one is, how they meet, and what they tell each other outside of the gradient."""

import datetime
import os
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist

Result = TypeVar("Result")


class Process(NamedTuple):
    """This process among all of a run."""

    rank: int
    world_size: int
    local_rank: int  # on this machine
    local_world_size: int  # processes on this machine
    device: torch.device
    watchdog: Any = None  # training.watchdog.Watchdog, where several processes train

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def ranks_from_environment() -> tuple[int, int, int, int]:
    """Return (rank, world size, local rank, local world size) as torchrun, Slurm or submitit's local launcher set them."""
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        return int(env["RANK"]), int(env["WORLD_SIZE"]), int(env.get("LOCAL_RANK", 0)), int(env.get("LOCAL_WORLD_SIZE", 1))
    if int(env.get("SLURM_NTASKS", 1)) > 1 and "SLURM_PROCID" in env:
        per_node = env.get("SLURM_NTASKS_PER_NODE") or env.get("SLURM_STEP_TASKS_PER_NODE", "1")  # "8", or "8(x2)"
        local_world_size = int(per_node.split("(")[0].split(",")[0])
        return int(env["SLURM_PROCID"]), int(env["SLURM_NTASKS"]), int(env.get("SLURM_LOCALID", 0)), local_world_size
    if int(env.get("SUBMITIT_LOCAL_NTASKS", 1)) > 1:
        local_rank, tasks = int(env["SUBMITIT_LOCAL_LOCALID"]), int(env["SUBMITIT_LOCAL_NTASKS"])
        return int(env["SUBMITIT_LOCAL_GLOBALID"]), tasks, local_rank, tasks
    return 0, 1, 0, 1


def start_process(device: str, timeout_seconds: float) -> Process:
    """Pick this process's device and join the others.

    Args:
      device: "auto" (the best there is), "cpu", "cuda" or "mps".
      timeout_seconds: How long a collective waits for the others before this process ends with an error.

    Raises:
      ValueError: the device is not there.
    """
    rank, world_size, local_rank, local_world_size = ranks_from_environment()
    if device == "auto":
        mps = torch.backends.mps.is_available() and world_size == 1
        device = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is cuda but torch finds no CUDA GPU here; give device=cpu, or install a CUDA build of torch")
    if device == "mps" and not torch.backends.mps.is_available():
        raise ValueError("device is mps but torch finds no Apple GPU here; give device=cpu")
    chosen = torch.device(device, local_rank) if device == "cuda" else torch.device(device)
    if device == "cuda":
        torch.cuda.set_device(chosen)
    if world_size > 1:
        os.environ.setdefault("MASTER_ADDR", os.environ.get("SLURM_LAUNCH_NODE_IPADDR", "127.0.0.1"))
        os.environ.setdefault("MASTER_PORT", "29500")
        dist.init_process_group("nccl" if device == "cuda" else "gloo", rank=rank, world_size=world_size,
                                timeout=datetime.timedelta(seconds=timeout_seconds))
    return Process(rank, world_size, local_rank, local_world_size, chosen)


def stop_process() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def gather_objects(value: Any) -> list[Any]:
    """Collect a small plain object (lists, dicts, numbers, text) of every process, in rank order, on every process."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def mean_over_processes(values: torch.Tensor) -> torch.Tensor:
    """Average a tensor over the processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(values)
        values /= dist.get_world_size()
    return values


def any_process(*wishes: bool) -> tuple[bool, ...]:
    """Whether any process has each wish; the same answer on all."""
    return tuple(map(any, zip(*gather_objects(wishes), strict=True)))


def from_main(value: Any, group: dist.ProcessGroup | None = None) -> Any:
    """Give every process the plain object that rank 0 has. `group`: of all processes; None = the default one."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values, src=0, group=group)
    return values[0]


def on_main(work: Callable[[], Result], group: dist.ProcessGroup | None = None) -> Result | None:
    """Let rank 0 do something that may fail. All processes call it, and wait. `group` as of `from_main`.

    Returns:
      What it gave, on rank 0; None on the others.

    Raises:
      OSError, ValueError: it failed so; on all processes.
    """
    result, error = None, None
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            result = work()
        except (OSError, ValueError) as caught:
            error = caught
    error = from_main(error, group)
    if error is not None:
        raise error
    return result


def wait_for_all() -> None:
    if dist.is_initialized():
        dist.barrier()
