"""Settings of checkpoints: when they are written, which are kept."""

from dataclasses import dataclass

from clipkit.config.schema import at_least, positive, setting


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    every_steps: int | None = setting("steps between checkpoints; null = by time alone", positive, runtime=True)
    every_minutes: float | None = setting("minutes between checkpoints; null = by steps alone", positive, runtime=True)
    keep: int = setting("newest checkpoints that are kept", at_least(1), runtime=True)
    keep_every_steps: int | None = setting("checkpoints at multiples of this are kept for good; null = none", positive,
                                           runtime=True)


@dataclass(frozen=True, kw_only=True)
class PretrainCheckpointConfig(CheckpointConfig):
    mirror: str | None = setting("folder or object store (an fsspec URL) that checkpoints are copied to, and that a run goes "
                                 "on from where its disk lacks them; null = none", runtime=True)
    asynchronous: bool = setting("write copies beside the training that goes on; takes their size in main memory", runtime=True)
