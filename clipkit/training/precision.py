"""The arithmetic of the forward pass."""

import dataclasses
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch

Config = TypeVar("Config", bound=Any)


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """Return the context of a forward pass: nothing for "fp32", bfloat16 autocast (fp32 weights) for "amp_bf16"."""
    if precision == "fp32":
        return nullcontext()
    assert precision == "amp_bf16", precision
    return torch.autocast(device.type, dtype=torch.bfloat16)


def with_precision(config: Config, device: torch.device | None) -> Config:
    """Write out what `train.precision=auto` means on a device (None = a large GPU): amp_bf16 with units for it, else fp32."""
    if config.train.precision != "auto":
        return config
    chosen = "amp_bf16" if device is None or multiplies_bf16(device) else "fp32"
    return dataclasses.replace(config, train=dataclasses.replace(config.train, precision=chosen))


def multiplies_bf16(device: torch.device) -> bool:
    """Whether a device has units for bfloat16. Without, products are emulated, and slower than in fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    cpu: Any = torch.cpu
    return device.type == "cpu" and (cpu._is_avx512_bf16_supported() or cpu._is_amx_tile_supported())
