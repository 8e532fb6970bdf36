"""What the U-Net is trained on: pictures' pixels, their latents made on the way, or latents from the cache."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from clipkit.config.diffusion.autoencoder import PIPELINE_MULTIPLE
from clipkit.config.diffusion.train import NO_AUTOENCODER, DiffusionTrainConfig
from clipkit.data.loader import TrainLoader, make_train_loader
from clipkit.data.samples import PictureExamples
from clipkit.diffusion.autoencoder import no_tokens, to_pixel_values
from clipkit.diffusion.conditioning import Conditioning, TextConditioning
from clipkit.diffusion.latent_cache import LatentExamples, bad_pictures, cached_latents
from clipkit.diffusion.objective import Latents
from clipkit.evaluation.progress_line import ProgressLine
from clipkit.training.distributed import Process, wait_for_all

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL


def latent_shape(autoencoder: "AutoencoderKL | None", image_size: int) -> tuple[int, int]:
    """Channels and cells a side of what the U-Net makes of pictures of this size; without an autoencoder, their pixels.

    Raises:
      ValueError: the autoencoder, or the pipelines that will read the model, cannot take this size; says which they can.
    """
    if autoencoder is None:
        return 3, image_size
    settings: Any = autoencoder.config
    factor = 2 ** (len(settings.block_out_channels) - 1)
    multiple = max(PIPELINE_MULTIPLE, factor)
    if image_size % multiple:
        below = image_size // multiple * multiple
        nearest = f"{below} and {below + multiple}" if below else str(multiple)
        raise ValueError(f"model.image_size is {image_size}, and with this autoencoder it has to be a multiple of {multiple}; "
                         f"the nearest are {nearest}")
    return settings.latent_channels, image_size // factor


def latent_scale(autoencoder: "AutoencoderKL | None") -> float:
    """What latents are multiplied by, so that their standard deviation is 1; pixels stay as they are."""
    return 1.0 if autoencoder is None else autoencoder.config.scaling_factor  # pyright: ignore[reportAttributeAccessIssue]


def reads_cache(config: DiffusionTrainConfig) -> bool:
    """Whether latents come from the cache: not where what conditions has to see the picture."""
    return config.cache_latents and config.autoencoder != NO_AUTOENCODER and config.conditioning.kind == "text"


def make_loader(config: DiffusionTrainConfig, sources: Sequence[Sequence[str]], lanes: int, process: Process,
                autoencoder: "AutoencoderKL | None", conditioning: Conditioning, state: dict[str, Any] | None) -> TrainLoader:
    """Build the loader of one process; what the cache lacks is encoded here, by all processes together.

    Args:
      config: of the run.
      sources: the shards of each source.
      lanes: as in `make_train_loader`.
      process: this one.
      autoencoder: on its device.
      conditioning: gives the tokenizer.
      state: where to go on, unless a few fixed batches are overfitted.
    """
    data, image_size = config.data, config.model.image_size
    examples: Any = PictureExamples(data=data, image_size=image_size, group_by="none")
    if reads_cache(config):
        assert autoencoder is not None
        channels, side = latent_shape(autoencoder, image_size)
        examples = LatentExamples(data=data, channels=channels, side=side)
        sources = _encode(config, sources, process, autoencoder)
    tokenize = conditioning.tokenize if isinstance(conditioning, TextConditioning) else no_tokens
    return make_train_loader(data, shards=sources, lanes=lanes, tokenize=tokenize, examples=examples, seed=config.seed,
                             global_batch_size=config.train.global_batch_size, rank=process.rank,
                             world_size=process.world_size, local_world_size=process.local_world_size,
                             pin_memory=process.device.type == "cuda",
                             state=None if config.train.overfit_batches else state)


def encode(images: Tensor, config: DiffusionTrainConfig, autoencoder: "AutoencoderKL | None") -> tuple[Latents, Tensor | None]:
    """Make latents of what the loader gives.

    Args:
      images: (B, 2C, h, w) from the cache, or pictures (B, 3, H, W) uint8, on the device.
      config: of the run.
      autoencoder: on the device; None = pixels.

    Returns:
      Their latents, unscaled, and the pictures in [-1, 1] (None where only the cache was read).
    """
    if reads_cache(config):
        return Latents(*images.chunk(2, dim=1)), None
    pixels = to_pixel_values(images)  # (B, 3, H, W)
    if autoencoder is None:
        return Latents(pixels, torch.zeros_like(pixels)), pixels
    with torch.no_grad():
        found = autoencoder.encode(pixels).latent_dist  # pyright: ignore[reportAttributeAccessIssue]
    return Latents(found.mean.float(), found.std.float()), pixels


def _encode(config: DiffusionTrainConfig, sources: Sequence[Sequence[str]], process: Process,
            autoencoder: "AutoencoderKL") -> list[list[str]]:
    """The shards of latents of each source; each process encodes its share of those that the cache lacks."""
    encoded = []
    with ProgressLine("latents   ", process.is_main, unit="shards") as line:
        for shards in sources:
            encoded.append(cached_latents(shards, autoencoder, source=config.autoencoder, data=config.data,
                                          image_size=config.model.image_size, rank=process.rank,
                                          world_size=process.world_size, show=line.show))
    wait_for_all()
    bad = sum((bad_pictures(shards) for shards in encoded), bad_pictures([]))
    if bad and process.is_main:
        causes = ", ".join(f"{count} {cause}" for cause, count in bad.most_common())
        print(f"latents   without {bad.total():,} bad pictures: {causes}", flush=True)
    return encoded
