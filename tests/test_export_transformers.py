"""`clipkit export format=transformers`: a whole CLIPModel or SiglipModel that is the same function, or a refusal."""

import pytest
import torch
from PIL import Image
from torch.nn.functional import cosine_similarity

from clipkit.config.export import ExportConfig
from clipkit.interop import to_transformers
from clipkit.interop.fixed_pictures import fixed_pictures
from clipkit.interop.self_check import TEXTS
from clipkit.interop.to_transformers import write_transformers
from clipkit.interop.to_transformers_image import clip_vision_config, image_processor_config, siglip_configs
from clipkit.interop.transformers_weights import open_clip_weights, transformers_weights
from clipkit.model.build import build_model
from clipkit.model.folder import load_model
from clipkit.model.image_text import stack_images
from tests.conftest import TINY, command_settings
from tests.test_import import randomise, write_siglip

pytestmark = pytest.mark.usefixtures("tokenizer_is_written_once")

VISION, TEXT = TINY["vision_cfg"], TINY["text_cfg"]
ODD = {"act_kwargs": {"approximate": "tanh"}, "norm_kwargs": {"eps": 1e-3}, "mlp_ratio": 2.3}
KINDS = {  # changes of model_cfg, and what transformers' vision_config has to say
    "gelu, square projections": ({"embed_dim": 32}, {"hidden_act": "gelu", "projection_dim": 32}),
    "CustomTextCLIP with quick_gelu": ({"custom_text": True, "quick_gelu": True}, {"hidden_act": "quick_gelu"}),
    "tanh GELU, other eps and mlp width, fixed positions, patches that leave a rest": (
        {"vision_cfg": {**VISION, **ODD, "pos_embed_type": "sin_cos_2d", "image_size": 40}, "text_cfg": TEXT | ODD},
        {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-3, "intermediate_size": 73, "image_size": 40}),
}


def make_model(model_cfg=None, preprocess_cfg=None):
    torch.manual_seed(0)
    model = build_model(config={**TINY, **(model_cfg or {})}).eval()
    randomise(model.towers)
    if preprocess_cfg:
        model.config["preprocess_cfg"] |= preprocess_cfg
    return model


def settings(*arguments):
    return command_settings("export", ExportConfig, "model=x", "format=transformers", *arguments)


def assert_same_weights(ours, theirs):
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


@pytest.mark.parametrize("kind", KINDS)
def test_a_clip_model_gives_the_features_and_logits_of_the_model(kind, tmp_path):
    from transformers import CLIPModel, CLIPProcessor

    model_cfg, described = KINDS[kind]
    model = make_model(model_cfg)
    facts = write_transformers(model, tmp_path, settings())
    theirs, processor = CLIPModel.from_pretrained(tmp_path).eval(), CLIPProcessor.from_pretrained(tmp_path)
    vision = theirs.config.vision_config.to_dict()
    assert {name: vision[name] for name in described} == described
    texts = ["a red square", "wow, ok!!", "word " * 40]
    tokens = processor(text=texts, padding=True, truncation=True, return_tensors="pt").input_ids
    images = torch.randn(3, 3, model.image_size, model.image_size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        given, ours = theirs(pixel_values=images, input_ids=tokens), model(images, model.tokenize(texts))
    torch.testing.assert_close(given.image_embeds, ours.image_features, atol=1e-5, rtol=0)
    torch.testing.assert_close(given.text_embeds, ours.text_features, atol=1e-5, rtol=0)
    wanted = ours.logit_scale * ours.image_features @ ours.text_features.T
    torch.testing.assert_close(given.logits_per_image, wanted, atol=1e-5 * ours.logit_scale.item(), rtol=0)
    found = facts["greatest_differences"]
    assert found["image_embeds"] <= 1e-5 and found["text_projection"] <= 1e-5 and found["hidden_states"] <= 1e-5
    again = load_model(tmp_path)
    assert_same_weights(again.towers.state_dict(), {name.removeprefix("text."): tensor
                                                    for name, tensor in model.towers.state_dict().items()})
    with torch.no_grad():
        torch.testing.assert_close(again.encode_image(images), ours.image_features, atol=1e-6, rtol=0)


@pytest.mark.parametrize("mode", ["squash", "shortest"])
def test_a_siglip_goes_out_and_comes_back(mode, tmp_path, small_siglip_trunk):
    from transformers import AutoImageProcessor, AutoTokenizer, SiglipModel

    write_siglip(tmp_path / "theirs")
    model = load_model(tmp_path / "theirs")
    model.config["preprocess_cfg"]["resize_mode"] = mode
    (tmp_path / "out").mkdir()
    facts = write_transformers(model, tmp_path / "out", settings())
    assert facts["model_class"] == "SiglipModel" and "pad_token_id" not in facts
    theirs, before = (SiglipModel.from_pretrained(tmp_path / name).eval() for name in ("out", "theirs"))
    assert_same_weights(theirs.state_dict(), before.state_dict())
    assert any("cannot crop" in note for note in facts["notes"]) == (mode == "shortest")
    tokenizer, processor = (kind.from_pretrained(tmp_path / "out") for kind in (AutoTokenizer, AutoImageProcessor))
    picture, level = fixed_pictures()[1], 1 / 255 / model.std.min().item()
    pixels = processor(picture, return_tensors="pt").pixel_values  # (1, 3, 32, 32)
    torch.testing.assert_close(pixels[0], model.preprocess(picture), atol=2.01 * level, rtol=0)
    texts = tokenizer(["a red square"], padding="max_length", return_tensors="pt")  # no attention mask beside the ids
    with torch.no_grad():
        given, wanted = theirs(pixel_values=pixels, **texts), model(pixels, model.tokenize(["a red square"]))
    torch.testing.assert_close(given.text_embeds, wanted.text_features, atol=1e-5, rtol=0)
    torch.testing.assert_close(given.image_embeds, wanted.image_features, atol=1e-5, rtol=0)
    assert load_model(tmp_path / "out").config["preprocess_cfg"]["resize_mode"] == mode


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_the_two_directions_of_the_names_are_inverse(kind, tmp_path, small_siglip_trunk):
    if kind == "siglip":
        write_siglip(tmp_path)
    model = load_model(tmp_path) if kind == "siglip" else make_model()
    weights = model.towers.state_dict()
    assert_same_weights(open_clip_weights(transformers_weights(weights, kind), kind), weights)


@pytest.mark.parametrize("preprocess_cfg", [
    {"resize_mode": "squash", "interpolation": "bilinear"}, {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]},
    {"interpolation": "random"}])
