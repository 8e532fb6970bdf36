"""Settings of `clipkit diffusion evaluate`."""

from dataclasses import dataclass

from clipkit.config.diffusion.sample import SamplingConfig
from clipkit.config.schema import at_least, setting


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(SamplingConfig):
    scored_by: str | None = setting("the CLIP that judges, other than the one that conditions: a run, a model folder, a "
                                    "transformers folder or an open_clip name")
    pretrained: str | None = setting("open_clip tag or weights file, with an open_clip name")
    same_scorer: bool = setting("allow the CLIP that conditions to judge its own pictures")
    prompts: tuple[str, ...] = setting("emoji_common (100 concepts drawn in all train styles), emoji_val (its held-out pairs "
                                       "of style and concept), or texts and files of them")
    real: tuple[str, ...] | None = setting("pictures that samples are compared with: emoji, shards or a folder; null = what "
                                           "the run was trained on")
    held_out: str | None = setting("real pictures that were not trained on, for comparison; null = emoji_val for the emoji set")
    workers: int = setting("processes that read pictures; 0 = the main one", at_least(0))
    store: bool = setting("keep embeddings in the cache, and use those that are there")
    cache_dir: str | None = setting("folder for unpacked data and embeddings; null = the user's cache")

    def __post_init__(self) -> None:
        if not self.scored_by:
            raise ValueError("scored_by is empty; give a CLIP other than the one that conditions the model, as in "
                             "scored_by=runs/emoji_long or scored_by=ViT-B-32 pretrained=laion2b_s34b_b79k")
        if not self.prompts:
            raise ValueError("prompts is empty; give emoji_common, emoji_val, a text or a file of texts")
