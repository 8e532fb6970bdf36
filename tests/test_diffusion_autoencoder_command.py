"""`clipkit diffusion autoencoder` as a person uses it: runs, stops, resumes, saves; and each bad input in one line."""

import json
import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from safetensors.torch import load_file

from clipkit.__main__ import COMMANDS
from clipkit.commands.diffusion import main as diffusion_main
from clipkit.commands.diffusion.autoencoder import IMPLIED, train_autoencoder
from clipkit.config.diffusion.autoencoder import AutoencoderConfig
from clipkit.diffusion.autoencoder import latent_scale, load_autoencoder, make_autoencoder, to_pixel_values
from clipkit.diffusion.draws import latent_noise
from clipkit.diffusion.reconstruction_report import task_images
from clipkit.model.folder import save_model_folder
from clipkit.training.stop import EXIT_STOPPED
from tests.conftest import command_settings

STEPS, BATCH = 10, 8
SMALL = {"model": "tiny", "loss": "none", "name": "small", "train.global_batch_size": BATCH, "train.samples": STEPS * BATCH,
         "train.epochs": "null", "train.precision": "fp32", "train.ema_decay": 0.9, "data.workers": 0, "data.lanes": 4,
         "log.every": 1, "log.to": "[]", "device": "cpu", "scale_images": 64, "loss.discriminator_start": 0.2,
         "loss.discriminator_channels": 8, "optim.lr": "1e-3"}
TINY_CONFIG = {"block_out_channels": [8, 16], "down_block_types": ["DownEncoderBlock2D"] * 2,
               "up_block_types": ["UpDecoderBlock2D"] * 2, "norm_num_groups": 4}


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(shards: str, **more) -> int | None:
    """Train the small one; `loss__perceptual="none"` stands for loss.perceptual=none."""
    chosen = {**SMALL, "data.train": shards, **{key.replace("__", "."): value for key, value in more.items()}}
    arguments = [f"{key}={value}" for key, value in chosen.items()]
    return train_autoencoder(command_settings("diffusion/autoencoder", AutoencoderConfig, *arguments, implied=IMPLIED))


