"""Pipeline folders of tiny networks with random weights, for the tests of diffusion."""

from pathlib import Path

import torch

from clipkit.config.diffusion.train import ProcessConfig
from clipkit.diffusion.autoencoder import make_autoencoder
from clipkit.diffusion.conditioning import MapConditioning
from clipkit.diffusion.pipeline_folder import save_pipeline
from clipkit.diffusion.unet import make_unet

IMAGE_SIZE = 16
PROCESS = {"schedule": "scaled_linear", "prediction": "v", "num_timesteps": 1000, "zero_terminal_snr": True,
           "weight": "uniform"}
FLOW = {**PROCESS, "schedule": "flow", "prediction": "flow"}
AUTOENCODER = {"block_out_channels": [8, 16], "down_block_types": ["DownEncoderBlock2D"] * 2, "norm_num_groups": 4,
               "up_block_types": ["UpDecoderBlock2D"] * 2, "latent_channels": 4, "mid_block_add_attention": False}
UNET = {"block_out_channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 2}
BLOCKS = {True: (["CrossAttnDownBlock2D", "DownBlock2D"], ["UpBlock2D", "CrossAttnUpBlock2D"]),
          False: (["DownBlock2D", "DownBlock2D"], ["UpBlock2D", "UpBlock2D"])}  # whether something is attended to


def make_pipeline(folder: Path, conditioning, *, process=PROCESS, pixels: bool = False) -> Path:
    """A pipeline folder of tiny networks with random weights. Returns the folder."""
    torch.manual_seed(0)
    side, channels = (IMAGE_SIZE, 3) if pixels else (IMAGE_SIZE // 2, 4)
    down, up = BLOCKS[not isinstance(conditioning, MapConditioning)]
    unet = make_unet({**UNET, "down_block_types": down, "up_block_types": up}, side=side, channels=channels,
                     conditioning=conditioning)
    autoencoder = None if pixels else make_autoencoder(AUTOENCODER, image_size=IMAGE_SIZE).eval()
    if autoencoder is not None:
        autoencoder.register_to_config(scaling_factor=0.9)
    folder.mkdir(parents=True)
    save_pipeline(folder, unet=unet, autoencoder=autoencoder, conditioning=conditioning, process=ProcessConfig(**process),
                  image_size=IMAGE_SIZE, facts={"name": "tiny", "step": 3})
    return folder
