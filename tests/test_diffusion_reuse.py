"""What is computed once in sampling: the same pictures as without, with less work, and a U-Net that is left as it was."""

import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from torch import nn

from clipkit.diffusion.noise_schedule import make_schedule
from clipkit.diffusion.reuse import Kept, reuse
from clipkit.diffusion.sampling import guided, sample
from clipkit.diffusion.unet import Denoise

LEVELS = {  # where the first level is that looks at the context
    "second": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "first": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "none": ("DownBlock2D", "DownBlock2D"),  # only the middle looks at it
}
UP = {"DownBlock2D": "UpBlock2D", "CrossAttnDownBlock2D": "CrossAttnUpBlock2D"}


def make_unet(levels: tuple[str, ...], **more) -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16), norm_num_groups=4,
                                layers_per_block=2, cross_attention_dim=12, attention_head_dim=2, down_block_types=levels,
                                up_block_types=tuple(UP[name] for name in levels[::-1]), **more).eval()


def contexts(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 5, 12, generator=generator), torch.randn(1, 5, 12, generator=generator)


def walk(unet: nn.Module, *, guidance_scale: float, num_steps: int = 4) -> torch.Tensor:
    context, empty = contexts(3)
    noise = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    denoiser = guided(Denoise(unet), context, empty, guidance_scale=guidance_scale)
    return sample(denoiser, noise, make_schedule("scaled_linear").to(torch.device("cpu")), num_steps=num_steps)


def count_calls(modules: dict[str, nn.Module]) -> dict[str, list[int]]:
    """Rows of every call of each module."""
    rows: dict[str, list[int]] = {name: [] for name in modules}
    for name, module in modules.items():
        module.register_forward_pre_hook(lambda module, given, name=name: rows[name].append(len(given[0])))
    return rows


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("levels", LEVELS)
def test_pictures_are_the_same_with_less_work(levels, guidance_scale):
    unet = make_unet(LEVELS[levels])
    wanted = walk(unet, guidance_scale=guidance_scale)
    projections = {name: module for name, module in unet.named_modules() if name.endswith(("attn2.to_k", "attn2.to_v"))}
    convolutions = {"first": unet.conv_in, "resnet": unet.down_blocks[0].resnets[0].conv1, "last": unet.conv_out}
    assert len(projections) >= 2
    with reuse(unet, guided=guidance_scale != 1):
        calls = count_calls(projections | convolutions)
        found = walk(unet, guidance_scale=guidance_scale)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    rows = 3 if guidance_scale == 1 else 6
    assert all(calls[name] == [rows] for name in projections)  # once in a walk of four steps
    assert calls["first"] == calls["resnet"] == [3] * 4
    assert calls["last"] == [rows] * 4


def test_another_context_is_projected_anew():
    project = Kept(nn.Linear(12, 6))
    first, second = contexts(3)
    for context in (first, second, first, first + 0):
        torch.testing.assert_close(project(context), project.project(context))
    calls = count_calls({"project": project.project})
    project(first)
    project(first)
    assert calls["project"] == [3]


def test_the_network_is_left_as_it_was_also_after_an_error():
    unet = make_unet(LEVELS["second"])
    before, keys = list(unet.modules()), list(unet.state_dict())
    with reuse(unet, guided=True):
        assert any(isinstance(module, Kept) for module in unet.modules())
    assert list(unet.modules()) == before
    with pytest.raises(KeyError), reuse(unet, guided=True):
        raise KeyError
    assert list(unet.modules()) == before
    assert list(unet.state_dict()) == keys
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in unet.modules())


def test_an_embedding_of_the_text_in_the_time_keeps_both_halves():
    unet = make_unet(LEVELS["second"], addition_embed_type="text", addition_embed_type_num_heads=2)
    wanted = walk(unet, guidance_scale=3.0)
    with reuse(unet, guided=True):
        calls = count_calls({"first": unet.conv_in})
        found = walk(unet, guidance_scale=3.0)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    assert calls["first"] == [6] * 4


def test_a_network_without_context_is_not_touched():
    unet = UNet2DModel(sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16), norm_num_groups=4,
                       down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2)
    with reuse(unet, guided=True):
        assert not any(module._forward_hooks or isinstance(module, Kept) for module in unet.modules())
