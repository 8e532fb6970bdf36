"""The model against open_clip: towers, folder, locks, the bag of words."""

import hashlib
import json

import pytest
import torch
from PIL import Image

from clipkit.model.build import build_model, lock_towers, make_towers
from clipkit.model.cbow import CBOWTextTower
from clipkit.model.folder import load_model, save_model_folder
from clipkit.model.image_text import has_batch_statistics, parameter_counts
from tests.conftest import TINY

TINY_TEXT = TINY["text_cfg"]
CONFIGS = {
    "vit": TINY,
    "resnet": {"embed_dim": 16, "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 16},
               "text_cfg": TINY_TEXT},
    "timm": {"embed_dim": 16, "vision_cfg": {"image_size": 32, "timm_model_name": "test_resnet", "timm_pool": "avg",
                                             "timm_proj": "linear"}, "text_cfg": TINY_TEXT},
    "siglip": {"embed_dim": 16, "custom_text": True, "vision_cfg": TINY["vision_cfg"], "text_cfg": TINY_TEXT},
}


def pictures(count: int, size: int = 32) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_model_folder_gives_the_same_features_in_open_clip(kind, tmp_path):
    import open_clip

    torch.manual_seed(0)
    model = build_model(config=CONFIGS[kind], loss="siglip" if kind == "siglip" else "clip").eval()
    save_model_folder(model, tmp_path)
    theirs, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tmp_path}")
    theirs.eval()
    tokenizer = open_clip.get_tokenizer(f"local-dir:{tmp_path}")
    ours = load_model(tmp_path)
    texts = ["a red square", "two cats & a dog, on a mat in the rain with more words than fit"]
    picture = Image.fromarray(pictures(1, 50)[0].permute(1, 2, 0).numpy())
    assert torch.equal(preprocess(picture), ours.preprocess(picture))
    assert torch.equal(tokenizer(texts), ours.tokenize(texts).long())
    with torch.no_grad():
        images = ours.preprocess(picture)[None]
        assert torch.allclose(theirs.encode_image(images, normalize=True), ours.encode_image(images), atol=1e-6)
        assert torch.allclose(theirs.encode_text(tokenizer(texts), normalize=True),
                              ours.encode_text(ours.tokenize(texts)), atol=1e-6)
    assert ours.source_sha256 is not None and len(ours.source_sha256) == 64


def test_bytes_and_preprocessed_floats_give_the_same_features(tiny_model):
    images = pictures(3)  # of the model's own size, so that preprocessing only normalises
    floats = torch.stack([tiny_model.preprocess(Image.fromarray(image.permute(1, 2, 0).numpy())) for image in images])
    assert torch.equal(tiny_model.encode_image(images), tiny_model.encode_image(floats))


def test_forward_gives_unit_features_and_the_multiplier(tiny_model):
    features = tiny_model(pictures(4), tiny_model.tokenize(["a", "b", "c", "d"]))
    assert features.image_features.shape == features.text_features.shape == (4, 16)
    assert torch.allclose(features.text_features.norm(dim=-1), torch.ones(4))
    assert features.logit_scale.item() == pytest.approx(1 / 0.07, rel=1e-6)
    assert features.logit_bias is None


def test_the_temperature_is_held_at_100(tiny_model):
    tiny_model.towers.logit_scale.data.fill_(9.0)
    tiny_model.clamp_logit_scale()
    assert tiny_model.towers.logit_scale.exp().item() == pytest.approx(100, rel=1e-4)
    tiny_model.towers.logit_scale.data.fill_(-1.0)
    tiny_model.clamp_logit_scale()
    assert tiny_model.towers.logit_scale.item() == 0


def test_siglip_starts_with_its_own_temperature_and_bias():
    model = build_model(config=TINY, loss="siglip")
    assert model.towers.logit_scale.exp().item() == pytest.approx(10, rel=1e-5)
    assert model.towers.logit_bias.item() == -10


