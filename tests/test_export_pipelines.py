"""Exported text encoders in tiny random SD, SDXL, SD 3 and Flux pipelines, by plain scripts that never import clipkit."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import clipkit
from clipkit.interop.self_check import TEXTS, clean, text_states
from tests.test_export import make_model

pytestmark = pytest.mark.slow

LOAD = """
import os, sys
os.environ["HF_HUB_OFFLINE"] = "1"
import torch
from safetensors.torch import load_file
torch.set_num_threads(1)
torch.manual_seed(0)

def vae(channels=4):
    from diffusers import AutoencoderKL
    return AutoencoderKL(block_out_channels=(8, 16), norm_num_groups=4, latent_channels=channels, sample_size=16,
                         down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
                         shift_factor=0.0, scaling_factor=1.0)
"""

STABLE_DIFFUSION = LOAD + """
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer
tokenizer = CLIPTokenizer.from_pretrained("te")
tokens = tokenizer(open("texts").read().split("\\0"), padding="max_length", truncation=True, return_tensors="pt").input_ids
wanted = load_file("wanted.safetensors")
with torch.no_grad():
    full, plain = CLIPTextModelWithProjection.from_pretrained("te")(tokens), CLIPTextModel.from_pretrained("te")(tokens)
torch.testing.assert_close(full.text_embeds, wanted["projected"], atol=1e-5, rtol=0)
torch.testing.assert_close(plain.last_hidden_state, wanted["last"], atol=1e-5, rtol=0)