def test_pictures_are_prepared_as_the_model_does(preprocess_cfg, tmp_path):
    from transformers import AutoImageProcessor, CLIPImageProcessor

    model = make_model(preprocess_cfg=preprocess_cfg)
    CLIPImageProcessor(**image_processor_config(model.config["preprocess_cfg"])).save_pretrained(tmp_path)
    processor = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")  # Pillow, as the model: the same bytes
    for picture in (*fixed_pictures(), Image.radial_gradient("L").resize((90, 60)).convert("RGB")):
        pixels = processor(picture, return_tensors="pt").pixel_values[0]
        torch.testing.assert_close(pixels, model.preprocess(picture), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("changes", "message"), [
    ({"vision_cfg": {"timm_model_name": "resnet10t"}}, "vision_cfg.timm_model_name is 'resnet10t'"),
    ({"vision_cfg": {"layers": [3, 4, 6, 3]}}, r"vision_cfg.layers is \[3, 4, 6, 3\] \(a ResNet\)"),
    *[({"vision_cfg": {field: value}}, f"vision_cfg.{field} is {value!r}") for field, value in {
        "ls_init_value": 1e-5, "block_type": "custom", "qk_norm": True, "scaled_cosine_attn": True, "scale_heads": True,
        "scale_attn_inner": True, "scale_attn": True, "scale_fc": True, "attentional_pool": True, "no_ln_pre": True,
        "pool_type": "avg", "output_tokens": True}.items()],
    ({"vision_cfg": {"norm_kwargs": {"bias": False}}}, "vision_cfg.norm_kwargs has bias"),
])
def test_an_image_tower_without_counterpart_is_refused_by_its_field(changes, message):
    model_cfg = {**TINY, "vision_cfg": {**VISION, **changes["vision_cfg"]}}
    with pytest.raises(ValueError, match=f"{message}.*use format=onnx or format=open_clip") as caught:
        clip_vision_config(make_model().towers, model_cfg)
    assert "\n" not in str(caught.value)


def test_sizes_and_biases_without_counterpart_are_refused():
    with pytest.raises(ValueError, match=r"image_size is \(32, 48\), and transformers' CLIP has square ones"):
        write_transformers(make_model({"vision_cfg": {**VISION, "image_size": [32, 48]}}, {"size": 32}), None, settings())
    with pytest.raises(ValueError, match=r"init_logit_bias is set .*CLIPModel has no logit_bias: use format=onnx"):
        write_transformers(make_model({"init_logit_bias": -10}), None, settings())


@pytest.mark.parametrize(("field", "value"), [("resize_mode", "longest"), ("mode", "L")])
def test_preprocessing_without_counterpart_is_refused_by_its_field(field, value):
    with pytest.raises(ValueError, match=f"preprocess_cfg.{field} is '{value}'.*format=onnx"):
        image_processor_config(make_model().config["preprocess_cfg"] | {field: value})


