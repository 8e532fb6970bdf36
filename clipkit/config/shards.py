"""Settings of `clipkit shards write` and `clipkit shards check`."""

from dataclasses import dataclass

from clipkit.config.schema import fraction, positive, setting


@dataclass(frozen=True, kw_only=True)
class ShardsWriteConfig:
    source: str = setting("folder of images with .txt captions, folder of class folders, or .csv/.tsv/.parquet table")
    out: str = setting("folder for the shards")
    image_column: str | None = setting("the table's column of image paths, URLs or bytes; null = by its usual names")
    caption_column: str | None = setting("the table's column of captions; null = by its usual names")
    image_root: str | None = setting("folder that the table's paths start from; null = the table's folder")
    samples_per_shard: int = setting("samples in a shard", positive)
    shuffle_seed: int | None = setting("seed of the samples' order; null = as in the source")
    test_fraction: float | None = setting("of a labelled folder, the share of each class that becomes the test split, the rest "
                                          "the train split; null = all of it is the test split", fraction)
    image_size: int | None = setting("larger images are resized to this shorter side, pixels; null = bytes kept",
                                     positive)
    max_pixels: int = setting("larger images are bad samples (decompression bombs)", positive)
    max_bad_fraction: float = setting("share of bad samples that stops the command", fraction)
    overwrite: bool = setting("replace the shards that are in out")

    def __post_init__(self) -> None:
        if self.test_fraction in (0, 1):
            raise ValueError(f"test_fraction is {self.test_fraction:g}; give a share between 0 and 1, or null")


@dataclass(frozen=True, kw_only=True)
class ShardsCheckConfig:
    data: tuple[str, ...] = setting("shards: patterns, globs, URLs")
    context_length: int = setting("captions of more tokens count as long", positive)
    max_pixels: int = setting("larger images are bad samples (decompression bombs)", positive)
    allow_pipe: bool = setting("allow pipe: URLs, which run shell commands")
