"""The pipeline folder: what `diffusion train` leaves and everything that samples reads. diffusers' format, safetensors alone.

With a text and an autoencoder it is a StableDiffusionPipeline; else the same component folders without that class's
model_index.json. clipkit_diffusion.json says in either case what the components cannot: process and conditioning.
"""

import copy
import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from clipkit.config.diffusion.train import ProcessConfig
from clipkit.config.schema import parse
from clipkit.diffusion.autoencoder import FOLDER as VAE_FOLDER
from clipkit.diffusion.autoencoder import load_autoencoder
from clipkit.diffusion.conditioning import Conditioning, ImageConditioning, MapConditioning, load_text_conditioning
from clipkit.diffusion.noise_schedule import Schedule, make_schedule
from clipkit.diffusion.quiet import quiet_loading
from clipkit.diffusion.unet import Denoise
from clipkit.model.build import file_sha256
from clipkit.model.folder import load_model
from clipkit.training.atomic_files import write_text_atomically

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

FOLDER = "pipeline"  # of a run
FACTS = "clipkit_diffusion.json"
SCHEMA_VERSION = 1
PREDICTION_TYPES = {"v": "v_prediction", "noise": "epsilon", "x0": "sample", "flow": "flow_prediction"}  # ours to diffusers'
BETA_SCHEDULES = {"scaled_linear": "scaled_linear", "squared_cosine": "squaredcos_cap_v2"}