@pytest.mark.parametrize(("part", "field", "value"), [
    ("vision_cfg", "timm_proj", "linear"), ("vision_cfg", "timm_pool", "avg"), ("text_cfg", "no_causal_mask", False),
    ("text_cfg", "pool_type", "argmax"), ("text_cfg", "proj_bias", False), ("text_cfg", "hf_tokenizer_name", None),
    ("text_cfg", "hf_model_name", "roberta-base"), ("text_cfg", "kind", "cbow")])
def test_a_siglip_without_counterpart_is_refused_by_its_field(part, field, value, tmp_path, small_siglip_trunk):
    write_siglip(tmp_path)
    model = load_model(tmp_path)
    model.config["model_cfg"][part][field] = value
    with pytest.raises(ValueError, match=f"{part}.{field} is {value!r}.*use format=onnx or format=open_clip"):
        siglip_configs(model.towers, model.config["model_cfg"])


def test_a_siglip_without_bias_or_with_quick_gelu_is_refused(tmp_path, small_siglip_trunk):
    from open_clip.transformer import QuickGELU

    write_siglip(tmp_path)
    model = load_model(tmp_path)
    model.towers.text.transformer.resblocks[0].mlp.gelu = QuickGELU()
    with pytest.raises(ValueError, match="quick_gelu is true beside a SigLIP tower"):
        siglip_configs(model.towers, model.config["model_cfg"])
    model.towers.logit_bias = None
    with pytest.raises(ValueError, match="init_logit_bias is None, and SiglipModel needs a logit_bias"):
        siglip_configs(model.towers, model.config["model_cfg"])


def test_a_tensor_without_a_place_is_refused_by_its_name():
    with pytest.raises(ValueError, match=r"the model holds visual.ls.gamma \(3,\), which has no place in a transformers clip"):
        transformers_weights({"visual.ls.gamma": torch.ones(3)}, "clip")


def untransposed(weights, model_type):
    """Loads in silence: the projection is square."""
    mapped = transformers_weights(weights, model_type)
    return mapped | {"visual_projection.weight": mapped["visual_projection.weight"].T}


def other_activation(towers, model_cfg):
    return clip_vision_config(towers, model_cfg) | {"hidden_act": "quick_gelu"}


def other_mean(preprocess_cfg):
    return image_processor_config(preprocess_cfg) | {"image_mean": [0.4, 0.4, 0.4]}


@pytest.mark.parametrize(("name", "wrong", "where"), [("transformers_weights", untransposed, "image_embeds"),
                                                      ("clip_vision_config", other_activation, "image_embeds"),
                                                      ("image_processor_config", other_mean, "pixel_values")])
def test_another_function_is_found_where_it_first_shows(name, wrong, where, tmp_path, monkeypatch):
    monkeypatch.setattr(to_transformers, name, wrong)
    monkeypatch.setattr(to_transformers, "write_clip_tokenizer", lambda *_, **__: None)  # as it takes a while
    monkeypatch.setattr(to_transformers, "check_token_ids", lambda _, model: model.tokenize(TEXTS))
    with pytest.raises(ValueError, match=f"nothing was written: the export first differs from the model in {where}"):
        write_transformers(make_model({"embed_dim": 32}), tmp_path, settings())


def perturb_vectors(model):
    """Norms and biases leave 1 and 0, where a wrong mapping would not show; matrices of large towers stay in proportion."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ViT-B-32-quickgelu", "ViT-L-14", "ViT-H-14"])
def test_towers_of_open_clips_own_shapes_agree(name, tmp_path):
    """In fp32 to 1e-5; in bf16 the features keep their direction."""
    import open_clip
    from transformers import CLIPModel

    model_cfg = open_clip.get_model_config(name)
    for part in ("vision_cfg", "text_cfg"):
        model_cfg[part]["layers"] = 2
    torch.manual_seed(0)
    model = build_model(config=model_cfg).eval()
    perturb_vectors(model.towers)
    facts = write_transformers(model, tmp_path, settings())  # compares and raises
    assert max(facts["greatest_differences"][place] for place in ("hidden_states", "image_embeds", "text_embeds")) <= 1e-5
    theirs = CLIPModel.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    images, tokens = stack_images(model, fixed_pictures()), model.tokenize(["a red square", "a photo of two cats"])
    with torch.no_grad():
        given, ours = theirs(pixel_values=images.bfloat16(), input_ids=tokens), model(images, tokens)
    assert cosine_similarity(given.image_embeds.float(), ours.image_features).min() >= 0.9999
    assert cosine_similarity(given.text_embeds.float(), ours.text_features).min() >= 0.9999
