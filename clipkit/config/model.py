"""Settings of the two towers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from clipkit.config.schema import at_least, fraction, positive, setting


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    start: str | None = setting("run, model folder, transformers CLIP folder, or open_clip name with model.pretrained: the "
                                "weights, image size and tokenizer to start from, in the place of model.name")
    name: str | None = setting("open_clip name of the architecture, such as ViT-B-32 or RN50")
    pretrained: str | None = setting("open_clip tag or weights file to start from; null = random weights")
    config: dict[str, Any] | None = setting("open_clip-style model_cfg, in the place of a name; text_cfg.kind: cbow allowed")
    image_weights: str | None = setting("weights file of the timm image tower alone (package:<name> finds an installed one)")
    image_size: int | None = setting("pixels a side; null = the architecture's or the start's own", positive)
    patch_dropout: float | None = setting("share of image patches left out in training (FLIP); null = the architecture's",
                                          fraction)
    lock_image: bool = setting("freeze the image tower (LiT)")
    unlocked_image_groups: int = setting("last layer groups of a locked image tower that still learn", at_least(0))
    lock_text: bool = setting("freeze the text tower")
    unlocked_text_layers: int = setting("last layers of a locked text tower that still learn", at_least(0))
    lora_rank: int | None = setting("LoRA: the blocks' matrices stay and learn an update of this rank; null = they learn whole",
                                    at_least(1))
    lora_alpha: float | None = setting("the update of LoRA is multiplied by lora_alpha / lora_rank; null = twice the rank",
                                       positive)

    def __post_init__(self) -> None:
        if self.start is not None:
            self._check_alone()
        elif (self.name is None) == (self.config is None):
            raise ValueError("give either model.name (an open_clip name) or model.config (a model_cfg), not both")
        if self.pretrained and self.name is None and self.start is None:
            raise ValueError(f"model.pretrained is {self.pretrained!r} but model.name is null; weights need a named "
                             "architecture: give model.name=...")
        self._check_lora()

    def _check_lora(self) -> None:
        if self.lora_alpha is not None and self.lora_rank is None:
            raise ValueError(f"model.lora_alpha is {self.lora_alpha:g}, but model.lora_rank is null, so nothing reads it; give "
                             "model.lora_rank=8, or leave model.lora_alpha out")
        if self.lora_rank is not None and self.start is None and self.pretrained is None:
            raise ValueError(f"model.lora_rank is {self.lora_rank}, but the run starts from random weights, which would "
                             "stay; give model.start=... or model.pretrained=..., or model.lora_rank=null")

    def _check_alone(self) -> None:
        for key in ("name", "config", "image_weights", "patch_dropout"):
            if getattr(self, key) is not None:
                raise ValueError(f"model.start is {self.start!r}, which brings its architecture, and model.{key} is "
                                 f"{getattr(self, key)!r}; leave one of them out")


def as_start(arguments: Sequence[str]) -> list[str]:
    """Read `model=<folder, hub model, or a name with model.pretrained>` on a command line as `model.start=`.

    A folder beside the caller needs its slash (./mine): a bare word is a choice of settings.
    """
    named = any(argument.startswith("model.pretrained=") for argument in arguments)
    return [f"model.start={argument.removeprefix('model=')}" if argument.startswith("model=") and (named or "/" in argument)
            else argument for argument in arguments]
