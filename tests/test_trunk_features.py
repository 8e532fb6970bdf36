"""Features before the projection, against towers taken apart by hand."""

import copy

import pytest
import torch
from torch import nn

from clipkit.evaluation.encode import evaluation_mode
from clipkit.model.build import build_model
from tests.conftest import TINY

TIMM = {"image_size": 32, "timm_model_name": "test_resnet", "timm_pool": "avg"}
TOWERS = {
    "vit": TINY["vision_cfg"],
    "vit with average pooling": {**TINY["vision_cfg"], "pool_type": "avg", "final_ln_after_pool": True},
    "timm, linear": {**TIMM, "timm_proj": "linear"},
    "timm, mlp": {**TIMM, "timm_proj": "mlp"},
    "timm, its own classifier": {**TIMM, "timm_proj": ""},
}


def model_with(vision_cfg):
    torch.manual_seed(0)
    return build_model(config={**TINY, "vision_cfg": vision_cfg}).eval()


def without_projection(model):
    """A copy of the model whose tower ends before its projection."""
    model = copy.deepcopy(model)
    visual = model.towers.visual
    if hasattr(visual, "proj"):
        visual.proj = None
    elif len(visual.head):
        visual.head = nn.Identity()
    else:
        visual.trunk.reset_classifier(0)
    return model


@pytest.mark.parametrize("tower", TOWERS)
def test_one_forward_gives_both_features(tower) -> None:
    model = model_with(TOWERS[tower])
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with evaluation_mode(model):
        features, trunk = model.encode_image_with_trunk(images)
        assert model.has_trunk_features
        assert torch.equal(features, model.encode_image(images))
        floats = (images.float().div(255) - model.mean) / model.std  # (3, 3, 32, 32)
        assert torch.equal(trunk, without_projection(model).towers.encode_image(floats))
        assert torch.equal(features, model.encode_image(images))  # nothing of it stays in the model


@pytest.mark.parametrize("vision_cfg", [
    {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 16}, {**TIMM, "timm_proj": "none"}])
def test_a_tower_without_a_projection_of_its_own_is_refused(vision_cfg) -> None:
    model = model_with(vision_cfg)
    assert not model.has_trunk_features
    with pytest.raises(ValueError, match=r"the image tower \((ModifiedResNet|TimmModel)\) has no separate projection"):
        model.encode_image_with_trunk(torch.zeros(1, 3, 32, 32))
