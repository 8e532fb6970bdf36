"""A trained model at another image size: open_clip's own resampling, and towers that have nothing to resample."""

import pytest
import torch

from clipkit.model.build import build_model
from clipkit.model.folder import load_model, save_model_folder
from clipkit.model.resolution import at_image_size
from clipkit.training.trained_model import make_model
from tests.conftest import TINY, settings

TIMM = {"timm_model_name": "vit_tiny_patch16_224", "timm_pool": "", "timm_proj": "linear", "image_size": 32}
RN50 = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 8, "patch_size": None}
RESNET = {"timm_model_name": "resnet10t", "timm_pool": "avg", "timm_proj": "linear", "image_size": 32}


def test_the_features_are_those_of_open_clip_at_that_size(tmp_path):
    import open_clip

    torch.manual_seed(0)
    model = build_model(config=TINY).eval()
    save_model_folder(model, tmp_path / "model")
    reference = open_clip.create_model(f"local-dir:{tmp_path}/model", force_image_size=96).eval()
    resized = at_image_size(load_model(tmp_path / "model"), 96).eval()
    images = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        torch.testing.assert_close(resized.encode_image(images), reference.encode_image(images, normalize=True), atol=1e-5,
                                   rtol=0)
        assert not torch.allclose(reference.encode_image(images), torch.zeros(()))
    assert resized.image_size == 96 and resized.config["preprocess_cfg"]["size"] == reference.visual.image_size
    save_model_folder(resized, tmp_path / "resized")
    assert load_model(tmp_path / "resized").image_size == 96


def test_a_timm_vit_is_resampled_as_timm_does_it():
    import timm

    torch.manual_seed(0)
    model = build_model(config={**TINY, "vision_cfg": TIMM}).eval()
    trunk = {name.removeprefix("visual.trunk."): tensor.clone() for name, tensor in model.towers.state_dict().items()
             if name.startswith("visual.trunk.")}
    reference = timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=0, global_pool="token").eval()
    from timm.models.vision_transformer import checkpoint_filter_fn

    reference.load_state_dict(checkpoint_filter_fn(trunk, reference))
    resized = at_image_size(model, 64).eval()
    assert resized.towers.visual.trunk.pos_embed.shape == reference.pos_embed.shape == (1, 17, 192)
    torch.testing.assert_close(resized.towers.visual.trunk.pos_embed, reference.pos_embed, atol=1e-6, rtol=0)
    with torch.no_grad():
        resized.encode_image(torch.randn(1, 3, 64, 64))


def test_an_attention_pool_has_its_grid_interpolated():
    """open_clip itself refuses such a tower at another size."""
    torch.manual_seed(0)
    model = build_model(config={**TINY, "vision_cfg": RN50}).eval()
    before = model.towers.visual.attnpool.positional_embedding.detach().clone()  # (1 + 2 * 2, D)
    after = at_image_size(model, 96).towers.visual.attnpool.positional_embedding  # (1 + 3 * 3, D)
    grid = torch.nn.functional.interpolate(before[1:].T.reshape(1, -1, 2, 2), size=(3, 3), mode="bicubic", antialias=True)
    torch.testing.assert_close(after, torch.cat([before[:1], grid.reshape(-1, 9).T]), atol=1e-6, rtol=0)


def test_fine_tuning_takes_the_start_at_the_size_that_is_asked_for(tmp_path):
    model = build_model(config={**TINY, "vision_cfg": RESNET}).eval()
    save_model_folder(model, tmp_path / "start")
    started = make_model(settings("data.train=x.tar", "name=x", f"model.start={tmp_path}/start", "model.image_size=48"))
    assert started.image_size == 48
    for name, tensor in model.towers.state_dict().items():
        assert torch.equal(started.towers.state_dict()[name], tensor), name


def test_a_size_that_the_tower_does_not_take_is_answered_in_one_line():
    with pytest.raises(ValueError, match=r"model\.image_size is 8, ") as caught:
        at_image_size(build_model(config=TINY), 8)
    assert "\n" not in str(caught.value)
