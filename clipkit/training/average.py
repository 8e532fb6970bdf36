"""An exponential moving average of the weights, in the place of which the model can be put for a while."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from clipkit.training.sharding import own_parts


class WeightAverage:
    """average = decay * average + (1 - decay) * weights, after every step; batch statistics are averaged along.

    Attributes:
      weights: {name: tensor} as in the module's state dict.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.module = module
        self.weights = {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after step `step` (from 0). The first steps count more, as in a plain mean."""
        decay = min(self.decay, (1 + step) / (10 + step))
        current = self.module.state_dict()
        moving = [name for name, tensor in self.weights.items() if tensor.is_floating_point()]
        torch._foreach_lerp_(  # pyright: ignore[reportPrivateImportUsage]
            own_parts(self.weights[name] for name in moving), own_parts(current[name] for name in moving), 1 - decay)
        for name in self.weights.keys() - set(moving):
            self.weights[name].copy_(current[name])

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Put the module in the place of the average for a while (evaluation)."""
        own = {name: tensor.detach().clone() for name, tensor in self.module.state_dict().items()}
        self._copy_into_module(self.weights)
        try:
            yield
        finally:
            self._copy_into_module(own)

    @torch.no_grad()
    def _copy_into_module(self, weights: Mapping[str, Tensor]) -> None:
        for name, tensor in self.module.state_dict().items():
            tensor.copy_(weights[name])