def lines(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the newest checkpoint; copies, as safetensors gives the file itself, mapped."""
    newest = run_dir / "checkpoints" / (run_dir / "checkpoints" / "latest").read_text().strip()
    return {f"{file.stem}/{name}": tensor.clone() for file in newest.glob("*.safetensors")
            for name, tensor in load_file(file).items()}


def pictures(shards: str) -> torch.Tensor:
    return torch.cat(list(task_images(shards, image_size=32, batch_size=32)))


def test_a_run_leaves_everything_and_ends_well_again(shards, tmp_path, capsys, tiny_model):
    save_model_folder(tiny_model, tmp_path / "clip" / "model")
    options = {"loss__perceptual": "clip", "loss__perceptual_model": "clip", "evaluation__final_tasks": f"[{shards}]"}
    assert run(shards, log__to="[tensorboard]", evaluation__tasks=f"[{shards}]", evaluation__every=5, **options) is None
    run_dir = tmp_path / "runs" / "small"
    assert {"config.yaml", "environment.json", "metrics.jsonl", "curves.png", "reconstructions.png", "checkpoints", "vae",
            "results.json"} <= {path.name for path in run_dir.iterdir()}
    assert {path.name for path in (run_dir / "vae").iterdir()} == {"config.json", "diffusion_pytorch_model.safetensors"}
    steps = [line for line in lines(run_dir) if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1))
    for name in ("samples_seen", "epoch", "pixels", "perceptual", "kl", "adversarial", "adaptive_weight", "discriminator_loss",
                 "lr", "grad_norm", "samples_per_second", "data_wait_fraction", "peak_memory_gb", "bad", "skipped_steps"):
        assert name in steps[-1], name
    joined = [line["discriminator_loss"] > 0 for line in steps]
    assert joined == [False] * 2 + [True] * 8 and steps[-1]["perceptual"] > 0
    assert [line["step"] for line in lines(run_dir) if line.get("metric") == "psnr"] == [0, 5, 10]
    results = json.loads((run_dir / "results.json").read_text())
    assert [(one["metric"], one["n"]) for one in results["results"]] == [
        ("psnr", 128), ("ssim", 128), ("perceptual_distance", 128)]
    assert results["perceptual"] == "clip clip" and len(results["weights_sha256"]) == 64
    shown = capsys.readouterr().out
    assert shown.startswith("clipkit diffusion autoencoder: runs/small")
    for word in ("model ", "data ", "schedule ", "hardware ", "pictures", "joins at step 2", "psnr", "next "):
        assert word in shown
    before = weights(run_dir), (run_dir / "vae" / "config.json").read_bytes(), lines(run_dir)
    assert run(shards, **options) is None  # finished: shows its numbers again
    assert "finished" in capsys.readouterr().out
    assert before[1:] == ((run_dir / "vae" / "config.json").read_bytes(), lines(run_dir))


@pytest.mark.slow
def test_the_reported_psnr_is_that_of_the_saved_folder_in_diffusers(shards, tmp_path):
    """Diffusers alone loads the folder; its reconstruction is that of the averaged weights of the checkpoint."""
    from diffusers import AutoencoderKL

    assert run(shards, evaluation__final_tasks=f"[{shards}]", train__channels_last="true") is None
    saved = AutoencoderKL.from_pretrained(tmp_path / "runs" / "small" / "vae", low_cpu_mem_usage=False).eval()
    again = make_autoencoder({**TINY_CONFIG, "latent_channels": 4, "mid_block_add_attention": False}, image_size=32).eval()
    again.load_state_dict({name.removeprefix("ema/"): tensor for name, tensor in weights(tmp_path / "runs" / "small").items()
                           if name.startswith("ema/")})
    images = to_pixel_values(pictures(shards))
    with torch.no_grad():
        found, wanted = (model.decode(model.encode(images).latent_dist.mode()).sample for model in (saved, again))
    assert torch.allclose(found, wanted, atol=1e-6)
    error = ((found.clamp(-1, 1) - images).double().numpy() / 2) ** 2
    psnr = np.mean([-10 * np.log10(one.mean()) for one in error])
    results = json.loads((tmp_path / "runs" / "small" / "results.json").read_text())
    assert results["results"][0]["value"] == pytest.approx(psnr, abs=1e-3)
    assert saved.config.scaling_factor == pytest.approx(results["scaling_factor"])
    assert load_autoencoder(tmp_path / "runs" / "small").config.scaling_factor == saved.config.scaling_factor


def test_the_measured_scale_gives_latents_a_deviation_of_one():
    torch.manual_seed(0)
    autoencoder = make_autoencoder(TINY_CONFIG, image_size=32).eval()
    images = torch.randint(0, 256, (768, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    scale = latent_scale(autoencoder, images[:512].split(64))
    with torch.no_grad():
        latents = torch.cat([autoencoder.encode(to_pixel_values(part)).latent_dist.sample(torch.Generator().manual_seed(1))
                             for part in images[512:].split(64)])
    assert (scale * latents).std().item() == pytest.approx(1, abs=0.02)


def test_latents_without_a_scale_are_refused():
    autoencoder = make_autoencoder(TINY_CONFIG, image_size=32)
    with torch.no_grad():
        autoencoder.quant_conv.bias.fill_(float("nan"))
    with pytest.raises(ValueError, match="no scale"):
        latent_scale(autoencoder, [torch.zeros(2, 3, 32, 32, dtype=torch.uint8)])


def test_a_run_stopped_by_sigterm_resumes_to_the_same_bits(shards, tmp_path):
    """With the discriminator at work before and after, and on other workers."""
    assert run(shards, name="whole", evaluation__final_tasks="[]") is None

    class TermAtStep(threading.Thread):
        def run(self):
            file = tmp_path / "runs" / "parts" / "metrics.jsonl"
            while not file.exists() or len(file.read_text().splitlines()) < 4:
                time.sleep(0.002)
            os.kill(os.getpid(), signal.SIGTERM)

    thread = TermAtStep()
    thread.start()
    assert run(shards, name="parts", evaluation__final_tasks="[]") == EXIT_STOPPED
    thread.join()
    assert 4 <= lines(tmp_path / "runs" / "parts")[-1]["step"] < STEPS
    assert run(shards, name="parts", evaluation__final_tasks="[]", data__workers=2) is None
    found, wanted = weights(tmp_path / "runs" / "parts"), weights(tmp_path / "runs" / "whole")
    assert found.keys() == wanted.keys()
    assert any(name.startswith("optimizer/discriminator.") for name in wanted)
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    losses = [[line["loss"] for line in lines(tmp_path / "runs" / name)] for name in ("whole", "parts")]
    assert losses[0] == losses[1]
    folders = [(tmp_path / "runs" / name / "vae" / "config.json").read_text() for name in ("whole", "parts")]
    assert folders[0] == folders[1]


def test_a_step_of_one_network_leaves_the_other_and_its_moments_as_they_are(shards, tmp_path):
    """One optimizer serves both: until the discriminator joins, it and its moments do not exist for it."""
    assert run(shards, loss__discriminator_start=0.5, train__samples=4 * BATCH, checkpoint__every_steps=2,
               evaluation__final_tasks="[]", checkpoint__keep=2) is None
    before, after = (load_file(tmp_path / "runs" / "small" / "checkpoints" / f"step-{step:08d}" / "optimizer.safetensors")
                     for step in (2, 4))
    assert not any(name.startswith("discriminator.") for name in before)
    steps = {name: int(tensor) for name, tensor in after.items() if name.endswith(".step")}
    assert {count for name, count in steps.items() if name.startswith("autoencoder.")} == {4}
    assert {count for name, count in steps.items() if name.startswith("discriminator.")} == {2}


@pytest.mark.slow
def test_bfloat16_checkpointing_and_no_average_train_too(shards, tmp_path):
    assert run(shards, train__precision="amp_bf16", train__activation_checkpointing="true", train__ema_decay="null",
               evaluation__final_tasks="[]", loss__discriminator_start=0, train__samples=2 * BATCH) is None
    assert all(np.isfinite(line["loss"]) for line in lines(tmp_path / "runs" / "small"))


@pytest.mark.slow
def test_overfitting_one_batch_brings_the_error_down(shards, tmp_path):
    assert run(shards, train__overfit_batches=1, train__samples=30 * BATCH, optim__lr="5e-3", loss__discriminator_start=1,
               evaluation__final_tasks="[]") is None
    errors = [line["pixels"] for line in lines(tmp_path / "runs" / "small")]
    assert errors[-1] < 0.6 * errors[0]
    assert not any(name.startswith("model/discriminator.") for name in weights(tmp_path / "runs" / "small"))


def test_a_loss_that_is_never_finite_stops_the_run(shards, tmp_path):
    with pytest.raises(ValueError, match=r"not finite in \d+ steps in a row.*lower optim.lr"):
        run(shards, optim__lr="1e30", optim__max_grad_norm="null", train__max_skipped_steps=3, schedule__warmup=0)
    assert not (tmp_path / "runs" / "small" / "vae").exists()


def test_the_noise_of_a_row_does_not_depend_on_the_number_of_processes():
    whole = latent_noise((6, 3, 3, 3), seed=0, step=5)
    parts = [latent_noise((2, 3, 3, 3), seed=0, step=5, rank=rank) for rank in range(3)]
    assert torch.equal(torch.cat(parts), whole)
    assert not torch.equal(latent_noise((6, 3, 3, 3), seed=0, step=6), whole)
    assert abs(latent_noise((64, 4, 16, 16), seed=1, step=0).std().item() - 1) < 0.01


# Plain gradient descent: Adam would blow the rounding of gradients near 0 up to steps of full size. The rate is so small
# that both sides' pictures differ by no more than rounding: larger differences turn a unit of the discriminator here and
# there, and with it the adaptive weight. A row that is not the same on both sides moves weights by a tenth of the rate,
# 50 times what is allowed.
ALIKE = {"optim__name": "sgd", "optim__lr": 5e-4, "evaluation__final_tasks": "[]"}


def one_rank(rank: int, port: int, shards: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2",
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    assert run(shards, name="two", **ALIKE) is None


@pytest.mark.multiprocess
@pytest.mark.slow
def test_two_processes_train_as_one(shards, tmp_path, free_port):
    assert run(shards, name="one", **ALIKE) is None
    mp.spawn(one_rank, args=(free_port, shards), nprocs=2)
    one, two = (weights(tmp_path / "runs" / name) for name in ("one", "two"))
    learned = [name for name in one if name.startswith(("model/", "ema/"))]
    assert any("discriminator" in name for name in learned)
    for name in learned:
        assert torch.allclose(two[name], one[name], rtol=0, atol=1e-6), name
    # Not the adaptive weight: the absolute error's gradient is a sign, which rounding turns where a pixel is met exactly.
    for term in ("pixels", "kl", "adversarial", "discriminator_loss"):
        curves = [[line[term] for line in lines(tmp_path / "runs" / name)] for name in ("one", "two")]
        assert curves[0] == pytest.approx(curves[1], rel=2e-5), term


BAD_SETTINGS = {
    "a size between those that fit": ({"model__image_size": 36}, "image_size is 36.*multiple of 8; the nearest are 32 and 40"),
    "a size below the first that fits": ({"model__image_size": 4}, "the nearest are 8$"),
    "an unknown argument of the network": ({"model__config__latent_chanels": 4}, "'latent_chanels', which.*does not know"),
    "too few blocks": ({"model__config__down_block_types": "[DownEncoderBlock2D]"}, "down_block_types has 1 values and"),
    "channels that do not divide": ({"model__config__norm_num_groups": 3}, "does not make an autoencoder"),
    "no channels": ({"model__config__block_out_channels": "[]"}, "block_out_channels is"),
    "an unknown perceptual loss": ({"loss": "vgg"}, "loss=vgg: no such choice; choose one of clip"),
    "an unknown backend": ({"loss__perceptual": "vgg"}, "loss.perceptual is 'vgg'; choose one of clip, timm, lpips, none"),
    "no run for the perceptual loss": ({"loss": "clip"}, "no folder runs/emoji.*train one with clipkit pretrain"),
    "a model that nothing reads": ({"loss__perceptual_model": "runs/emoji"}, "'none' reads no model"),
    "too few pictures": ({"train__global_batch_size": 512}, "128 samples, fewer than one batch"),
    "lanes that do not divide": ({"data__lanes": 3}, "lanes"),
    "an empty name": ({"name": ""}, "name is empty"),
    "no name": ({"name": "null"}, "name is required"),
    "a picture too small to judge": ({"model__image_size": 8}, "discriminator's image size is 8"),
}


@pytest.mark.parametrize("case", BAD_SETTINGS)
def test_bad_settings_are_one_line_and_leave_nothing(case, shards, tmp_path):
    given, message = BAD_SETTINGS[case]
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        run(shards, **given)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "runs").exists()


def test_a_folder_without_an_autoencoder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no autoencoder.*config\.json") as error:
        load_autoencoder(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_a_full_disk_leaves_no_half_of_a_folder(shards, tmp_path, monkeypatch):
    from diffusers import AutoencoderKL

    assert run(shards, evaluation__final_tasks="[]") is None
    (tmp_path / "runs" / "small" / "vae" / "config.json").rename(tmp_path / "aside.json")
    (tmp_path / "runs" / "small" / "vae").rename(tmp_path / "vae")

    def full(*arguments, **named):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(AutoencoderKL, "save_pretrained", full)
    with pytest.raises(OSError, match="disk is full"):
        run(shards, evaluation__final_tasks="[]")
    assert not [path.name for path in (tmp_path / "runs" / "small").iterdir() if "vae" in path.name]
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert run(shards, evaluation__final_tasks="[]") is None  # goes on from the last checkpoint: writes it again
    assert (tmp_path / "runs" / "small" / "vae" / "config.json").read_text() == (tmp_path / "aside.json").read_text()


@pytest.mark.parametrize("chosen", ["model=emoji", "model=tiny", "model=stable_diffusion", "loss=clip", "loss=timm",
                                    "loss=lpips", "loss=none", "data=emoji", "data.train=x.tar", "optim=adamw",
                                    "schedule=constant"])
def test_each_choice_of_a_group_gives_every_value(chosen):
    """parse() refuses a missing value and a strange one."""
    config = command_settings("diffusion/autoencoder", AutoencoderConfig, chosen, "name=x", implied=IMPLIED)
    assert config.model.image_size % config.model.downsampling == 0
    assert config.evaluation.final_tasks == (() if "x.tar" in chosen else ("emoji_val",))


def test_the_commands_of_diffusion_are_found_by_name(capsys):
    assert COMMANDS["diffusion"][0] == "clipkit.commands.diffusion"
    diffusion_main(["--help"])
    assert "autoencoder" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        diffusion_main(["paint"])
    assert "no such command; choose one of autoencoder" in capsys.readouterr().err
    diffusion_main(["autoencoder", "--help"])
    assert "loss.perceptual_model" in capsys.readouterr().out
