"""A contrastive loss over a batch whose activations do not fit at once, with the gradient of the whole batch."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from clipkit.model.image_text import Features
from clipkit.training.random_state import get_random_state, set_random_state


def cached_backward(model: Any, images: Tensor, tokens: Tensor, *, loss: Callable[..., Tensor], micro_batch_size: int,
                    autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
                    text_order: Tensor | None = None) -> tuple[Features, Tensor]:
    """Add a batch's gradients to a model's, holding the activations of one micro-batch at a time.

    All features are computed first, without a graph; the loss is taken once, over all of them and over all processes; then
    each micro-batch is computed again, with the random numbers that it had, and gets the gradient of its own features. One
    forward pass more than with the whole batch, and the same gradients, the temperature's too. DDP averages once, at the
    last micro-batch. Buffers, such as the running statistics of a BatchNorm, change once.

    Args:
      model: An ImageTextModel, or one wrapped in DDP or compiled.
      images: (B, 3, H, W).
      tokens: (B, L).
      loss: Takes image_features (B, D), text_features (B, D), logit_scale and logit_bias.
      micro_batch_size: Rows whose activations are held at once.
      autocast: Context of a forward pass.
      text_order: (B,) in which order the texts go through their tower, for instance by length; None = as they stand.

    Returns:
      The features of the batch, without a graph, and the loss.

    Source: Gao et al. 2021, gradient cache (arXiv:2101.06983).
    """
    device = images.device
    ordered = tokens if text_order is None else tokens[text_order]
    pieces = list(zip(images.split(micro_batch_size), ordered.split(micro_batch_size), strict=True))
    buffers = [buffer.clone() for buffer in model.buffers()]
    states, found = [], []
    with torch.no_grad(), autocast():
        for piece in pieces:
            states.append(get_random_state(device))
            found.append(model(*piece))
        for buffer, before in zip(model.buffers(), buffers, strict=True):
            buffer.copy_(before)
    image_features = torch.cat([features.image_features for features in found]).requires_grad_()  # (B, D)
    text_features = torch.cat([features.text_features for features in found]).requires_grad_()  # (B, D), in text_order
    last = found[-1]
    logit_scale = last.logit_scale.clone().requires_grad_()
    logit_bias = None if last.logit_bias is None else last.logit_bias.detach().clone().requires_grad_()
    own_order = text_features if text_order is None else text_features[text_order.argsort().to(device)]
    value = loss(image_features, own_order, logit_scale, logit_bias)
    value.backward()

    scalars = (logit_scale.grad, None if logit_bias is None else logit_bias.grad)
    for number, (piece, state) in enumerate(zip(pieces, states, strict=True)):
        rows = slice(number * micro_batch_size, (number + 1) * micro_batch_size)
        is_last = number == len(pieces) - 1
        wanted = (_rows(image_features.grad, rows), _rows(text_features.grad, rows), *(scalars if is_last else (None, None)))
        set_random_state(state, device)
        with _without_averaging(model, not is_last):
            with autocast():
                features = model(*piece)
            learned = [(tensor, grad) for tensor, grad in zip(features, wanted, strict=True)
                       if tensor is not None and grad is not None and tensor.requires_grad]
            torch.autograd.backward([tensor for tensor, _ in learned], [grad for _, grad in learned])
    return Features(image_features.detach(), own_order.detach(), logit_scale.detach(),
                    None if logit_bias is None else logit_bias.detach()), value.detach()


def _rows(grad: Tensor | None, rows: slice) -> Tensor | None:
    return None if grad is None else grad[rows]


def _without_averaging(model: Any, wanted: bool) -> AbstractContextManager[object]:
    """Within it, DDP's backward passes add gradients up on each process, and average nothing."""
    return model.no_sync() if wanted and isinstance(model, nn.parallel.DistributedDataParallel) else nullcontext()
