"""The arithmetic of the forward pass."""

from contextlib import AbstractContextManager, nullcontext

import torch


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """Return the context of a forward pass: nothing for "fp32", bfloat16 autocast (fp32 weights) for "amp_bf16"."""
    if precision == "fp32":
        return nullcontext()
    assert precision == "amp_bf16", precision
    return torch.autocast(device.type, dtype=torch.bfloat16)
