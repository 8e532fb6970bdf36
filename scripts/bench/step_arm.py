"""What both arms of step.py share: how they are asked, and how a training loop that is not changed is timed."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from scripts.bench.ranks import on_ranks
from scripts.bench.rounds import answer, cpu_seconds, forget_peak_memory, peak_memory_bytes


class Clock:
    """Seconds in processor time (on a GPU by the clock, after it has finished), by the clock, and peak memory in bytes."""

    def __init__(self, device: str) -> None:
        self.on_gpu = device == "cuda"

    def begin(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        else:
            forget_peak_memory()
        self._wall, self._cpu = time.perf_counter(), cpu_seconds()

    def end(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()
        self.wall = time.perf_counter() - self._wall
        self.seconds = self.wall if self.on_gpu else cpu_seconds() - self._cpu
        self.memory = torch.cuda.max_memory_allocated() if self.on_gpu else peak_memory_bytes()

    def of(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Pass batches on; the time runs from when the first is asked for until the loop asks for one more than there are."""
        self.begin()
        yield from batches
        self.end()

    def found(self) -> dict[str, float]:
        return {"seconds": self.seconds, "wall": self.wall, "memory": self.memory}


class Trainer(Protocol):
    """A model that is being trained, with a batch at hand."""

    version: str
    towers: nn.Module  # open_clip's names
    clock: Clock

    def loss(self) -> Tensor:
        """Of the batch, with a graph."""
        ...

    def text_features(self) -> Tensor:
        """Of the batch, (B, D) unit norm, with a graph."""
        ...

    def steps(self, number: int, shards: list[str] | None = None) -> None:
        """Run the training loop on the batch, or on batches from shards, under the clock."""
        ...


def serve(make: Callable[..., Trainer]) -> None:
    """Be an arm; the first argument of the program is the number of threads."""
    torch.set_num_threads(int(sys.argv[1]))
    trainer: Any = None

    def respond(task: str, **request: Any) -> dict[str, Any]:
        nonlocal trainer
        if task == "ranks":
            return on_ranks(make, **request)
        if task == "start":
            trainer = make(**request)
            return {"version": trainer.version, "torch": torch.__version__}
        if task == "steps":
            trainer.steps(**request)
            return trainer.clock.found()
        if task == "profile":
            return {"kernels": profile(trainer, **request)}
        return backward(trainer, task, **request)

    answer(respond)


def backward(trainer: Trainer, task: str, to: str | None = None, precision: str = "fp32") -> dict[str, Any]:
    """Forward and backward of the whole model ("loss") or its text tower ("text"); gradients are written to a file if asked."""
    trainer.towers.train()
    trainer.clock.begin()
    device = "cuda" if trainer.clock.on_gpu else "cpu"
    with torch.autocast(device, torch.bfloat16, enabled=precision == "amp_bf16"):
        if task == "loss":
            value = trainer.loss()
        else:
            features = trainer.text_features()  # (B, D)
            directions = torch.randn(features.shape, generator=torch.Generator().manual_seed(0)).to(features.device)
            value = (features * directions).sum()
    value.backward()
    trainer.clock.end()
    learned = {name: parameter.grad for name, parameter in trainer.towers.named_parameters() if parameter.grad is not None}
    if to:
        save_file({name: grad.detach().float().cpu().contiguous() for name, grad in learned.items()}, to)
    trainer.towers.zero_grad(set_to_none=True)
    return {"value": value.item(), **trainer.clock.found()}


def profile(trainer: Trainer, to: str, rows: int = 20) -> list[str]:
    """Profile two steps; write the table of what takes the most time to a file, and return its names."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiled

    on_gpu = trainer.clock.on_gpu
    with profiled(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as found:
        trainer.steps(2)
    averages, key = found.key_averages(), f"self_{'device' if on_gpu else 'cpu'}_time_total"
    Path(to).parent.mkdir(parents=True, exist_ok=True)
    Path(to).write_text(averages.table(sort_by=key, row_limit=rows, max_name_column_width=80) + "\n")
    return [event.key for event in sorted(averages, key=lambda event: -getattr(event, key))[:rows]]
