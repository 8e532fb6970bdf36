"""Each experiment that comes with the project is a whole set of settings."""

import pytest

from clipkit.config.command_line import conf_dir
from clipkit.config.diffusion.autoencoder import AutoencoderConfig
from clipkit.config.diffusion.train import DiffusionTrainConfig
from clipkit.config.pretrain import PretrainConfig
from tests.conftest import command_settings

SCHEMAS = {"pretrain": PretrainConfig, "diffusion/autoencoder": AutoencoderConfig, "diffusion/train": DiffusionTrainConfig}


def experiments() -> list[tuple[str, str]]:
    found = [file.relative_to(conf_dir()) for file in conf_dir().glob("**/experiment/*.yaml")]
    return sorted((file.parents[1].as_posix(), file.stem) for file in found)


@pytest.mark.parametrize(("command", "name"), experiments())
def test_an_experiment_is_a_whole_set_of_settings(command, name):
    own = () if name.startswith("emoji") else ("data=shards", "data.train=[a.tar]", "name=own")
    config = command_settings(command, SCHEMAS[command], f"experiment={name}", *own)
    assert (config.train.samples is None) != (config.train.epochs is None)
    if name.startswith("emoji") and command != "diffusion/autoencoder":
        assert config.name == name  # its run is found by the name of the experiment


def test_the_long_u_net_works_in_the_long_autoencoder():
    autoencoder, unet = (command_settings(command, SCHEMAS[command], "experiment=emoji_diffusion_long")
                         for command in ("diffusion/autoencoder", "diffusion/train"))
    assert unet.autoencoder == f"runs/{autoencoder.name}"
    assert autoencoder.model.config["latent_channels"] == 8
    assert autoencoder.model.config["block_out_channels"] == [16, 16, 64]
