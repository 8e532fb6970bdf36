"""The exact levers of a training step on ViT-B/32 itself, in fp32: loss and gradients of open_clip's own towers and loss."""

import pytest
import torch

from clipkit.losses import make_loss
from clipkit.model.attention import fuse_attention, unfuse_attention
from clipkit.model.build import build_model
from clipkit.training.gradient_cache import cached_backward

pytestmark = pytest.mark.slow
TEXTS = ["a", "two blue cats on a mat", "a photo of a red square, seen from above in the rain", "late again"]
TOLERANCE = 1e-5  # of a tensor's norm: sums in another order


@pytest.fixture(scope="module")
def case():
    torch.manual_seed(0)
    model = build_model("ViT-B-32").train()
    return model, torch.randn(len(TEXTS), 3, 224, 224), model.tokenize(TEXTS)


@pytest.fixture(scope="module")
def wanted(case):
    """The slow way: no trimming, attention as open_clip calls it, its own loss."""
    from open_clip.loss import ClipLoss

    model, images, tokens = case
    towers = model.towers
    image_features, text_features = towers.encode_image(images, normalize=True), towers.encode_text(tokens, normalize=True)
    value = ClipLoss()(image_features, text_features, towers.logit_scale.exp())
    value.backward()
    return value.item(), take_gradients(model)


def take_gradients(model) -> dict[str, torch.Tensor]:
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad(set_to_none=True)
    return gradients


def assert_equal(found, wanted):
    assert found[0] == pytest.approx(wanted[0], rel=TOLERANCE)
    assert found[1].keys() == wanted[1].keys()
    for name, gradient in wanted[1].items():
        assert (found[1][name] - gradient).norm() <= TOLERANCE * gradient.norm() + 1e-9, name


@pytest.mark.parametrize("block_size", [None, 3])
@pytest.mark.parametrize("fused", [False, True], ids=["open_clip's attention", "fused attention"])
def test_a_step_with_packed_captions_and_tiled_loss(case, wanted, fused, block_size):
    model, images, tokens = case
    if fused:
        fuse_attention(model.towers, causal_text=True)
    value = make_loss("clip", block_size=block_size, bf16=False)(*model(images, tokens))
    value.backward()
    unfuse_attention(model.towers)
    assert_equal((value.item(), take_gradients(model)), wanted)


def test_a_step_in_micro_batches(case, wanted):
    model, images, tokens = case
    _, value = cached_backward(model, images, tokens, loss=make_loss("clip", block_size=None, bf16=False), micro_batch_size=3)
    assert_equal((value.item(), take_gradients(model)), wanted)


def test_a_compiled_step(case, wanted):
    from clipkit.model.image_text import compile_towers

    model, images, tokens = case
    compile_towers(model)
    value = make_loss("clip", block_size=None, bf16=False)(*model(images, tokens))
    value.backward()
    assert_equal((value.item(), take_gradients(model)), wanted)
