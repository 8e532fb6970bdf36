"""The arms of the step benchmark: what is timed runs in the precision that was asked for."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from scripts.bench.step_arm import Clock, backward


@pytest.mark.parametrize("task", ["text", "loss"])
@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("amp_bf16", torch.bfloat16)])
def test_forward_passes_have_the_precision_that_was_asked_for(task, precision, dtype):
    towers, seen = torch.nn.Linear(4, 3), []
    towers.register_forward_hook(lambda _module, _inputs, output: seen.append(output.dtype))
    trainer: Any = SimpleNamespace(towers=towers, clock=Clock("cpu"), text_features=lambda: towers(torch.ones(2, 4)),
                                   loss=lambda: towers(torch.ones(2, 4)).sum())
    backward(trainer, task, precision=precision)
    assert seen == [dtype]
