"""The autoencoder of latent diffusion, diffusers' AutoencoderKL: build it, train through it, measure its scale, save, load."""

import copy
import inspect
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from clipkit.diffusion.discriminator import PatchDiscriminator
from clipkit.diffusion.perceptual import make_perceptual
from clipkit.interop.whole_folder import whole_folder
from clipkit.training.random_state import seed_all

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    from clipkit.config.diffusion.autoencoder import AutoencoderConfig

CONFIG_NAME, WEIGHTS_NAME = "config.json", "diffusion_pytorch_model.safetensors"  # diffusers' names
FOLDER = "vae"  # of a run, as of a pipeline
START_LOGVAR = -6.0  # of fresh weights: at 0 a draw hides the mean, and the decoder learns nothing at first


def make_autoencoder(config: Mapping[str, Any], *, image_size: int) -> "AutoencoderKL":
    """Build an autoencoder with random weights.

    Args:
      config: arguments of diffusers.AutoencoderKL.
      image_size: pixels a side of the pictures that it will see; written into its configuration.

    Raises:
      ValueError: AutoencoderKL has no such argument, or the values do not fit each other.
    """
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    known = [name for name in inspect.signature(AutoencoderKL.__init__).parameters if name not in ("self", "sample_size")]
    for name in config:
        if name not in known:
            raise ValueError(f"model.config has {name!r}, which diffusers' AutoencoderKL does not know; choose from "
                             f"{', '.join(known)}")
    num_levels = len(config["block_out_channels"])
    for name in ("down_block_types", "up_block_types"):
        if len(config.get(name, ())) != num_levels:
            raise ValueError(f"model.config.{name} has {len(config.get(name, ()))} values and block_out_channels {num_levels}; "
                             "give one for each level")
    try:
        autoencoder = AutoencoderKL(**config, sample_size=image_size, force_upcast=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"model.config does not make an autoencoder ({' '.join(str(error).split())}); change its values"
                         ) from error
    last = autoencoder.quant_conv if autoencoder.quant_conv is not None else autoencoder.encoder.conv_out
    with torch.no_grad():
        last.bias[autoencoder.config.latent_channels:].fill_(START_LOGVAR)  # pyright: ignore
    return autoencoder


def make_networks(config: "AutoencoderConfig", device: torch.device) -> tuple[nn.ModuleDict, nn.Module | None]:
    """Build what learns, "autoencoder" and "discriminator" (if it ever joins), and the frozen perceptual distance.

    Raises:
      ValueError: the settings do not make a network.
      FileNotFoundError: the perceptual distance has no network.
    """
    loss, model = config.loss, config.model
    try:
        perceptual = make_perceptual(loss.perceptual, model=loss.perceptual_model, image_weights=loss.perceptual_weights)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"the perceptual loss {loss.perceptual!r} has no network ({error}); train one with clipkit "
                                "pretrain, give loss.perceptual_model=..., or choose loss=timm or loss=none") from error
    seed_all(config.seed)  # the same weights on every process
    autoencoder = make_autoencoder(model.config, image_size=model.image_size)
    if config.train.activation_checkpointing:
        autoencoder.enable_gradient_checkpointing()
    networks = nn.ModuleDict({"autoencoder": autoencoder})
    if loss.discriminator_start < 1:
        networks["discriminator"] = PatchDiscriminator(model.image_size, channels=loss.discriminator_channels)
    if config.train.channels_last:  # before the optimizer is made or taken up: its state has the weights' layout
        networks.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    return networks.to(device), perceptual.to(device) if perceptual is not None else None


