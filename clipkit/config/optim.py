"""Settings of the optimizer."""

from dataclasses import dataclass

from clipkit.config.schema import at_least, positive, setting, within


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    name: str = setting("adamw, or another optimizer of torch or timm by its name")
    recipe: str = setting("which weights decay: clipkit (matrices only) or open_clip (its positional embeddings too)",
                          choices=("clipkit", "open_clip"))
    lr: float = setting("learning rate after warm-up", positive)
    weight_decay: float = setting("decoupled weight decay", at_least(0))
    beta1: float = setting("decay of the first moment", within(0, 1))
    beta2: float = setting("decay of the second moment", within(0, 1))
    eps: float = setting("added to the root of the second moment", positive)
    max_grad_norm: float | None = setting("gradients are scaled down to this norm; null = never", positive)
