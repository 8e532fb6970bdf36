"""Settings of `clipkit lit`."""

from dataclasses import dataclass

from clipkit.config.evaluation import EvaluationConfig
from clipkit.config.log import LogConfig
from clipkit.config.optim import OptimConfig
from clipkit.config.schedule import ScheduleConfig
from clipkit.config.schema import at_least, positive, setting


@dataclass(frozen=True, kw_only=True)
class LitDataConfig:
    train: tuple[str, ...] = setting("emoji, or shards: patterns, globs, URLs")
    caption_fields: tuple[str, ...] | None = setting("json fields that hold captions: all are encoded, one is drawn at a time; "
                                                     "null = captions, else the .txt")
    mask_false_negatives: str = setting("none, caption, or a json field: pictures of equal value are no negatives")
    batch_size: int = setting("images encoded at once", positive, runtime=True)
    workers: int = setting("processes that read pictures; 0 = the main one", at_least(0), runtime=True)
    cache_dir: str | None = setting("folder for unpacked data and embeddings; null = the user's cache", runtime=True)


@dataclass(frozen=True, kw_only=True)
class LitTrainConfig:
    epochs: float = setting("passes over the pictures", positive)
    global_batch_size: int = setting("pairs that are contrasted in one step", at_least(2))
    threads: int | None = setting("CPU threads; null = torch's own choice", positive, runtime=True)


@dataclass(frozen=True, kw_only=True)
class LitConfig:
    name: str = setting("name of the run: its folder is runs/<name>")
    seed: int = setting("source of all randomness")
    runs_dir: str = setting("folder that holds the run folders", runtime=True)
    device: str = setting("auto, cpu, cuda or mps", choices=("auto", "cpu", "cuda", "mps"), runtime=True)
    image: str = setting("what encodes pictures: timm:<name>, a run, a model folder or an open_clip name")
    image_weights: str | None = setting("weights file of a timm tower (package:<name> finds an installed one); null = timm's "
                                        "own, fetched")
    image_size: int | None = setting("pixels a side of a timm tower; null = 224", positive)
    image_projection: str = setting("on the image side; open_clip has mlp for timm towers only", choices=("linear", "mlp"))
    text: str = setting("what encodes texts: sentence:<installed package or folder>, a run, a model folder or an open_clip "
                        "name")
    context_length: int = setting("tokens of a sentence encoder; longer texts are cut", positive)
    pretrained: str | None = setting("open_clip tag or weights file, where image or text is an open_clip name")
    embed_dim: int = setting("numbers of an embedding", positive)
    init_logit_scale: float = setting("1/temperature at the start", at_least(1))
    data: LitDataConfig
    optim: OptimConfig
    schedule: ScheduleConfig
    train: LitTrainConfig
    evaluation: EvaluationConfig
    log: LogConfig
