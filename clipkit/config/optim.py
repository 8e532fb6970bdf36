"""Settings of the optimizer."""

from dataclasses import dataclass

from clipkit.config.schema import at_least, positive, setting, within

ABOVE_0_TO_1 = ("above 0, to 1", lambda value: 0 < value <= 1)


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


@dataclass(frozen=True, kw_only=True)
class ContrastiveOptimConfig(OptimConfig):
    image_lr_scale: float = setting("the image tower learns at this multiple of the rate", positive)
    text_lr_scale: float = setting("the text tower learns at this multiple of the rate", positive)
    layer_decay: float | None = setting("each layer of a tower learns at this multiple of the rate of the one above; null = 1",
                                        ABOVE_0_TO_1)
    frozen_norms: bool = setting("LayerNorms and BatchNorms stay as they are, statistics included")
    towards_start: float = setting("L2-SP: pull towards the weights of the start, decoupled as weight decay is; 0 = none",
                                   at_least(0))

    def __post_init__(self) -> None:
        strongest = self.lr * max(self.image_lr_scale, self.text_lr_scale, 1.0) * self.towards_start
        if strongest > 1:
            raise ValueError(f"optim.towards_start is {self.towards_start:g}, times the learning rate {strongest:g}; above 1 a "
                             f"step goes past the start: give at most {self.towards_start / strongest:g}")
