"""Settings of the data: where samples come from, how they are drawn, decoded and augmented."""

from dataclasses import dataclass

from clipkit.config.schema import at_least, fraction, positive, setting


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    crop_scale: tuple[float, float] = setting("area of the random crop, as a share of the image", fraction)
    crop_ratio: tuple[float, float] = setting("width / height of the random crop", positive)
    flip: float = setting("probability of a left-right flip", fraction)
    disc: float = setting("probability of cutting a disc out of the drawing's middle, as round icons show it", fraction)
    rotate_degrees: float = setting("largest rotation either way", at_least(0))
    translate: float = setting("largest shift either way, as a share of the side", fraction)
    zoom: tuple[float, float] = setting("smallest and largest zoom", positive)
    shear_degrees: float = setting("largest shear either way", at_least(0))
    elastic: float = setting("standard deviation of a smooth random warp, as a share of the side", at_least(0))
    colour_jitter: tuple[float, float, float, float] = setting(
        "strength of brightness, contrast, saturation and hue changes (torchvision's meaning)", at_least(0))
    colour_jitter_probability: float = setting("probability of the colour jitter", fraction)
    colour_noise: float = setting("standard deviation of a random mixing of the colour channels", at_least(0))
    gamma: float = setting("largest logarithm of the exponent that bends the tone curve", at_least(0))
    sharpness: float = setting("largest blur or sharpening, as a share of a 3x3 mean", at_least(0))
    keep_white: bool = setting("colour changes leave white as it is: for drawings on a white ground")
    grey: float = setting("probability of a grey image", fraction)
    channel_shuffle: float = setting("probability of permuted colour channels", fraction)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    train: tuple[str, ...] = setting("emoji, or shards: patterns, globs, URLs; several are several sources")
    weights: tuple[float, ...] | None = setting("how often each source is drawn; null = by its size", positive)
    caption_fields: tuple[str, ...] | None = setting("json fields that hold captions; null = captions, else the .txt")
    caption_weights: tuple[float, ...] | None = setting("how often each caption field is chosen; null = alike",
                                                        positive)
    class_names: tuple[str, ...] | None = setting("names of the class numbers (.cls) in their order, or a .txt file with one a "
                                                  "line; the json field label is then the name")
    templates: tuple[str, ...] | None = setting("what caption fields are put into: openai80, openai7, a .txt file with one a "
                                                "line, or texts that hold {}; null = nothing")
    lanes: int | None = setting("streams the order is made of; null = a power of two by the number of shards", positive)
    block_samples: int = setting("samples of a lane that are shuffled together", positive)
    resampled: bool = setting("draw shards with replacement")
    decode: str = setting("exact, or fast (JPEGs decoded at reduced size where that suffices)",
                          choices=("exact", "fast"))
    max_pixels: int = setting("larger images are bad samples (decompression bombs)", positive)
    max_bad_fraction: float = setting("share of bad samples that stops the run", fraction)
    max_bad_shards_fraction: float = setting("share of unreadable shards that stops the run", fraction, runtime=True)
    allow_pipe: bool = setting("allow pipe: URLs, which run shell commands", runtime=True)
    workers: int | None = setting("loader processes a rank; null = by the number of cores", at_least(0), runtime=True)
    retries: int = setting("how often a request to an object store is repeated, with growing waits", at_least(0), runtime=True)
    timeout_seconds: float = setting("longest wait for an object store's next bytes", positive, runtime=True)
    shard_cache_gb: float | None = setting("remote shards kept on the local disk, in cache_dir; null = none", positive,
                                           runtime=True)
    cache_dir: str | None = setting("folder for unpacked data; null = the user's cache", runtime=True)
    augment: AugmentConfig

    def __post_init__(self) -> None:
        if not self.train or not all(self.train):
            raise ValueError("data.train is empty; give data.train=emoji or shards such as 'data/{000..099}.tar'")
        if self.weights is not None and len(self.weights) != len(self.train):
            raise ValueError(f"data.weights has {len(self.weights)} values for {len(self.train)} sources; give one each")
        if self.caption_weights is not None and len(self.caption_weights) != len(self.caption_fields or ()):
            raise ValueError(f"data.caption_weights has {len(self.caption_weights)} values for "
                             f"{len(self.caption_fields or ())} caption fields; give one each")
