"""Settings of `clipkit zero-shot`, `clipkit compare` and `clipkit embed`."""

from dataclasses import dataclass

from clipkit.config.schema import at_least, positive, setting
from clipkit.config.suite import SuiteConfig

KINDS = ("zeroshot_classification", "zeroshot_retrieval", "zeroshot_multilabel", "image_caption_selection", "linear_probe",
         "knn", "few_shot", "tip_adapter")


@dataclass(frozen=True, kw_only=True)
class ZeroShotConfig:
    model: tuple[str, ...] = setting("a run, a model folder, a transformers folder, hf-hub:<org>/<name>[@revision] or an "
                                     "open_clip name; several are compared")
    pretrained: str | None = setting("open_clip tag or weights file, with an open_clip name")
    task: tuple[str, ...] | None = setting("emoji_val, emoji_test_style, emoji_test_concept, a folder, a table, shards or "
                                           "hf://<user>/<dataset>[@revision]; null = the three emoji tasks")
    suite: SuiteConfig | None = setting("tasks with one average, in the place of task; your own: <folder>/suite/<name>.yaml "
                                        "and --config-dir <folder>")
    images: str | None = setting("folder of pictures without labels, for classes=[..] or query=..")
    classes: tuple[str, ...] | None = setting("names to tell the pictures apart by")
    query: str | None = setting("a text whose nearest pictures are listed")
    kind: tuple[str, ...] | None = setting("what to measure; null = what each task is made for", choices=KINDS)
    templates: tuple[str, ...] | None = setting("openai80, openai7, plain, waffle, texts with {}, .txt or .json files; "
                                                "null = the task's own")
    template_effects: bool = setting("measure each template alone, and the whole without it")
    split: str | None = setting("split of a labelled set that is measured; null = test")
    group: str | None = setting("column of a table, or field of the samples' json: accuracy in each of its groups too")
    duplicates: str | None = setting("classes of one name: keep is what published results do; null = keep in sets on the hub, "
                                     "else refuse", choices=("refuse", "keep", "merge"))
    features: tuple[str, ...] = setting("of linear_probe and knn: projected (compared with texts), trunk (before it), or both",
                                        choices=("projected", "trunk"))
    shots: tuple[int, ...] = setting("training images a class, of few_shot and tip_adapter", positive)
    seeds: int = setting("draws of the shots, of few_shot and tip_adapter", at_least(2))
    out: str | None = setting("folder for the results; null = zero_shot/ in the run, or zero_shot/<model>")
    top: int = setting("pictures listed for a query, or names for a picture", positive)
    batch_size: int = setting("images encoded at once", positive)
    workers: int = setting("processes that read pictures; 0 = the main one", at_least(0))
    device: str = setting("auto, cpu, cuda or mps", choices=("auto", "cpu", "cuda", "mps"))
    store: bool = setting("keep embeddings in the cache, and use those that are there")
    cache_dir: str | None = setting("folder for unpacked data and embeddings; null = the user's cache")
    offline: bool = setting("take what is on the Hugging Face hub from its cache alone")
    report: bool = setting("write report.html")

    def __post_init__(self) -> None:
        ruled = [name for name in ("task", "images", "kind", "split", "templates", "group", "duplicates")
                 if getattr(self, name) is not None]
        if self.suite is not None and ruled:
            raise ValueError(f"suite={self.suite.name} says itself what is measured and how; leave {', '.join(ruled)} out")
        if self.images is None and (self.classes or self.query):
            raise ValueError("classes and query are about pictures without labels; give images=<folder> too, or task=<folder> "
                             "for labelled ones")
        if self.images is not None and bool(self.classes) == bool(self.query):
            raise ValueError("images=<folder> needs either classes=[cat,dog] (name each picture) or query='a red car' (find "
                             "the nearest pictures)")
        if self.images is not None and self.task:
            raise ValueError("images=<folder> is for pictures without labels and task=... for labelled ones; give one of them")
        if self.images is not None and len(self.model) > 1:
            raise ValueError(f"images=<folder> takes one model, {len(self.model)} are given")


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    a: str = setting("a run, or a folder with the predictions.parquet of one model")
    b: str = setting("the same of the other model")
    out: str | None = setting("CSV file for the table; null = print it only")

    def __post_init__(self) -> None:
        if not self.a or not self.b:
            raise ValueError("a and b are needed: two runs, or two folders that `clipkit zero-shot` wrote, as in "
                             "clipkit compare a=runs/one b=runs/two")


@dataclass(frozen=True, kw_only=True)
class EmbedConfig:
    model: str = setting("a run, a model folder, a transformers folder or an open_clip name")
    pretrained: str | None = setting("open_clip tag or weights file, with an open_clip name")
    data: str = setting("shards, a folder of pictures, a table, or a task's name")
    out: str = setting("folder for image_features.npy, text_features.npy and samples.parquet")
    batch_size: int = setting("images encoded at once", positive)
    workers: int = setting("processes that read pictures; 0 = the main one", at_least(0))
    device: str = setting("auto, cpu, cuda or mps", choices=("auto", "cpu", "cuda", "mps"))
    cache_dir: str | None = setting("folder for unpacked data; null = the user's cache")

    def __post_init__(self) -> None:
        if not self.data or not self.out:
            raise ValueError("data and out are needed, as in clipkit embed model=runs/emoji data=photos/ out=embeddings/")
