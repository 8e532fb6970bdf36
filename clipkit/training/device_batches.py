"""The loader's batches on the device."""

from collections.abc import Iterable, Iterator
from itertools import cycle, islice

import torch

from clipkit.data.batch import Batch


def device_batches(loader: Iterable[Batch], device: torch.device, *, only: int, channels_last: bool,
                   host_tokens: bool) -> Iterator[Batch]:
    """This process's batches on its device, without end; the ids that the teacher is looked up by stay on the host.

    Args:
      loader: Endless.
      device: Where to.
      only: Repeat the first few, as a self-check; 0 = take all.
      channels_last: Leave images as they come; else they are made contiguous.
      host_tokens: Leave tokens on the host, where their lengths are read.
    """
    for batch in cycle(list(islice(loader, only))) if only else loader:
        on_device = type(batch)(*(tensor.to(device, non_blocking=True) for tensor in batch))
        yield on_device._replace(images=on_device.images if channels_last else on_device.images.contiguous(),
                                 tokens=batch.tokens if host_tokens else on_device.tokens, teacher_ids=batch.teacher_ids)
