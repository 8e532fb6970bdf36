"""Texts and images of a task to features, on one process or spread over all of them. Evaluation mode, fp32."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from clipkit.data.tars import BadSample
from clipkit.evaluation.tasks import Task, TaskSample, read_task
from clipkit.model.image_text import ImageTextModel, stack_images
from clipkit.training.distributed import gather_objects


class EncodedTask(NamedTuple):
    """The images of a task in the task's order. Legend: N images, D embed_dim."""

    image_features: Tensor  # (N, D) unit norm, on the model's device
    labels: Tensor  # (N,) int64 class of each image; of a retrieval task its number
    captions: list[tuple[str, ...]]  # of each image; empty in a classification task
    num_bad: Counter[str]  # samples left out, by cause


def encode_task(model: ImageTextModel, task: Task, *, batch_size: int, spread: bool = False) -> EncodedTask:
    """Encode all images of a task.

    Args:
      model: encodes the images; left in the mode it was in.
      task: names the shards.
      batch_size: images that are encoded at once.
      spread: over all processes: each encodes its share, and each gets the whole. All of them must call this.

    Raises:
      ValueError: no image of the task can be used.
    """
    rank, world_size = _ranks(spread)
    positions, labels, captions, num_bad = [], [], [], Counter()
    parts = [torch.empty(0, 0, device=model.device)]
    with evaluation_mode(model):
        for samples in _batches(read_task(task, rank=rank, world_size=world_size), batch_size, num_bad):
            parts.append(model.encode_image(stack_images(model, [sample.image for sample in samples])))  # (batch, D)
            positions += [sample.position for sample in samples]
            labels += [sample.label for sample in samples]
            captions += [sample.captions for sample in samples]
    features = torch.cat([part for part in parts if len(part)] or parts)  # (this process's share of N, D)
    if spread:
        features = gather_rows(features)  # (N, D)
        shares = gather_objects((positions, labels, captions, num_bad))
        positions, labels, captions = ([item for share in shares for item in share[field]] for field in range(3))
        num_bad = sum((share[3] for share in shares), Counter())
    if not positions:
        raise ValueError(f"task {task.name} has no image that can be used (bad samples: {dict(num_bad) or 'none'})")
    order = sorted(range(len(positions)), key=positions.__getitem__)
    labels = [labels[row] for row in order] if task.classes else list(range(len(order)))
    return EncodedTask(features[torch.tensor(order, device=features.device)],
                       torch.tensor(labels, device=features.device), [captions[row] for row in order], num_bad)


def encode_texts(model: ImageTextModel, texts: Sequence[str], *, batch_size: int, spread: bool = False) -> Tensor:
    """Encode texts; equal ones once.

    Args:
      model: encodes the texts; left in the mode it was in.
      texts: N texts.
      batch_size: texts that are encoded at once.
      spread: over all processes: each encodes its share, and each gets the whole. All of them must call this.

    Returns:
      (N, D) unit norm, fp32, on the model's device.
    """
    rank, world_size = _ranks(spread)
    row_of = {text: row for row, text in enumerate(dict.fromkeys(texts))}
    distinct = list(row_of)
    share = -(-len(distinct) // world_size)
    mine = distinct[rank * share:(rank + 1) * share]
    with evaluation_mode(model):
        parts = [model.encode_text(model.tokenize(mine[start:start + batch_size]).to(model.device))
                 for start in range(0, len(mine), batch_size)]  # each (batch, D)
    features = torch.cat(parts) if parts else torch.empty(0, 0, device=model.device)
    if spread:
        features = gather_rows(features)  # (distinct texts, D)
    return features[torch.tensor([row_of[text] for text in texts], device=features.device)]


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Run the block in evaluation mode, fp32 and without gradients; give every module its mode back."""
    modes = [(module, module.training) for module in model.modules()]
    device = next(model.parameters()).device.type
    model.eval()
    try:
        with torch.no_grad(), torch.autocast(device, enabled=False):
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


def _ranks(spread: bool) -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if spread and dist.is_initialized() else (0, 1)


def _batches(samples: Iterator[TaskSample | BadSample], size: int, num_bad: Counter[str]) -> Iterator[list[TaskSample]]:
    """Group the good samples; count the bad ones by cause."""
    batch: list[TaskSample] = []
    for sample in samples:
        if isinstance(sample, BadSample):
            num_bad[sample.cause] += 1
            continue
        batch.append(sample)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
