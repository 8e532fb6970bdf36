"""What a training step will cost, tried on a few rows before the first step."""

import time
from typing import NamedTuple

import torch
from torch import Tensor

from clipkit.model.image_text import ImageTextModel
from clipkit.training.precision import autocast

PROBE_ROWS = 16


class StepCost(NamedTuple):
    """Estimated cost of one step of one process."""

    memory_gb: float  # weights, gradients, optimizer state and activations
    seconds: float | None  # forward and backward; None on an accelerator, where few rows say little


def estimate_step(model: ImageTextModel, *, batch_size: int, precision: str, micro_batch_size: int | None = None,
                  optimizer_tensors: int = 2) -> StepCost:
    """Run a few rows forward and backward, in evaluation mode so that nothing in the model changes.

    Args:
      model: On its device.
      batch_size: Rows of this process.
      precision: As in training.
      micro_batch_size: Rows whose activations are held at once, at the price of one more forward pass; None = all.
      optimizer_tensors: Tensors that the optimizer and an average keep for each weight.
    """
    rows = min(PROBE_ROWS, batch_size)
    storages = {tensor.untyped_storage().data_ptr() for tensor in model.parameters()}
    kept: dict[int, int] = {}  # bytes of each storage that backward needs

    def remember(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    seconds, saved = 0.0, dict[int, int]()
    for tried in (max(1, rows // 2), rows):  # the first time pays for what libraries set up once
        begin = time.perf_counter()
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
            forward_backward(model, rows=tried, precision=precision)
        seconds = time.perf_counter() - begin
        saved[tried] = sum(size for storage, size in kept.items() if storage not in storages)
    weights = sum(tensor.nbytes for tensor in model.parameters())
    learning = sum(tensor.nbytes for tensor in model.parameters() if tensor.requires_grad)
    fewest, held = min(saved), min(micro_batch_size or batch_size, batch_size)
    per_row = (saved[rows] - saved[fewest]) / (rows - fewest) if rows > fewest else saved[rows] / rows
    activations = saved[rows] + per_row * (held - rows)  # what is as large for any batch, as a weight made anew, counts once
    passes = 4 / 3 if micro_batch_size else 1  # a backward pass costs about two forward passes
    return StepCost((weights + (1 + optimizer_tensors) * learning + activations) / 1e9,
                    passes * seconds * batch_size / rows if model.device.type == "cpu" else None)


def forward_backward(model: ImageTextModel, *, rows: int, precision: str) -> None:
    """Take black pictures and short texts forward and backward; the model is left as it was, without gradients."""
    images = torch.zeros(rows, 3, model.image_size, model.image_size, dtype=torch.uint8, device=model.device)  # (b, 3, H, W)
    tokens = model.tokenize(["a"]).expand(rows, -1)  # (b, L)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    with autocast(model.device, precision):
        features = model(images, tokens if model.trims_text else tokens.to(model.device))
    (features.image_features.sum() + features.text_features.sum() + features.logit_scale).backward()
    model.zero_grad(set_to_none=True)
    for module, training in modes:
        module.training = training
