"""Settings of the objective."""

from dataclasses import dataclass

from clipkit.config.schema import setting


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    name: str = setting("clip (symmetric softmax) or siglip (pairwise sigmoid)", choices=("clip", "siglip"))
    mask_false_negatives: str = setting("pairs that are no negatives: none, caption (equal captions), or a json field "
                                        "(equal values of it)")
