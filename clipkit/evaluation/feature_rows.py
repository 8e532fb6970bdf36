"""Rows of features: made in evaluation mode and exact fp32, gathered from the processes, checked before anyone uses them."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from clipkit.training.distributed import from_main, gather_objects

Progress = Callable[[int, int | None], None]  # (done, total or None), judged by this process's share


@contextmanager
def exact_fp32() -> Iterator[None]:
    """Run the block, or a function that this decorates, with products of fp32 in fp32; what was set before comes back."""
    backends: Any = torch.backends
    # Where they may be rounded to TF32 (10 bits; of convolutions on CUDA that is the default) or to bfloat16.
    rounding = (backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn, backends.mkldnn.matmul, backends.mkldnn.conv)
    before = [backend.fp32_precision for backend in rounding]
    for backend in rounding:
        backend.fp32_precision = "ieee"
    try:
        yield
    finally:
        for backend, precision in zip(rounding, before, strict=True):
            backend.fp32_precision = precision


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Run the block in evaluation mode, exact fp32 and without gradients; give every module its mode back."""
    modes = [(module, module.training) for module in model.modules()]
    device = next(model.parameters()).device.type
    model.eval()
    try:
        with torch.no_grad(), torch.autocast(device, enabled=False), exact_fp32():
            yield
    finally:
        for module, training in modes:
            module.training = training


def gather_rows(rows: Tensor) -> Tensor:
    """Collect the rows of every process, in rank order, on every process; their numbers may differ, and be 0."""
    if not dist.is_initialized():
        return rows
    shapes = gather_objects(tuple(rows.shape))
    padded = rows.new_zeros([max(shape[axis] for shape in shapes) for axis in range(rows.ndim)])
    padded[tuple(slice(size) for size in rows.shape)] = rows
    parts = [torch.empty_like(padded) for _ in shapes]
    dist.all_gather(parts, padded)
    return torch.cat([part[:shape[0]] for part, shape in zip(parts, shapes, strict=True)])


def share_rows(rows: Tensor, device: torch.device) -> Tensor:
    """Give every process the first one's tensor, on the device."""
    if not dist.is_initialized():
        return rows
    shape, dtype = from_main((tuple(rows.shape), rows.dtype))
    shared = rows.to(device) if dist.get_rank() == 0 else torch.empty(shape, dtype=dtype, device=device)
    dist.broadcast(shared, src=0)
    return shared


def ranks_of(spread: bool) -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if spread and dist.is_initialized() else (0, 1)


def refuse_not_finite(features: Tensor, name_of: Callable[[int], str]) -> None:
    """Raise for features (N, ...) with NaN or infinity; name the first row that has any."""
    bad = ~features.isfinite().all(dim=-1)  # (N,)
    if bad.any():
        raise ValueError(f"features hold NaN or infinity ({int(bad.sum())} of {len(bad)} rows, the first: "
                         f"{name_of(int(bad.int().argmax()))}); the model cannot be measured: look at its weights and inputs")


def warn_if_not_kept(keep: Callable[[], Any]) -> bool:
    """Write to the store; what cannot be kept is no reason to lose a result."""
    try:
        keep()
    except OSError as error:
        warnings.warn(f"features are not kept for the next time: {error}", stacklevel=3)
        return False
    return True
