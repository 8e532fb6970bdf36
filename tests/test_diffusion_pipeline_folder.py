"""The pipeline folder: what is saved is what is loaded, what diffusers loads, and samples as diffusers does."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from clipkit.config.diffusion.train import ProcessConfig
from clipkit.diffusion.conditioning import ImageConditioning, MapConditioning, load_text_conditioning
from clipkit.diffusion.generate import Sampling, generate, solver_levels
from clipkit.diffusion.pipeline_folder import FACTS, load_pipeline, pipeline_sha256
from clipkit.interop.export import export_text_encoder
from clipkit.model.build import build_model
from tests.conftest import TINY
from tests.tiny_pipelines import FLOW, IMAGE_SIZE, PROCESS, make_pipeline

# diffusers hands tensors to numpy in a way that numpy 2 warns of.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning")

@pytest.fixture(scope="module")
def their_pipelines(folders):
    """The same folders as diffusers loads them."""
    from diffusers import StableDiffusionPipeline

    from clipkit.diffusion.quiet import quiet_loading

    with quiet_loading():
        found = {name: StableDiffusionPipeline.from_pretrained(folder, local_files_only=True, low_cpu_mem_usage=False)
                 for name, folder in folders.items()}
    for pipeline in found.values():
        pipeline.set_progress_bar_config(disable=True)
    return found


PROMPTS, SEEDS = ["a red heart", "a cat", ""], [5, 6, 7]


@pytest.mark.parametrize(("name", "sampler", "steps"), [("v", "ddim", 1), ("v", "ddim", 10), ("flow", "dpmpp_2m", 1),
                                                        ("flow", "dpmpp_2m", 7), ("flow", "dpmpp_2m", 20)])
@pytest.mark.parametrize(("guidance_scale", "guidance_rescale"), [(1.0, 0.0), (3.0, 0.7)])
def test_pictures_are_those_of_diffusers(name, sampler, steps, guidance_scale, guidance_rescale, folders, their_pipelines):
    """DDIM's steps divide the timesteps here; where they do not, that of diffusers goes to levels beside its next step's."""
    pipeline = load_pipeline(folders[name])
    ours = generate(pipeline, pipeline.conditioning.from_texts(PROMPTS), SEEDS,
                    Sampling(sampler, steps, guidance_scale, guidance_rescale))
    theirs = their_pipelines[name](PROMPTS, num_inference_steps=steps, guidance_scale=guidance_scale, output_type="pt",
                                   guidance_rescale=guidance_rescale,
                                   generator=[torch.Generator().manual_seed(seed) for seed in SEEDS]).images
    assert ours.shape == (3, 3, IMAGE_SIZE, IMAGE_SIZE) and ours.std() > 0.05
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("num_steps", [1, 9, 50, 999])
def test_the_levels_of_a_flow_are_those_of_the_saved_scheduler(num_steps, their_pipelines):
    scheduler = their_pipelines["flow"].scheduler
    scheduler.set_timesteps(num_steps)
    levels = solver_levels(num_steps, 1000)
    assert levels.timesteps.flip(0).tolist() == scheduler.timesteps.tolist()
    torch.testing.assert_close(levels.sigma.flip(0), scheduler.sigmas[:-1].double(), atol=1e-7, rtol=0)


@pytest.mark.parametrize("name", ["v", "flow"])
def test_image_to_image_runs_on_the_folder_and_keeps_as_much_as_it_is_told(name, their_pipelines):
    from diffusers import StableDiffusionImg2ImgPipeline

    pipeline = StableDiffusionImg2ImgPipeline(**their_pipelines[name].components, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    image = torch.linspace(0, 1, 3 * IMAGE_SIZE**2).view(1, 3, IMAGE_SIZE, IMAGE_SIZE)
    with torch.no_grad():
        vae = pipeline.vae
        plain = (vae.decode(vae.encode(image * 2 - 1).latent_dist.mode()).sample / 2 + 0.5).clamp(0, 1)
    distances = []
    for strength in (0.1, 0.9):
        made = pipeline("a red heart", image=image, strength=strength, num_inference_steps=10, guidance_scale=2.0,
                        generator=torch.Generator().manual_seed(0), output_type="pt").images
        assert made.shape == image.shape
        distances.append((made - plain).abs().mean().item())
    assert distances[0] < distances[1]


@pytest.mark.parametrize("kind", ["text", "image", "low_resolution", "semantic_map"])
@pytest.mark.parametrize("pixels", [False, True])
def test_what_is_saved_is_loaded(kind, pixels, text_encoder, tmp_path):
    side = IMAGE_SIZE if pixels else IMAGE_SIZE // 2
    torch.manual_seed(0)
    conditioning = (load_text_conditioning(str(text_encoder)) if kind == "text" else
                    ImageConditioning(build_model(config=TINY).eval()) if kind == "image" else
                    MapConditioning(kind, side=side, small=IMAGE_SIZE // 2))
    conditioning.weights_sha256 = "of the file that it came from" if kind in ("text", "image") else None
    folder = make_pipeline(tmp_path / "pipeline", conditioning, pixels=pixels)
    pipeline = load_pipeline(folder)
    assert pipeline.conditioning.kind == kind and (pipeline.autoencoder is None) == pixels
    assert pipeline.process == ProcessConfig(**PROCESS) and pipeline.latent_shape == ((3 if pixels else 4), side, side)
    assert pipeline.conditioning.weights_sha256 == conditioning.weights_sha256
    assert (folder / "model_index.json").is_file() == (kind == "text" and not pixels)
    assert not any(parameter.requires_grad for parameter in pipeline.denoise.parameters())
    images = torch.rand(2, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(0)) * 2 - 1
    tokens = conditioning.tokenize(["a cat", "a dog"]) if kind == "text" else None
    conditions = [one(tokens, images) for one in (conditioning, pipeline.conditioning)]
    torch.testing.assert_close(conditions[1], conditions[0], atol=1e-6, rtol=0)
    assert generate(pipeline, conditions[1], [0, 1], Sampling(steps=2)).shape == images.shape


def test_the_hash_changes_with_weights_and_process(folders, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folders["v"], copy)
    assert pipeline_sha256(copy) == pipeline_sha256(folders["v"]) != pipeline_sha256(folders["flow"])
    weights = load_file(copy / "unet" / "diffusion_pytorch_model.safetensors")
    weights["conv_in.bias"] = weights["conv_in.bias"] + 1
    save_file(weights, copy / "unet" / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    assert pipeline_sha256(copy) != pipeline_sha256(folders["v"])


def test_folders_that_cannot_be_sampled_from_are_answered_in_one_line(folders, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no pipeline of clipkit's .* give a run of clipkit diffusion train"):
        load_pipeline(tmp_path)
    copy = tmp_path / "copy"
    shutil.copytree(folders["v"], copy)
    facts = json.loads((copy / FACTS).read_text())
    (copy / FACTS).write_text(json.dumps({**facts, "schema_version": 99}))
    with pytest.raises(ValueError, match="schema version 99, this clipkit reads 1; sample with the version that wrote it"):
        load_pipeline(copy)
    (copy / FACTS).write_text(json.dumps(facts)[:50])
    with pytest.raises(ValueError, match="is damaged"):
        load_pipeline(copy)
    (copy / FACTS).write_text(json.dumps(facts))
    for name in ("unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"):
        (copy / name).write_bytes((folders["v"] / name).read_bytes()[:1000])
        with pytest.raises(ValueError, match=r"copy cannot be loaded .*; copy the pipeline again") as found:
            load_pipeline(copy)
        assert "\n" not in str(found.value)
        shutil.copy(folders["v"] / name, copy / name)
    (copy / "unet" / "config.json").write_text('{"_class_name": "Transformer2DModel"}')
    with pytest.raises(ValueError, match="holds a Transformer2DModel; clipkit samples with one of UNet2DModel"):
        load_pipeline(copy)


WITHOUT_CLIPKIT = """
import json, os, sys
os.environ["HF_HUB_OFFLINE"] = "1"
import torch
torch.set_num_threads(1)
from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file
told = json.load(open("told.json"))
pipeline = StableDiffusionPipeline.from_pretrained("pipeline", local_files_only=True)
generators = [torch.Generator().manual_seed(seed) for seed in told["seeds"]]
images = pipeline(told["prompts"], num_inference_steps=10, guidance_scale=3.0, generator=generators, output_type="pt").images
assert "clipkit" not in sys.modules and "open_clip" not in sys.modules
save_file({"images": images}, "theirs.safetensors")
"""


@pytest.mark.slow
@pytest.mark.parametrize("process", [PROCESS, FLOW], ids=["v", "flow"])
def test_a_vit_b_32_conditions_alike_where_clipkit_was_never_imported(process, tmp_path):
    torch.manual_seed(0)
    exported = export_text_encoder(build_model("ViT-B-32"), tmp_path / "te")
    folder = make_pipeline(tmp_path / "pipeline", load_text_conditioning(str(exported)), process=process)
    pipeline = load_pipeline(folder)
    sampler = "dpmpp_2m" if process is FLOW else "ddim"
    ours = generate(pipeline, pipeline.conditioning.from_texts(PROMPTS), SEEDS, Sampling(sampler, 10, 3.0))
    (tmp_path / "told.json").write_text(json.dumps({"prompts": PROMPTS, "seeds": SEEDS}))
    done = subprocess.run([sys.executable, "-c", WITHOUT_CLIPKIT], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(ours, load_file(tmp_path / "theirs.safetensors")["images"], atol=1e-5, rtol=0)
