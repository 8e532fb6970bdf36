"""`clipkit pretrain` with processor seconds in the clock's place: its metrics.jsonl has samples per CPU second.

  python -m scripts.bench.timed_run [setting=value ...]
"""

import contextlib
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from clipkit.commands import pretrain
from clipkit.config import PretrainConfig
from clipkit.config.launch import launch
from clipkit.training.step_timer import StepTimer
from scripts.bench.rounds import cpu_seconds


class TrainingTimer(StepTimer):
    """Begins with the first batch, after the look at the untrained model."""

    def batches(self, loader: Iterable[Any]) -> Iterator[Any]:
        self.take(0)
        return super().batches(loader)


def run(config: PretrainConfig) -> None:
    """Train and evaluate as the command does; its timer leaves evaluation and checkpoints out."""
    from clipkit.training.process import training_process

    with (training_process(config.device, timeout_seconds=config.parallel.timeout_seconds,
                           threads=config.train.threads) as process, contextlib.ExitStack() as cleanup):
        training, start = pretrain.prepare(config, process, cleanup)
        training = training._replace(timer=TrainingTimer(cpu_seconds))
        pretrain.train(training, start)
        if training.writer:
            training.writer.wait()
        pretrain.finish(training)


if __name__ == "__main__":
    launch("pretrain", PretrainConfig, run, sys.argv[1:], pretrain.IMPLIED)
