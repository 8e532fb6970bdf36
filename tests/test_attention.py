"""Fused attention, packed captions and short-cut last blocks against open_clip's own towers, and the way back."""

import copy

import pytest
import torch

from clipkit.model.attention import ClassTokenBlock, FusedSelfAttention, fuse_attention, unfuse_attention
from clipkit.model.build import build_model
from clipkit.model.packed_text import can_pack, encode_packed
from clipkit.model.trim import encode_in_groups
from tests.conftest import TINY


def features_and_gradients(model, images, tokens):
    model.zero_grad()
    image_features, text_features = model.towers.encode_image(images), model.towers.encode_text(tokens)
    (image_features.sin().sum() + text_features.sin().sum()).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return [image_features.detach(), text_features.detach()], gradients


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "no mask"])
def test_fused_attention_gives_features_and_gradients_of_open_clip_in_float64(causal):
    torch.manual_seed(0)
    config = {**TINY, "text_cfg": {**TINY["text_cfg"], "no_causal_mask": not causal}}
    model = build_model(config=config).double()
    fused = copy.deepcopy(model)
    assert fuse_attention(fused.towers, causal_text=fused.trims_text) == 2
    assert fused.trims_text == causal
    assert list(fused.state_dict()) == list(model.state_dict())
    images = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    tokens = model.tokenize(["a", "red square", "two blue cats on a mat"])
    wanted, wanted_gradients = features_and_gradients(model, images, tokens)
    found, gradients = features_and_gradients(fused, images, tokens)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    assert gradients.keys() == wanted_gradients.keys()
    for name, gradient in wanted_gradients.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-9, atol=1e-12, msg=name)


def test_fused_attention_is_undone_to_the_bit(tiny_model):
    tokens = tiny_model.tokenize(["two blue cats"])
    before = tiny_model.encode_text(tokens)
    fuse_attention(tiny_model.towers, causal_text=True)
    assert any(isinstance(module, FusedSelfAttention) for module in tiny_model.modules())
    unfuse_attention(tiny_model.towers)
    assert not any(isinstance(module, FusedSelfAttention) for module in tiny_model.modules())
    assert torch.equal(tiny_model.encode_text(tokens), before)


def test_blocks_of_other_kinds_stay_as_they_are():
    """A timm tower has attention of its own; open_clip's block with extra norms is another class."""
    vision = {"timm_model_name": "vit_tiny_patch16_224", "image_size": 32, "timm_pool": "token", "timm_proj": "linear"}
    model = build_model(config={**TINY, "vision_cfg": vision, "text_cfg": {**TINY["text_cfg"], "qk_norm": True}})
    assert fuse_attention(model.towers, causal_text=True) == 0
    assert not can_pack(model.towers)


TEXTS = ["a", "red square", "two blue cats on a mat", "", "rain again", "two", "a much longer caption that is cut at the end"]


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("options", [{}, {"ls_init_value": 0.1}, {"proj_type": "linear", "proj_bias": True},
                                     {"proj_type": "none"}],
                         ids=["plain", "layer scale", "linear projection", "no projection"])
def test_packed_captions_give_features_and_gradients_of_open_clip_in_float64(options, layers):
    torch.manual_seed(0)
    width = TINY["embed_dim"] if options.get("proj_type") == "none" else 32
    model = build_model(config={**TINY, "text_cfg": {**TINY["text_cfg"], "layers": layers, "width": width, **options}}).double()
    tokens = model.tokenize(TEXTS)
    assert model.trims_text and can_pack(model.towers)
    results = []
    for encode in (model.towers.encode_text, lambda tokens: encode_packed(model.towers, tokens)):
        model.zero_grad()
        features = encode(tokens)
        features.sin().sum().backward()
        results.append((features.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}))
    (wanted, wanted_gradients), (found, gradients) = results
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
    assert gradients.keys() == wanted_gradients.keys()
    for name, gradient in wanted_gradients.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-9, atol=1e-12, msg=name)


def test_a_text_tower_with_activation_checkpointing_is_not_packed(tiny_model):
    tiny_model.towers.set_grad_checkpointing(True)
    assert not can_pack(tiny_model.towers)


@pytest.mark.parametrize(("rows", "length_step"), [(1, 1), (3, 4), (4, 8), (100, 1)])
def test_groups_of_any_size_give_the_features_of_full_length(tiny_model, rows, length_step):
    tokens = tiny_model.tokenize(TEXTS)
    found = encode_in_groups(tiny_model.towers, tokens, rows=rows, length_step=length_step)
    torch.testing.assert_close(found, tiny_model.towers.encode_text(tokens), rtol=1e-5, atol=1e-6)  # fp32


@pytest.mark.parametrize(("vision", "shortened"), [({}, True), ({"ls_init_value": 0.1, "patch_dropout": 0.5}, True),
                                                   ({"final_ln_after_pool": True}, True), ({"pool_type": "avg"}, False),
                                                   ({"attentional_pool": True}, False), ({"output_tokens": True}, False)])
def test_the_last_image_block_computes_what_is_pooled(vision, shortened):
    torch.manual_seed(0)
    model = build_model(config={**TINY, "vision_cfg": {**TINY["vision_cfg"], "layers": 2, **vision}}).double()
    fused, images = copy.deepcopy(model), torch.randn(3, 3, 32, 32, dtype=torch.float64)
    fuse_attention(fused.towers, causal_text=True)
    assert any(isinstance(module, ClassTokenBlock) for module in fused.modules()) == shortened
    gradients = []
    for towers in (model.towers, fused.towers):
        torch.manual_seed(1)  # the same patches are left out
        features = towers.encode_image(images)
        features = features[0] if isinstance(features, tuple) else features
        features.sin().sum().backward()
        gradients.append((features, {n: p.grad for n, p in towers.named_parameters() if p.grad is not None}))
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-9, atol=1e-12)
    unfuse_attention(fused.towers)
    assert not any(isinstance(module, ClassTokenBlock) for module in fused.modules())
