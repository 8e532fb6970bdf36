"""What the README and docs/ show: their Python runs, their commands are understood, their links lead somewhere."""

import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from hydra.core.global_hydra import GlobalHydra

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
pytestmark = pytest.mark.slow


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def command_lines() -> list[str]:
    lines = [line for page in PAGES for block in blocks(page, "bash") for line in block.replace("\\\n", "").splitlines()]
    return list(dict.fromkeys(line for line in lines if line.strip()))


@pytest.fixture
def run_folder(tmp_path, monkeypatch, tiny_model):
    """A folder with runs/emoji of a tiny model and a picture, as the current one."""
    from PIL import Image

    from clipkit.model.folder import save_model_folder

    save_model_folder(tiny_model, tmp_path / "runs" / "emoji" / "model")
    Image.new("RGB", (40, 50), "red").save(tmp_path / "picture.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_of_a_page_runs(page, run_folder):
    names = exported_and_the_rest_of_a_pipeline() if page.name == "export.md" else {}
    for block in blocks(page, "python"):
        exec(compile(block, str(page), "exec"), {"__name__": "page", **names})


def exported_and_the_rest_of_a_pipeline() -> dict[str, object]:
    """What docs/export.md takes as given: the folder te, and the parts of a pipeline that are not clipkit's."""
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel

    import clipkit

    clipkit.export_text_encoder("runs/emoji", "te")
    unet = UNet2DConditionModel(block_out_channels=(16,), norm_num_groups=4, sample_size=8, cross_attention_dim=32,
                                down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",))
    scheduler = DDIMScheduler(steps_offset=1, clip_sample=False)
    return {"vae": AutoencoderKL(block_out_channels=(8,), norm_num_groups=4), "unet": unet, "scheduler": scheduler}


def test_the_readme_s_open_clip_lines_give_the_features_of_its_clipkit_lines(run_folder):
    from PIL import Image

    names: dict = {"__name__": "page"}
    ours, theirs = blocks(ROOT / "README.md", "python")
    exec(ours, names)
    image_features, text_features = names["image_features"], names["text_features"]
    exec(theirs, names)
    names["model"].eval()
    with torch.no_grad():
        image = names["model"].encode_image(names["preprocess"](Image.open("picture.png"))[None], normalize=True)
        text = names["model"].encode_text(names["tokenizer"](["a dog", "an umbrella"]), normalize=True)
    torch.testing.assert_close(image, image_features, atol=1e-5, rtol=0)  # fp32, other order of sums
    torch.testing.assert_close(text, text_features, atol=1e-5, rtol=0)


def test_the_loss_shown_is_the_loss_used():
    from clipkit.losses import clip_loss

    names: dict = {"__name__": "page"}
    exec(blocks(ROOT / "docs" / "clip.md", "python")[0], names)
    features = torch.nn.functional.normalize(torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(0)), dim=-1)
    scale = torch.tensor(14.0)
    torch.testing.assert_close(names["clip_loss"](*features, scale), clip_loss(*features, scale), atol=0, rtol=0)


@pytest.mark.parametrize("line", command_lines())
def test_a_command_line_is_understood(line, monkeypatch, tmp_path, capsys):
    """`make` targets and scripts exist; `clipkit` and `torchrun ... -m clipkit` lines compose."""
    words = shlex.split(line, comments=True)
    if words[0] == "export":
        return
    if words[0] == "sbatch":
        assert [(ROOT / word).is_file() for word in words if word.startswith("scripts/")] == [True]
        return
    if words[0] == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        assert {word for word in words[1:] if "=" not in word} <= set(targets)
        return
    arguments = words[words.index("clipkit") + 1:]
    if "hydra/launcher=submitit_slurm" in arguments:  # as one job: the launcher is a plugin, and asks for srun
        arguments = [word for word in arguments if word != "-m" and not word.startswith(("hydra/launcher", "hydra.launcher"))]
    command = "/".join([arguments.pop(0), arguments.pop(0)]) if arguments[0] in ("shards", "diffusion") else arguments.pop(0)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["clipkit"])
    composed = compose(command, arguments)
    assert composed or {"--help", "--cfg"} & set(arguments), capsys.readouterr().err


def compose(command: str, arguments: list[str]) -> list:
    from clipkit.commands import lit, pretrain
    from clipkit.commands.diffusion import autoencoder
    from clipkit.commands.diffusion import train as diffusion_train
    from clipkit.config import PretrainConfig
    from clipkit.config.diffusion.autoencoder import AutoencoderConfig
    from clipkit.config.diffusion.evaluate import EvaluateConfig
    from clipkit.config.diffusion.sample import SampleConfig
    from clipkit.config.diffusion.train import DiffusionTrainConfig
    from clipkit.config.export import ExportConfig
    from clipkit.config.interpolate import InterpolateConfig
    from clipkit.config.launch import launch
    from clipkit.config.lit import LitConfig
    from clipkit.config.model import as_start
    from clipkit.config.shards import ShardsCheckConfig, ShardsWriteConfig
    from clipkit.config.zero_shot import CompareConfig, EmbedConfig, ZeroShotConfig

    schema = {"pretrain": PretrainConfig, "shards/write": ShardsWriteConfig, "shards/check": ShardsCheckConfig,
              "zero-shot": ZeroShotConfig, "compare": CompareConfig, "embed": EmbedConfig,
              "export": ExportConfig, "diffusion/autoencoder": AutoencoderConfig,
              "diffusion/train": DiffusionTrainConfig, "diffusion/sample": SampleConfig,
              "diffusion/evaluate": EvaluateConfig, "lit": LitConfig, "interpolate": InterpolateConfig}[command]
    implied = {"pretrain": pretrain.IMPLIED, "diffusion/autoencoder": autoencoder.IMPLIED,
               "diffusion/train": diffusion_train.IMPLIED, "lit": lit.IMPLIED}
    arguments = list(as_start(arguments)) if command == "pretrain" else arguments
    found: list = []
    try:
        launch(command, schema, lambda config: found.append(config), arguments, implied.get(command))
    finally:
        GlobalHydra.instance().clear()
    return found


@pytest.mark.parametrize("page", [*PAGES, ROOT / "LOG.md"], ids=lambda page: page.name)
def test_links_lead_to_files(page):
    for link in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        assert "://" in link or (page.parent / link).exists(), f"{page.name} links to {link}, which is not there"


def test_the_readme_has_no_gaps():
    assert "TODO" not in (ROOT / "README.md").read_text(encoding="utf-8")
