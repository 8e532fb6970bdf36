"""Settings of the log."""

from dataclasses import dataclass

from clipkit.config.schema import positive, setting


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    every: int = setting("steps between log lines; the only steps at which the host waits for the device", positive,
                         runtime=True)
    to: tuple[str, ...] = setting("where curves go, beside metrics.jsonl", choices=("tensorboard", "wandb"),
                                  runtime=True)