def test_a_bag_of_words_is_the_mean_of_its_tokens():
    tower = CBOWTextTower(vocab_size=20, width=8, embed_dim=4, context_length=6)
    tokens = torch.tensor([[18, 3, 5, 19, 0, 0], [18, 0, 19, 0, 0, 0]])  # id 0 is a word too, before the end of text
    for row, length in zip(tokens, (4, 3), strict=True):
        mean = tower.token_embedding(row[:length]).mean(0)
        wanted = tower.text_projection(mean + tower.mlp(tower.ln(mean)))
        assert torch.allclose(tower(row[None])[0], wanted, atol=1e-6)


def test_a_bag_of_words_survives_the_model_folder(tmp_path):
    config = {**TINY, "text_cfg": {"kind": "cbow", "context_length": 16, "vocab_size": 49408, "width": 24}}
    model = build_model(config=config).eval()
    save_model_folder(model, tmp_path)
    tokens = model.tokenize(["a red square"])
    assert torch.equal(load_model(tmp_path).encode_text(tokens), model.encode_text(tokens))
    assert json.loads((tmp_path / "open_clip_config.json").read_text())["model_cfg"]["text_cfg"]["kind"] == "cbow"


def learning(module: torch.nn.Module) -> set[str]:
    return {name for name, parameter in module.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("unlocked", [0, 1])
def test_a_locked_timm_tower_computes_what_it_did_before(unlocked, tmp_path):
    """EfficientNet's norms have an activation within them."""
    torch.manual_seed(0)
    vision = {"timm_model_name": "tf_efficientnet_lite0", "timm_pool": "avg", "timm_proj": "linear", "image_size": 32}
    model, images = build_model(config={**TINY, "vision_cfg": vision}).eval(), torch.randn(2, 3, 32, 32)
    before = model.encode_image(images)
    lock_towers(model, image=True, unlocked_image_groups=unlocked)
    torch.testing.assert_close(model.encode_image(images), before, rtol=0, atol=1e-6)
    in_training = model.train().encode_image(images)
    assert torch.allclose(in_training, before, atol=1e-6) == (unlocked == 0)  # only unlocked norms look at the batch
    save_model_folder(model.eval(), tmp_path)
    torch.testing.assert_close(load_model(tmp_path).encode_image(images), model.encode_image(images), rtol=0, atol=1e-6)


def test_locked_towers_learn_nothing_but_their_last_groups():
    model = build_model(config=CONFIGS["timm"])
    assert has_batch_statistics(model)
    lock_towers(model, image=True)
    assert learning(model.towers.visual) == {"head.proj.weight"} and not has_batch_statistics(model)
    partly = build_model(config=CONFIGS["timm"])
    lock_towers(partly, image=True, unlocked_image_groups=2)
    assert learning(model.towers.visual) < learning(partly.towers.visual) < learning(build_model(
        config=CONFIGS["timm"]).towers.visual)
    vit = build_model(config=TINY)
    lock_towers(vit, image=True, text=True)
    assert learning(vit.towers) == {"logit_scale"}
    assert parameter_counts(vit)["learning"] == 1
    cbow = build_model(config={**TINY, "text_cfg": {"kind": "cbow", "width": 8, "context_length": 16}})
    lock_towers(cbow, text=True)
    assert not learning(cbow.towers.text)
    with pytest.raises(ValueError, match="locked whole"):
        lock_towers(cbow, text=True, unlocked_text_layers=1)


def test_image_weights_load_by_name_or_by_order(tmp_path):
    from safetensors.torch import save_file

    source = build_model(config=CONFIGS["timm"]).towers.visual.trunk.state_dict()
    by_order = {f"layer{index:03d}": value for index, (name, value) in enumerate(source.items())
                if not name.endswith("num_batches_tracked")}
    for name, weights in {"same.safetensors": source, "order.safetensors": by_order}.items():
        save_file(weights, tmp_path / name)
        torch.manual_seed(1)
        trunk = build_model(config=CONFIGS["timm"], image_weights=str(tmp_path / name)).towers.visual.trunk.state_dict()
        assert all(torch.equal(trunk[key], value) for key, value in source.items())
    save_file({"a": torch.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="do not fit the image tower"):
        build_model(config=CONFIGS["timm"], image_weights=str(tmp_path / "other.safetensors"))


@pytest.mark.parametrize(("options", "message"), [
    ({"name": "ViT-B-33"}, "close: ViT-B-32"),
    ({"name": "ViT-B-32", "pretrained": "nothing"}, "neither a file nor a tag"),
    ({"config": {"embed_dim": 8}}, "has no vision_cfg"),
    ({"config": {**TINY, "vision_cfg": {"widht": 3}}}, "not an open_clip model_cfg"),
    ({"config": {**TINY, "vision_cfg": {"timm_model_name": "resnet10x"}}}, "timm_model_name"),
    ({"config": {**TINY, "text_cfg": {"kind": "lstm"}}}, "choose transformer or cbow"),
    ({"config": TINY, "image_weights": "package:no-such-package"}, "pip install no-such-package"),
    ({"config": TINY, "image_weights": "missing.safetensors"}, "which is no file"),
])
def test_a_wrong_model_is_answered_in_one_line(options, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        build_model(**options)
    assert "\n" not in str(error.value)


def test_loading_what_is_not_there_says_what_to_give(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"open_clip_config\.json"):
        load_model(tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        load_model(tmp_path / "nothing")
    with pytest.raises(ValueError, match="CoCa"):
        make_towers({**TINY, "multimodal_cfg": {}})


def test_trimmed_text_gives_features_and_gradients_of_full_length():
    """The slow way is open_clip's own encode_text over the whole context length."""
    torch.manual_seed(0)
    model = build_model(config=TINY)
    assert model.trims_text
    words = ["red", "square", "and", "two", "blue", "cats", "on", "the", "mat", "in", "rain", "again", "late"]
    tokens = model.tokenize([" ".join(words[:1 + index % 13]) for index in range(70)])
    weights = torch.randn(70, 16)
    gradients = []
    for encode in (model.encode_text, lambda t: torch.nn.functional.normalize(model.towers.encode_text(t), dim=-1)):
        model.zero_grad()
        features = encode(tokens)
        (features * weights).sum().backward()
        gradients.append((features.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}))
    (ours, our_gradients), (full, full_gradients) = gradients
    assert torch.allclose(ours, full, atol=1e-6)
    assert our_gradients.keys() == full_gradients.keys()
    for name, gradient in full_gradients.items():  # sums in another order: 1e-5 of the tensor's norm
        assert (our_gradients[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-9, name


def test_only_causal_towers_that_pool_at_the_end_are_trimmed():
    no_mask = {**TINY, "text_cfg": {**TINY_TEXT, "no_causal_mask": True}}
    assert not build_model(config=no_mask).trims_text
    assert not build_model(config={**TINY, "text_cfg": {**TINY_TEXT, "pool_type": "last"}}).trims_text
    assert not build_model(config=CONFIGS["siglip"]).trims_text  # CustomTextCLIP
    assert not build_model(config={**TINY, "text_cfg": {"kind": "cbow", "width": 8}}).trims_text


def test_a_model_that_learns_on_is_no_longer_what_its_file_holds(tiny_model, tmp_path):
    save_model_folder(tiny_model, tmp_path)
    loaded = load_model(tmp_path)
    assert loaded.source_sha256 == hashlib.sha256((tmp_path / "open_clip_model.safetensors").read_bytes()).hexdigest()
    assert loaded.eval().source_sha256 is not None
    assert loaded.train().source_sha256 is None


def test_texts_that_the_context_cuts_are_counted(tiny_model):
    length = tiny_model.tokenize.context_length
    fitting, cut = " ".join(["cat"] * (length - 2)), " ".join(["cat"] * (length - 1))
    assert tiny_model.tokenize.count_cut(["cat", fitting, cut, cut + " cat"]) == 2
    assert tiny_model.tokenize([fitting])[0].tolist() == tiny_model.tokenize([cut])[0].tolist()