class Pipeline(NamedTuple):
    """Everything that makes pictures, on its device, frozen."""

    denoise: Denoise
    autoencoder: "AutoencoderKL | None"  # None: the U-Net makes the pixels themselves
    conditioning: Conditioning
    process: ProcessConfig
    schedule: Schedule  # fp32
    image_size: int  # pixels a side
    facts: dict[str, Any]  # of clipkit_diffusion.json

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of what the U-Net makes."""
        config: Any = self.denoise.unet.config
        return config.out_channels, config.sample_size, config.sample_size


def save_pipeline(folder: Path, *, unet: nn.Module, autoencoder: "AutoencoderKL | None", conditioning: Conditioning,
                  process: ProcessConfig, image_size: int, facts: dict[str, Any]) -> None:
    """Write a pipeline folder into an empty folder.

    Args:
      folder: exists and is empty.
      unet: its weights at present.
      autoencoder: None for diffusion of the pixels.
      conditioning: what the U-Net was trained with.
      process: likewise.
      image_size: pixels a side.
      facts: more for clipkit_diffusion.json: name of the run, step, weights of the CLIP.
    """
    scheduler = make_scheduler(process)
    with quiet_loading():
        plain = copy.deepcopy(unet).to("cpu", torch.float32, memory_format=torch.contiguous_format).eval()  # pyright: ignore
        if autoencoder is not None and conditioning.kind == "text":
            from diffusers import StableDiffusionPipeline  # pyright: ignore[reportPrivateImportUsage]

            text: Any = conditioning
            StableDiffusionPipeline(
                vae=copy.deepcopy(autoencoder).cpu(), text_encoder=copy.deepcopy(text.text_encoder).cpu(),
                tokenizer=text.tokenize.tokenizer, unet=plain, scheduler=scheduler, safety_checker=None,  # pyright: ignore
                feature_extractor=None,  # pyright: ignore[reportArgumentType]
                requires_safety_checker=False).save_pretrained(folder, safe_serialization=True)
        else:
            plain.save_pretrained(folder / "unet", safe_serialization=True)  # pyright: ignore
            scheduler.save_pretrained(folder / "scheduler")
            if autoencoder is not None:
                copy.deepcopy(autoencoder).cpu().save_pretrained(folder / VAE_FOLDER, safe_serialization=True)
            conditioning.save(folder)
    described = {"kind": conditioning.kind, "weights_sha256": conditioning.weights_sha256}
    if isinstance(conditioning, MapConditioning):
        described |= {"side": conditioning.side, "small": conditioning.small}
    record = {"schema_version": SCHEMA_VERSION, "image_size": image_size, "process": process.__dict__,
              "conditioning": described, **facts}
    write_text_atomically(folder / FACTS, json.dumps(record, indent=1) + "\n")


def load_pipeline(source: str | Path, *, device: str | torch.device = "cpu") -> Pipeline:
    """Load a pipeline folder, or that of a run, for sampling.

    Raises:
      FileNotFoundError: there is none.
      ValueError: it is damaged, or was written by a later version.
    """
    from safetensors import SafetensorError

    folder = pipeline_folder(source)
    facts = read_facts(folder)
    try:
        conditioning = _load_conditioning(folder, facts["conditioning"])
        autoencoder = load_autoencoder(folder, device=device) if (folder / VAE_FOLDER).is_dir() else None
        unet = load_unet(folder / "unet")
    except FileNotFoundError:
        raise
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{folder} cannot be loaded ({' '.join(str(error).split())}); copy the pipeline again, or resume its "
                         "training") from error
    process = parse(ProcessConfig, facts["process"])
    schedule = make_schedule(process.schedule, num_timesteps=process.num_timesteps, zero_terminal_snr=process.zero_terminal_snr)
    networks: list[Any] = [unet, *filter(None, [autoencoder])]
    for network in networks:
        network.to(memory_format=torch.channels_last)  # convolutions take 1.2 times less time on CPUs
    return Pipeline(Denoise(unet).to(device).eval().requires_grad_(False), autoencoder, conditioning.to(device), process,
                    schedule.to(torch.device(device)), facts["image_size"], facts)


def pipeline_folder(source: str | Path) -> Path:
    """Where the pipeline of a run is; a pipeline's own folder is itself.

    Raises:
      FileNotFoundError: there is none.
    """
    place = Path(source).expanduser()
    folder = place / FOLDER if (place / FOLDER).is_dir() else place
    if not (folder / FACTS).is_file():
        raise FileNotFoundError(f"{folder} holds no pipeline of clipkit's (no {FACTS}); give a run of clipkit diffusion train, "
                                "as runs/emoji_diffusion")
    return folder


def read_facts(folder: Path) -> dict[str, Any]:
    """Read clipkit_diffusion.json: process, conditioning, image_size, name and step of the run.

    Raises:
      ValueError: it is damaged, or was written by a later version.
    """
    try:
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{folder / FACTS} is damaged ({error}); copy the pipeline again, or resume its training") from error
    if facts.get("schema_version") != SCHEMA_VERSION:
        raise ValueError(f"{folder / FACTS} has schema version {facts.get('schema_version')}, this clipkit reads "
                         f"{SCHEMA_VERSION}; sample with the version that wrote it")
    return facts


def pipeline_sha256(folder: Path) -> str:
    """One hash of all that makes the pictures of a pipeline folder: its weights, each in its place, and the process."""
    process = read_facts(folder)["process"]
    weights = {file.relative_to(folder).as_posix(): file_sha256(file) for file in folder.rglob("*.safetensors")}
    return hashlib.sha256(json.dumps([process, weights], sort_keys=True).encode()).hexdigest()


def load_unet(folder: Path) -> nn.Module:
    """Load a U-Net of either kind, as its own configuration names it."""
    from diffusers.models.unets.unet_2d import UNet2DModel
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    kinds: dict[str, Any] = {"UNet2DModel": UNet2DModel, "UNet2DConditionModel": UNet2DConditionModel}
    name = json.loads((folder / "config.json").read_text(encoding="utf-8"))["_class_name"]
    if name not in kinds:
        raise ValueError(f"{folder} holds a {name}; clipkit samples with one of {', '.join(kinds)}")
    return kinds[name].from_pretrained(folder, local_files_only=True, use_safetensors=True, low_cpu_mem_usage=False)


def make_scheduler(process: ProcessConfig) -> Any:
    """The scheduler of diffusers that walks back through this process, from its very last level.

    A flow gets the solver that Stable Diffusion's pipeline can run; the Euler scheduler of flows cannot.
    """
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler
    from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler

    if process.schedule == "flow":
        return DPMSolverMultistepScheduler(num_train_timesteps=process.num_timesteps, use_flow_sigmas=True,
                                           prediction_type="flow_prediction", steps_offset=1)  # 1: else the pipeline warns
    return DDIMScheduler(num_train_timesteps=process.num_timesteps, beta_start=0.00085, beta_end=0.012,
                         beta_schedule=BETA_SCHEDULES[process.schedule], clip_sample=False, set_alpha_to_one=True,
                         steps_offset=1, prediction_type=PREDICTION_TYPES[process.prediction],  # pyright: ignore
                         rescale_betas_zero_snr=process.zero_terminal_snr, timestep_spacing="trailing")


def _load_conditioning(folder: Path, described: dict[str, Any]) -> Conditioning:
    if described["kind"] not in ("text", "image"):
        return MapConditioning(described["kind"], side=described["side"], small=described["small"])
    conditioning = load_text_conditioning(str(folder)) if described["kind"] == "text" else \
        ImageConditioning(load_model(folder / "image_encoder"))
    conditioning.weights_sha256 = described["weights_sha256"]  # of the file that it came from, not of its copy here
    return conditioning
