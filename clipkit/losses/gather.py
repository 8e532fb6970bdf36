"""Rows of all processes, with the gradient going back to the process that owns them."""

import torch
import torch.distributed as dist
from torch import Tensor


def rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class _GatherRows(torch.autograd.Function):
    """Concatenate equal-sized row blocks; backward sums each block's gradients over all processes."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, rows: Tensor) -> Tensor:
        gathered = rows.new_empty(world_size() * len(rows), *rows.shape[1:])  # (G, ...)
        dist.all_gather_into_tensor(gathered, rows.contiguous())
        return gathered

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> Tensor:  # ((G, ...),) -> (B, ...)
        return sum_to_owners(grads[0].contiguous())


def gather_with_grad(rows: Tensor) -> Tensor:
    """Concatenate the rows of all processes in rank order.

    Args:
      rows: (B, ...), the same B on every process.

    Returns:
      (G, ...), G = world size x B. A process's gradient is the sum of all processes' gradients of its rows, so that the
      mean that DDP takes over processes is the gradient of the mean loss.
    """
    return rows if world_size() == 1 else _GatherRows.apply(rows)  # pyright: ignore[reportReturnType]


def gather(rows: Tensor) -> Tensor:
    """Concatenate the rows of all processes in rank order, without gradient. (B, ...) -> (G, ...)."""
    with torch.no_grad():
        return gather_with_grad(rows)


def sum_to_owners(grads: Tensor) -> Tensor:
    """Sum what each process has for the rows of all; each gets its own rows. Writes to `grads`. (G, ...) -> (B, ...)."""
    if world_size() == 1:
        return grads
    if dist.get_backend() == "gloo":  # has no reduce-scatter
        dist.all_reduce(grads)
        return grads.chunk(world_size())[rank()]
    own = grads.new_empty(len(grads) // world_size(), *grads.shape[1:])
    dist.reduce_scatter_tensor(own, grads)
    return own


def add_exp_of_processes(peaks: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
    """Add sums x exp(peaks) over all processes without overflow; returns the highest peaks and the sums to them. (N,), (N,)."""
    if world_size() == 1:
        return peaks, sums
    highest = peaks.clone()  # (N,)
    dist.all_reduce(highest, dist.ReduceOp.MAX)
    total = sums * (peaks - highest).exp_()  # (N,)
    dist.all_reduce(total)
    return highest, total
