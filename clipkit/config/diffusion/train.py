"""Settings of `clipkit diffusion train`: its root, the U-Net, the process, what conditions it, the sheets of samples."""

from dataclasses import dataclass
from typing import Any

from clipkit.config.checkpoint import CheckpointConfig
from clipkit.config.data import DataConfig
from clipkit.config.log import LogConfig
from clipkit.config.optim import OptimConfig
from clipkit.config.parallel import ParallelConfig
from clipkit.config.schedule import ScheduleConfig
from clipkit.config.schema import at_least, fraction, positive, setting
from clipkit.config.train import TrainConfig

NO_AUTOENCODER = "none"


@dataclass(frozen=True, kw_only=True)
class UNetConfig:
    config: dict[str, Any] = setting("arguments of diffusers.UNet2DConditionModel (of UNet2DModel where a map conditions)")
    image_size: int = setting("pixels a side", positive)


@dataclass(frozen=True, kw_only=True)
class ConditioningConfig:
    kind: str = setting("what the pictures are made from", choices=("text", "image", "low_resolution", "semantic_map"))
    source: str | None = setting("for text a run or a text-encoder folder; for image a run, a model folder or a name")
    drop: float = setting("probability of training a picture without its condition, for guidance", fraction)
    factor: int = setting("for low_resolution: pixels of the picture for each pixel of the small one, a side", at_least(2))


@dataclass(frozen=True, kw_only=True)
class ProcessConfig:
    schedule: str = setting("noise schedule", choices=("scaled_linear", "squared_cosine", "flow"))
    prediction: str = setting("what the network says of a noisy picture", choices=("v", "noise", "x0", "flow"))
    num_timesteps: int = setting("noise levels", at_least(2))
    zero_terminal_snr: bool = setting("the last level is pure noise, as sampling begins with")
    weight: str = setting("of the squared error by noise level", choices=("uniform", "min_snr"))


@dataclass(frozen=True, kw_only=True)
class SheetsConfig:
    every: int | None = setting("steps between sheets of samples; null = eight a run", at_least(1), runtime=True)
    prompts: tuple[str, ...] | None = setting("texts to draw; null = captions of the first pictures", runtime=True)
    num_samples: int = setting("pictures on a sheet; 0 = no sheets", at_least(0), runtime=True)
    steps: int = setting("sampling steps", at_least(1), runtime=True)
    guidance_scale: float = setting("how far beyond the plain prediction; 1 = not at all", at_least(1), runtime=True)


@dataclass(frozen=True, kw_only=True)
class DiffusionTrainConfig:
    name: str | None = setting("name of the run: its folder is runs/<name>; the same name again resumes it")
    seed: int = setting("source of all randomness")
    runs_dir: str = setting("folder that holds the run folders", runtime=True)
    device: str = setting("auto, cpu, cuda or mps", choices=("auto", "cpu", "cuda", "mps"), runtime=True)
    autoencoder: str = setting("a run, a pipeline folder or an AutoencoderKL folder; none = diffusion of the pixels themselves")
    cache_latents: bool = setting("encode each picture once, and train from the latents")
    model: UNetConfig
    conditioning: ConditioningConfig
    process: ProcessConfig
    data: DataConfig
    optim: OptimConfig
    schedule: ScheduleConfig
    train: TrainConfig
    parallel: ParallelConfig
    sheets: SheetsConfig
    checkpoint: CheckpointConfig
    log: LogConfig

    def __post_init__(self) -> None:
        if self.name == "":
            raise ValueError("name is empty; give name=... (the run's folder is runs/<name>), or name=null for emoji_diffusion")
        if self.name is None and self.data.train != ("emoji",):
            raise ValueError("name is required for data other than emoji; give name=... (the run's folder is runs/<name>)")
        if self.conditioning.kind in ("text", "image") and not self.conditioning.source:
            raise ValueError("conditioning.source is empty; give what conditions: a run, as runs/emoji, or a folder")
        if self.sheets.prompts and self.conditioning.kind != "text":
            raise ValueError(f"sheets.prompts are texts, and conditioning.kind is {self.conditioning.kind!r}; give "
                             "sheets.prompts=null: the sheets show what is made from the first pictures")
