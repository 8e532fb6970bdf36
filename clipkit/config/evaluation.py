"""Settings of the evaluation during and after training."""

from dataclasses import dataclass

from clipkit.config.schema import positive, setting


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    tasks: tuple[str, ...] = setting("tasks evaluated before the first step and then on: emoji_val, or held-out shards",
                                     runtime=True)
    final_tasks: tuple[str, ...] = setting("tasks evaluated once, at the end", runtime=True)
    every: int | None = setting("steps between evaluations; null = an eighth of the run", positive, runtime=True)
    batch_size: int = setting("images encoded at once", positive, runtime=True)
