"""The tensors of a checkpoint that all processes write, each its own parts, and that any number of processes reads.

torch.distributed.checkpoint does both, through its safetensors storage: what it has to know of the parts stands in the files'
own headers, as JSON. Its other storage keeps that in a pickle, and is never read here.
"""

import math
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from clipkit.training.optimizer_state import OptimizerState

PART = "shard-*.safetensors"  # as torch names the parts
OS_ERROR = re.compile(r"\[Errno (\d+)\]|os error (\d+)")


def has_parts(folder: Path) -> bool:
    return any(folder.glob(PART))


def write_parts(folder: Path, tensors: Mapping[str, Tensor], group: dist.ProcessGroup | None = None) -> None:
    """Write every process's parts into a folder; what all have is written once. All processes call it.

    Args:
      folder: It is there; all processes see it.
      tensors: Of distinct names, the same on all processes; shared out (DTensor) or whole.
      group: Of all processes, over which they agree who writes what; None = the default one.

    Raises:
      OSError: a process could not write; on all of them.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
            save(dict(tensors), storage_writer=writer, process_group=group)
    except CheckpointException as error:
        rank, (cause, _) = next(iter(error.failures.items()))
        number = getattr(cause, "errno", None) or next((int(a or b) for a, b in OS_ERROR.findall(str(cause))), None)
        raise OSError(number, f"process {rank}: {cause}") from error


def describe_parts(folder: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Read what tensors a folder's parts make up: {name: (shape, dtype)}.

    Raises:
      ValueError: a header is not as torch writes it, or parts are missing.
    """
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    try:
        found: dict[str, Any] = dict(HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata)
        for name, one in found.items():
            if sum(math.prod(chunk.sizes) for chunk in one.chunks) != math.prod(one.size) or min(one.size, default=0) < 0:
                raise ValueError(f"the parts of {name} do not make up its shape {list(one.size)}")
        return {name: (tuple(one.size), one.properties.dtype) for name, one in found.items()}
    except Exception as error:  # safetensors and json raise classes of their own
        raise _not_readable(folder, error) from error


def read_parts(folder: Path, into: Mapping[str, Tensor]) -> None:
    """Fill tensors, shared out or whole, each process its own parts, whatever number of processes wrote them.

    Raises:
      ValueError: a part is not there or not readable.
    """
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            load(dict(into), storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
    except Exception as error:  # CheckpointException holds those of safetensors and json
        raise _not_readable(folder, error) from error


def read_whole(folder: Path) -> dict[str, Tensor]:
    """Put all tensors of a folder's parts together, on the CPU."""
    tensors = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in describe_parts(folder).items()}
    read_parts(folder, tensors)
    return tensors


def with_kinds(kinds: Mapping[str, Mapping[str, Tensor] | None]) -> dict[str, Tensor]:
    """Name all tensors of a checkpoint in one dict: {"model.<name>": ..., "optimizer.<name>": ..., "ema.<name>": ...}."""
    return {f"{kind}.{name}": tensor for kind, named in kinds.items() for name, tensor in (named or {}).items()}


def room_for_state(described: Mapping[str, tuple[tuple[int, ...], torch.dtype]], description: Mapping[str, Any],
                   parameters: Mapping[str, Tensor]) -> OptimizerState:
    """Make empty tensors for a saved optimizer's state: those of a parameter's shape shared out as the parameter is.

    Args:
      described: As `describe_parts` gives it.
      description: Of the saved state, see `OptimizerState`.
      parameters: The parameters by name.
    """
    owners = {entry["tensor"]: parameters[name] for name, entries in description["state"].items() if name in parameters
              for entry in entries.values() if isinstance(entry, dict) and "tensor" in entry}
    tensors = {}
    for full_name, (shape, dtype) in described.items():
        kind, _, name = full_name.partition(".")
        owner = owners.get(name)
        if kind == "optimizer" and owner is not None and tuple(owner.shape) == shape:
            tensors[name] = torch.empty_like(owner, dtype=dtype, requires_grad=False)
        elif kind == "optimizer":
            tensors[name] = torch.empty(shape, dtype=dtype)
    return OptimizerState(tensors, dict(description))


def _not_readable(folder: Path, error: Exception) -> ValueError:
    cause = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return ValueError(f"the parts in {folder} are not readable ({cause}); use an older checkpoint")
