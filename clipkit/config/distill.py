"""Settings of distillation: a teacher beside the contrastive loss."""

from dataclasses import dataclass

from clipkit.config.schema import fraction, positive, setting

DEFAULT_WEIGHT = 0.5


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    teacher: str | None = setting("frozen CLIP whose similarities are learned too: a run, a model folder or an open_clip name; "
                                  "null = none")
    pretrained: str | None = setting("open_clip tag or weights file, where the teacher is an open_clip name")
    # null, so that runs older than this group go on: a setting that is null in both changes nothing.
    weight: float | None = setting(f"share of the distillation in the loss; null = {DEFAULT_WEIGHT}", fraction)
    batch_size: int = setting("pictures and texts that the teacher encodes at once", positive, runtime=True)

    def __post_init__(self) -> None:
        for name in ("pretrained", "weight"):
            value = getattr(self, name)
            if self.teacher is None and value is not None:
                raise ValueError(f"{name} is {value!r}, but there is no teacher; give distill.teacher=..., or "
                                 f"distill.{name}=null")

    @property
    def share(self) -> float:
        return DEFAULT_WEIGHT if self.weight is None else self.weight
