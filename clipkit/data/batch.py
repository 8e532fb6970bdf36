"""What the loader hands to the training step."""

from typing import NamedTuple

import torch
from torch import Tensor


class Batch(NamedTuple):
    """The rows that one process holds of a global batch. Legend: B batch (this process), L tokens, H W pixels."""

    images: Tensor  # (B, 3, H, W) uint8, RGB, channels last in memory
    tokens: Tensor  # (B, L) int32, padded to the context length
    group_ids: Tensor  # (B,) int64; equal ids are no negatives of each other
    teacher_ids: Tensor = torch.empty(0, 0, dtype=torch.int64)  # (B, 2) int64, of picture and caption; (B, 0) without a teacher
