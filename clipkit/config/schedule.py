"""Settings of the learning rate over time."""

from dataclasses import dataclass

from clipkit.config.schema import fraction, setting


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    name: str = setting("shape after warm-up", choices=("cosine", "constant", "constant_with_cooldown"))
    warmup: str = setting('linear warm-up: steps ("500"), a share of the run ("2%") or samples ("50k samples")')
    cooldown: float = setting("share of the run that constant_with_cooldown falls to 0 in", fraction)
