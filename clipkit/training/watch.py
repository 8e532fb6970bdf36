"""Looks at the run at every log line: adds its speed, and warns when it does not do well."""

import os
from collections.abc import Mapping
from typing import Any

from clipkit.data.batch import Batch
from clipkit.model.image_text import Features
from clipkit.training.diagnose import cut_captions, duplicate_captions, flat_loss, loader_bottleneck
from clipkit.training.plan import Plan
from clipkit.training.run_log import RunLog
from clipkit.training.step_timer import StepTimer

STEPS_BEFORE_JUDGING = 20  # the first steps wait for the workers to start


class Watch:
    """Keeps what the diagnoses need: the losses so far, and the rates since the last look."""

    def __init__(self, *, log: RunLog, timer: StepTimer, plan: Plan, start: int, lr: float, masked: bool, workers: int,
                 local_world_size: int, decode: str, chance_loss: float | None, pad_id: int | None = None) -> None:
        self.log, self.timer, self.plan, self.seen, self.start = log, timer, plan, start, start
        self.lr, self.masked, self.workers, self.decode = lr, masked, workers, decode
        self.cores = max(1, (os.cpu_count() or 1) // local_world_size)
        self.chance_loss = chance_loss  # of a model that knows nothing; None: not judged
        self.pad_id = pad_id  # of the tokenizer; None where there are no captions
        self.losses: list[float] = []

    def look(self, done: int, metrics: Mapping[str, Any], features: Features | None = None,
             batch: Batch | None = None) -> dict[str, Any]:
        """Return the metrics with samples_per_second and data_wait_fraction added; warn at most once of each trouble.

        `features` and `batch` are needed where a loss is judged by its chance.
        """
        rates = self.timer.take((done - self.seen) * self.plan.global_batch_size)
        self.seen = done
        self.losses.append(metrics["loss"])
        if done - self.start >= STEPS_BEFORE_JUDGING:
            self._warn(loader_bottleneck(rates.data_wait_fraction, samples_per_second=rates.samples_per_second,
                                         workers=self.workers, cores=self.cores, decode=self.decode), "loader")
        if self.pad_id is not None and batch is not None and "captions" not in self.log.told:
            self._warn(cut_captions(batch.tokens, self.pad_id), "captions")
        if self.chance_loss is not None and "loss" not in self.log.told:
            assert features is not None and batch is not None
            self._warn(flat_loss(self.losses, chance_loss=self.chance_loss, step=done, total_steps=self.plan.total_steps,
                                 warmup_steps=self.plan.warmup_steps, learning_rate=self.lr,
                                 image_features=features.image_features.detach(),
                                 text_features=features.text_features.detach(),
                                 duplicate_fraction=None if self.masked else duplicate_captions(batch.tokens)), "loss")
        return {**metrics, "samples_per_second": rates.samples_per_second, "data_wait_fraction": rates.data_wait_fraction}

    def _warn(self, text: str | None, trouble: str) -> None:
        if text and trouble not in self.log.told:
            self.log.told.add(trouble)
            self.log.warn(text)
