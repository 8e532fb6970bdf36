"""Settings of `clipkit interpolate`."""

from dataclasses import dataclass

from clipkit.config.schema import at_least, positive, setting


@dataclass(frozen=True, kw_only=True)
class InterpolateConfig:
    base: str | None = setting("what was fine-tuned: a run, a model folder, a transformers folder or an open_clip name")
    model: str | None = setting("what came of it, as base")
    models: tuple[str, ...] | None = setting("several runs from one start, for soups, in the place of base and model")
    pretrained: str | None = setting("open_clip tag or weights file of those that are open_clip names")
    task: tuple[str, ...] = setting("what the model was tuned for, as of zero-shot; better validation sets than tests: the "
                                    "choice is made on them")
    against: tuple[str, ...] = setting("what it should not forget; [] = nothing")
    templates: tuple[str, ...] | None = setting("as of zero-shot; null = each task's own; the last rule counts")
    points: int = setting("models on the line, the ends with them", at_least(3))
    soup: str = setting("of models, which soup is written", choices=("greedy", "uniform"))
    out: str | None = setting("folder to make; null = interpolate/<model>, or soup/<first of the models>")
    overwrite: bool = setting("replace the folder of an earlier call")
    batch_size: int = setting("images encoded at once", positive)
    workers: int = setting("processes that read pictures; 0 = the main one", at_least(0))
    device: str = setting("auto, cpu, cuda or mps", choices=("auto", "cpu", "cuda", "mps"))
    store: bool = setting("keep embeddings in the cache, so that a call that was interrupted goes on")
    cache_dir: str | None = setting("folder for unpacked data and embeddings; null = the user's cache")

    def __post_init__(self) -> None:
        given = [name for name in ("base", "model", "models") if getattr(self, name)]
        if given not in (["base", "model"], ["models"]):
            raise ValueError(f"given are {' and '.join(given) or 'no models'}; give base=... and model=... (the line between "
                             "them), or models=[a,b,c] (soups)")
        if self.models and len(self.models) < 2:
            raise ValueError("models has one entry; a soup needs at least 2")
        if not self.task:
            raise ValueError("task is empty; give at least one set that the model was tuned for")