from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
unet = UNet2DConditionModel(block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=4, sample_size=8,
                            attention_head_dim=2, cross_attention_dim=32,
                            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"))
pipeline = StableDiffusionPipeline(vae(), CLIPTextModel.from_pretrained("te"), tokenizer, unet, DDIMScheduler(), None, None,
                                   requires_safety_checker=False)
pipeline.save_pretrained("pipeline")
again = StableDiffusionPipeline.from_pretrained("pipeline", local_files_only=True)
with torch.no_grad():
    torch.testing.assert_close(again.text_encoder(tokens).last_hidden_state, wanted["last"], atol=1e-5, rtol=0)
pictures = [one("a red square", num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="pt").images
            for one in (pipeline, again)]
assert pictures[0].shape == (1, 3, 16, 16) and pictures[0].isfinite().all()
torch.testing.assert_close(pictures[1], pictures[0], atol=1e-5, rtol=0)
assert "clipkit" not in sys.modules
print("same numbers, and a picture")
"""

TWO_ENCODERS = LOAD + """
from transformers import CLIPTextModelWithProjection, CLIPTokenizer, CLIPTextModel, CLIPTextConfig
tokenizers = [CLIPTokenizer.from_pretrained(name) for name in ("one", "two")]
prompts = ["a photo of a cat", "wow ! ok"]
wanted = load_file("wanted.safetensors")

from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
unet = UNet2DConditionModel(block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=4, sample_size=8,
                            attention_head_dim=2, cross_attention_dim=64, transformer_layers_per_block=1,
                            addition_embed_type="text_time", addition_time_embed_dim=8,
                            projection_class_embeddings_input_dim=6 * 8 + 16,
                            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"))
pipeline = StableDiffusionXLPipeline(vae(), CLIPTextModel.from_pretrained("one"),
                                     CLIPTextModelWithProjection.from_pretrained("two"), *tokenizers, unet,
                                     EulerDiscreteScheduler(), add_watermarker=False)
pipeline.save_pretrained("xl")
pipeline = StableDiffusionXLPipeline.from_pretrained("xl", local_files_only=True, add_watermarker=False)
embeds, _, pooled, _ = pipeline.encode_prompt(prompts, device="cpu", do_classifier_free_guidance=False)
torch.testing.assert_close(embeds, torch.cat([wanted["penultimate_one"], wanted["penultimate_two"]], dim=-1), atol=1e-5, rtol=0)
torch.testing.assert_close(pooled, wanted["projected_two"], atol=1e-5, rtol=0)
picture = pipeline("a cat", num_inference_steps=2, output_type="pt", height=16, width=16).images
assert picture.shape == (1, 3, 16, 16) and picture.isfinite().all()
print("SDXL")

def from_single_file(folder):
    encoder = CLIPTextModelWithProjection(CLIPTextConfig.from_pretrained(folder)).eval()
    encoder.load_state_dict({name: tensor.float() for name, tensor in load_file(f"{folder}/text_encoder.safetensors").items()})
    return encoder

from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
transformer = SD3Transformer2DModel(sample_size=8, patch_size=1, in_channels=4, num_layers=1, attention_head_dim=8,
                                    num_attention_heads=4, caption_projection_dim=32, joint_attention_dim=64,
                                    pooled_projection_dim=32, out_channels=4)
pipeline = StableDiffusion3Pipeline(transformer, FlowMatchEulerDiscreteScheduler(), vae(), from_single_file("one"),
                                    tokenizers[0], from_single_file("two"), tokenizers[1], None, None)
embeds, _, pooled, _ = pipeline.encode_prompt(prompts, prompts, prompts, device="cpu", do_classifier_free_guidance=False)
both = [torch.cat([wanted[f"{kind}_one"], wanted[f"{kind}_two"]], dim=-1) for kind in ("penultimate", "projected")]
torch.testing.assert_close(embeds[:, :16], both[0], atol=2e-2, rtol=1e-2)
torch.testing.assert_close(pooled, both[1], atol=2e-2, rtol=1e-2)
picture = pipeline("a cat", num_inference_steps=2, output_type="pt", height=16, width=16).images
assert picture.shape == (1, 3, 16, 16) and picture.isfinite().all()
print("SD 3")

from diffusers import FluxPipeline, FluxTransformer2DModel
transformer = FluxTransformer2DModel(patch_size=1, in_channels=16, num_layers=1, num_single_layers=1,
                                     attention_head_dim=16, num_attention_heads=2, joint_attention_dim=32,
                                     pooled_projection_dim=32, axes_dims_rope=(4, 4, 8))
encoder = CLIPTextModel.from_pretrained(None, config=CLIPTextConfig.from_pretrained("one"), dtype=torch.float32,
                                        state_dict=load_file("one/text_encoder.safetensors"))
pipeline = FluxPipeline(FlowMatchEulerDiscreteScheduler(), vae(), encoder, tokenizers[0], None, None, transformer)
pooled = pipeline._get_clip_prompt_embeds(prompts, device="cpu")
torch.testing.assert_close(pooled, wanted["pooled_one"], atol=2e-2, rtol=1e-2)
picture = pipeline(prompt_embeds=torch.randn(2, 8, 32), pooled_prompt_embeds=pooled, num_inference_steps=2, output_type="pt",
                   height=16, width=16).images
assert picture.shape == (2, 3, 16, 16) and picture.isfinite().all()
assert "clipkit" not in sys.modules
print("Flux")
"""


def run_plain(script: str, folder: Path) -> str:
    pytest.importorskip("diffusers", reason="needs diffusers: pip install 'clipkit-vl[diffusion]'")
    done = subprocess.run([sys.executable, "-c", script], cwd=folder, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("layer", ["last", "penultimate"])
def test_a_stable_diffusion_pipeline_is_assembled_saved_reloaded_and_sampled(layer, tmp_path):
    from safetensors.torch import save_file
    from transformers import CLIPTokenizer

    model = make_model()
    clipkit.export_text_encoder(model, tmp_path / "te", layer=layer)
    texts = clean(TEXTS)
    tokens = CLIPTokenizer.from_pretrained(tmp_path / "te")(texts, padding="max_length", truncation=True,
                                                            return_tensors="pt").input_ids
    states = text_states(model.towers, tokens, 3 if layer == "last" else 2)
    (tmp_path / "texts").write_text("\0".join(texts), encoding="utf-8")
    save_file({"last": states.last.contiguous(), "projected": states.projected.contiguous()}, tmp_path / "wanted.safetensors")
    assert "same numbers, and a picture" in run_plain(STABLE_DIFFUSION, tmp_path)


def test_both_encoders_of_sdxl_and_the_single_files_of_sd3_and_flux(tmp_path):
    """SDXL and SD 3 take the penultimate state without the final norm, and the projected output; Flux the pooled one.

    The single files are fp16: their states are within 2e-2 and a hundredth of values up to 5.
    """
    from safetensors.torch import save_file
    from transformers import CLIPTokenizer

    wanted: dict[str, torch.Tensor] = {}
    for number, name in enumerate(("one", "two")):
        model = make_model({"custom_text": bool(number), "quick_gelu": not number})
        clipkit.export_text_encoder(model, tmp_path / name, single_file=True)
        tokens = CLIPTokenizer.from_pretrained(tmp_path / name)(["a photo of a cat", "wow ! ok"], padding="max_length",
                                                                return_tensors="pt").input_ids
        states = text_states(model.towers, tokens)
        wanted |= {f"penultimate_{name}": states.hidden[-2].contiguous(), f"projected_{name}": states.projected.contiguous(),
                   f"pooled_{name}": states.pooled.contiguous()}
    save_file(wanted, tmp_path / "wanted.safetensors")
    assert run_plain(TWO_ENCODERS, tmp_path).split("\n")[:3] == ["SDXL", "SD 3", "Flux"]
