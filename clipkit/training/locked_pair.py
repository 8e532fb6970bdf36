"""Training of two projections and a temperature on frozen features. No loader: the features fit into memory."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from clipkit.losses import in_batch_accuracy
from clipkit.training.optim import clip_gradient, optimizer_step, set_learning_rate

MAX_LOG_LOGIT_SCALE = 4.6052  # ln(100), Radford et al. 2021, section 2.5


class Pairs(NamedTuple):
    """A batch of frozen features. Legend: B batch, F and W widths."""

    image_features: Tensor  # (B, F)
    text_features: Tensor  # (B, W) unit norm
    group_ids: Tensor  # (B,) int64


class Step(NamedTuple):
    """What a step tells the log."""

    loss: float  # nats
    grad_norm: float
    logit_scale: float
    accuracy_image: float  # in the batch, before the step
    accuracy_text: float


def draw_pairs(images: Tensor, texts: Tensor, captions: Sequence[Tensor], group_ids: Tensor, *, batch_size: int,
               seed: int) -> Iterator[Pairs]:
    """Draw batches without end: each pass in a new order, of each picture one caption by chance.

    Args:
      images: (N, F), of N pictures.
      texts: (T, W), unit norm.
      captions: N, each the rows of a picture's captions in `texts`.
      group_ids: (N,).
      batch_size: B; what is left of a pass is passed over.
      seed: of the order and of all choices.
    """
    generator = torch.Generator().manual_seed(seed)
    num_captions = torch.tensor([len(rows) for rows in captions])  # (N,)
    rows_of = pad_sequence(list(captions), batch_first=True)  # (N, most captions of a picture)
    while True:
        order = torch.randperm(len(captions), generator=generator)  # (N,)
        for rows in order[: len(order) // batch_size * batch_size].split(batch_size):  # each (B,)
            chosen = (torch.rand(batch_size, generator=generator) * num_captions[rows]).long()  # (B,)
            yield Pairs(images[rows], texts[rows_of[rows, chosen]], group_ids[rows])


def train_step(projections: nn.Module, optimizer: torch.optim.Optimizer, pairs: Pairs, *, lr: float,
               loss_function: Callable[..., Tensor], masked: bool, max_grad_norm: float | None) -> Step:
    """Take one step.

    Args:
      projections: gives Features of (image_features, text_features); has `logit_scale`, a logarithm.
      optimizer: over its parameters.
      pairs: one batch.
      lr: learning rate of the step.
      loss_function: as `clipkit.losses.make_loss` gives it.
      masked: pairs of one group are no negatives of each other.
      max_grad_norm: as in `clip_gradient`.

    Raises:
      ValueError: the loss or a gradient is not finite.
    """
    set_learning_rate(optimizer, lr)
    features = projections(pairs.image_features, pairs.text_features)  # image_features (B, D), text_features (B, D), ...
    loss = loss_function(*features, group_ids=pairs.group_ids if masked else None)
    loss.backward()
    grad_norm = clip_gradient(list(projections.parameters()), max_grad_norm)
    if optimizer_step(optimizer, grad_norm).item():
        raise ValueError(f"the gradient is not finite (loss {loss.item():.3g}); give a smaller optim.lr than {lr:g}")
    logit_scale = projections.get_parameter("logit_scale")
    with torch.no_grad():
        logit_scale.clamp_(0, MAX_LOG_LOGIT_SCALE)
    accuracy_image, accuracy_text = in_batch_accuracy(features.image_features, features.text_features)
    return Step(loss.item(), grad_norm.item(), logit_scale.exp().item(), accuracy_image.item(), accuracy_text.item())
