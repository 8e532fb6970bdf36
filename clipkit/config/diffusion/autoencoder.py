"""Settings of `clipkit diffusion autoencoder`: its root, the network and the loss. All else is shared with pretraining."""

from dataclasses import dataclass
from typing import Any

from clipkit.config.checkpoint import CheckpointConfig
from clipkit.config.data import DataConfig
from clipkit.config.evaluation import EvaluationConfig
from clipkit.config.log import LogConfig
from clipkit.config.optim import OptimConfig
from clipkit.config.parallel import ParallelConfig
from clipkit.config.schedule import ScheduleConfig
from clipkit.config.schema import at_least, fraction, positive, setting
from clipkit.config.train import TrainConfig

PIPELINE_MULTIPLE = 8  # sizes that diffusers' Stable Diffusion pipelines take are multiples of it


@dataclass(frozen=True, kw_only=True)
class AutoencoderModelConfig:
    config: dict[str, Any] = setting("arguments of diffusers.AutoencoderKL")
    image_size: int = setting("pixels a side", positive)

    def __post_init__(self) -> None:
        widths = self.config.get("block_out_channels")
        if not isinstance(widths, list) or not widths:
            raise ValueError(f"config.block_out_channels is {widths!r}; give the channels of each level, as in [32,64,64]")
        multiple = max(PIPELINE_MULTIPLE, self.downsampling)
        below = self.image_size // multiple * multiple
        if below != self.image_size:
            nearest = f"{below} and {below + multiple}" if below else f"{multiple}"
            raise ValueError(f"image_size is {self.image_size}, and with latents of 1/{self.downsampling} of the side it has "
                             f"to be a multiple of {multiple}; the nearest are {nearest}")

    @property
    def downsampling(self) -> int:
        """Pixels a side of a latent cell: every level but the last halves the picture."""
        return 2 ** (len(self.config["block_out_channels"]) - 1)


@dataclass(frozen=True, kw_only=True)
class AutoencoderLossConfig:
    perceptual: str = setting("whose features the perceptual distance compares", choices=("clip", "timm", "lpips", "none"))
    perceptual_model: str | None = setting("for clip a run, a model folder or an open_clip name; for timm a timm name")
    perceptual_weights: str | None = setting("for timm a weights file (package:<name> finds an installed one)")
    perceptual_weight: float = setting("of the perceptual distance, beside the mean absolute error", at_least(0))
    kl_weight: float = setting("of the latents' divergence from N(0, 1), in nats a pixel value", at_least(0))
    discriminator_start: float = setting("share of the run after which the discriminator joins; 1 = never", fraction)
    discriminator_weight: float = setting("of the discriminator's opinion, once it is as strong as the other terms",
                                          at_least(0))
    discriminator_channels: int = setting("of the discriminator's first layer", positive)


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig:
    name: str | None = setting("name of the run: its folder is runs/<name>; the same name again resumes it")
    seed: int = setting("source of all randomness")
    runs_dir: str = setting("folder that holds the run folders", runtime=True)
    device: str = setting("auto, cpu, cuda or mps", choices=("auto", "cpu", "cuda", "mps"), runtime=True)
    scale_images: int = setting("training pictures over which the latents' scale is measured", at_least(1))
    model: AutoencoderModelConfig
    data: DataConfig
    loss: AutoencoderLossConfig
    optim: OptimConfig
    schedule: ScheduleConfig
    train: TrainConfig
    parallel: ParallelConfig
    evaluation: EvaluationConfig
    checkpoint: CheckpointConfig
    log: LogConfig

    def __post_init__(self) -> None:
        if self.name == "":
            raise ValueError("name is empty; give name=... (the run's folder is runs/<name>), or name=null for "
                             "emoji_autoencoder")
        if self.name is None and self.data.train != ("emoji",):
            raise ValueError("name is required for data other than emoji; give name=... (the run's folder is runs/<name>)")
