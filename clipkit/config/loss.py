"""Settings of the objective."""

from dataclasses import dataclass

from clipkit.config.schema import at_least, setting


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    name: str = setting("clip (symmetric softmax) or siglip (pairwise sigmoid)", choices=("clip", "siglip"))
    mask_false_negatives: str = setting("pairs that are no negatives: none, caption (equal captions), or a json field "
                                        "(equal values of it)")
    block_size: int | None = setting("rows of the logits at once; null = by size; 0 = the whole matrix, the reference",
                                     at_least(0), runtime=True)
    bf16: bool = setting("inexact: the products of the loss round their factors to bfloat16 (sums are fp32)")

    def __post_init__(self) -> None:
        if self.bf16 and self.block_size == 0:
            raise ValueError("loss.bf16 is true and loss.block_size 0, but the reference has no bfloat16; set "
                             "loss.block_size to null or to a number of rows, or loss.bf16 to false")