class Reconstruct(nn.Module):
    """Picture to latents to picture, in one call, as DistributedDataParallel and torch.compile need it."""

    def __init__(self, autoencoder: "AutoencoderKL") -> None:
        super().__init__()
        self.autoencoder = autoencoder

    def forward(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Encode pictures, draw from the latents' distribution and decode.

        Args:
          images: (B, 3, H, W) in [-1, 1].
          noise: (B, C, h, w), standard normal.

        Returns:
          (reconstruction (B, 3, H, W), mean (B, C, h, w), logvar (B, C, h, w)).
        """
        latents = self.autoencoder.encode(images).latent_dist  # pyright: ignore[reportAttributeAccessIssue]
        reconstruction = self.autoencoder.decode(latents.mean + latents.std * noise).sample  # pyright: ignore
        return reconstruction, latents.mean, latents.logvar


def to_pixel_values(images: Tensor) -> Tensor:
    """Bring pictures (B, 3, H, W) uint8 into [-1, 1], fp32."""
    return images.float() / 127.5 - 1


def no_tokens(texts: list[str]) -> Tensor:
    """Stand in for a tokenizer where the loader's captions are not read: (N, 1) int32 zeros."""
    return torch.zeros(len(texts), 1, dtype=torch.int32)


@torch.no_grad()
def latent_scale(autoencoder: "AutoencoderKL", batches: Iterable[Tensor]) -> float:
    """Measure what latents have to be multiplied by so that their standard deviation is 1.

    The deviation is that of draws from the latents' distributions, over all pictures, cells and channels together, in closed
    form: the variance of the means plus the mean of the variances.

    Args:
      autoencoder: on its device.
      batches: pictures (B, 3, H, W) uint8; at least some hundreds in all.

    Raises:
      ValueError: the latents are not finite, or all alike.

    Source: Rombach et al. 2022, appendix G (arXiv:2112.10752), there over one batch.
    """
    count, total, squares = 0, 0.0, 0.0
    for images in batches:
        latents = autoencoder.encode(to_pixel_values(images.to(autoencoder.device))).latent_dist  # pyright: ignore
        mean, variance = latents.mean.double(), latents.var.double()  # (B, C, h, w) each
        count += mean.numel()
        total += mean.sum().item()
        squares += (mean.square() + variance).sum().item()
    deviation = max(0.0, squares / count - (total / count) ** 2) ** 0.5
    if not 0 < deviation < float("inf"):
        raise ValueError(f"the latents' standard deviation is {deviation}, so that they have no scale; train longer, or lower "
                         "optim.lr")
    return 1 / deviation


def save_autoencoder(autoencoder: "AutoencoderKL", folder: Path, *, scaling_factor: float) -> None:
    """Write a diffusers folder (safetensors), whole or not at all, with the scale in its configuration.

    Raises:
      OSError: it cannot be written; one line.
    """
    plain = copy.deepcopy(autoencoder).to("cpu", memory_format=torch.contiguous_format)  # pyright: ignore
    plain.register_to_config(scaling_factor=scaling_factor)
    with whole_folder(folder, overwrite=False) as unfinished:
        plain.save_pretrained(unfinished, safe_serialization=True)


def autoencoder_folder(source: str | Path) -> Path:
    """Where the autoencoder of a run or a pipeline folder is; an autoencoder's own folder is itself."""
    return Path(source) / FOLDER if (Path(source) / FOLDER).is_dir() else Path(source)


def load_autoencoder(source: str | Path, *, device: str | torch.device = "cpu") -> "AutoencoderKL":
    """Load an autoencoder for use: frozen, in evaluation mode, its scale in `config.scaling_factor`.

    Args:
      source: a run (runs/emoji_autoencoder), a pipeline folder, or an autoencoder's own folder.
      device: where it goes.

    Raises:
      FileNotFoundError: there is no autoencoder.
    """
    folder = autoencoder_folder(source)
    missing = [name for name in (CONFIG_NAME, WEIGHTS_NAME) if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{folder} holds no autoencoder: it has no {' and no '.join(missing)}; give a finished run of "
                                "clipkit diffusion autoencoder, or a folder of diffusers' AutoencoderKL")
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    loaded = AutoencoderKL.from_pretrained(folder, local_files_only=True, use_safetensors=True, low_cpu_mem_usage=False)
    return loaded.to(device).eval().requires_grad_(False)  # pyright: ignore[reportArgumentType]
