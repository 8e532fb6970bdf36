"""transformers folders and pretrained tags: the same features as the model they came from, or a refusal in one line."""

import functools
import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.nn.functional import normalize

from clipkit.interop.from_transformers import SIGLIP_TRUNKS, model_cfg_from_transformers, preprocess_cfg_from_transformers
from clipkit.interop.transformers_weights import open_clip_weights
from clipkit.model.build import make_towers
from clipkit.model.folder import load_model, save_model_folder

TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
CLIP_TEXT = {**TOWER, "max_position_embeddings": 16, "eos_token_id": 49407}
CLIP_VISION = {**TOWER, "image_size": 32, "patch_size": 8}
# changes of text_config, of both, and how the weights are saved
CLIP_KINDS = {
    "quick_gelu": ({}, {}, {}),
    "gelu": ({}, {"hidden_act": "gelu"}, {}),
    "gelu_pytorch_tanh, other eps and mlp width": ({}, {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-3,
                                                        "intermediate_size": 72}, {}),
    "legacy end of text": ({"eos_token_id": 2}, {}, {}),
    "end of text below the largest id": ({"vocab_size": 49410}, {}, {}),
    "fp16": ({}, {}, {"dtype": torch.float16}),
    "shards": ({}, {}, {"max_shard_size": "1MB"}),
    "pickle": ({}, {}, {"pickle": True}),
}
TEXTS = ["A red square!", "it's  a_photo of 2 cats, on a café's mat", "naïve 東京 🎉 it'll", "word " * 30, ""]


def randomise(model: torch.nn.Module) -> None:
    """No parameter is left at 0 or 1, where a wrong mapping would not show."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)


@functools.cache
def clip_bpe_files() -> tuple[str, str]:
    """vocab.json and merges.txt as OpenAI's folders have them."""
    from open_clip.tokenizer import SimpleTokenizer

    reference = SimpleTokenizer()
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocab = {names.get(token, token): index for token, index in reference.encoder.items()}
    merges = sorted(reference.bpe_ranks, key=lambda merge: reference.bpe_ranks[merge])
    return json.dumps(vocab), "\n".join(["#version: 0.2", *map(" ".join, merges)]) + "\n"


def write_clip_bpe(folder: Path) -> None:
    for name, text in zip(("vocab.json", "merges.txt"), clip_bpe_files(), strict=True):
        (folder / name).write_text(text, encoding="utf-8")


def write_clip(folder: Path, text: dict, both: dict, saved: dict):
    """A small CLIPModel on disk, and in memory with the weights that the disk has."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    model = CLIPModel(CLIPConfig(text_config={**CLIP_TEXT, **both, **text}, vision_config={**CLIP_VISION, **both},
                                 projection_dim=16)).eval()
    randomise(model)
    if "dtype" in saved:
        model = model.to(saved["dtype"])
    model.save_pretrained(folder, **({"max_shard_size": saved["max_shard_size"]} if "max_shard_size" in saved else {}))
    if "pickle" in saved:
        old = {"text_model.embeddings.position_ids": torch.arange(16)[None]}  # a buffer that transformers saved until 4.30
        torch.save({**model.state_dict(), **old}, folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    write_clip_bpe(folder)
    return model.float()


def vit_test_patch8_siglip_32(num_classes, global_pool, **_):
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, mlp_ratio=2, class_token=False,
                             num_classes=num_classes, global_pool=global_pool)


def write_siglip(folder: Path, image_size: int = 32, act: str = "gelu_pytorch_tanh"):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, SiglipConfig, SiglipImageProcessor, SiglipModel

    tower = {**TOWER, "hidden_act": act}
    model = SiglipModel(SiglipConfig(text_config={**tower, "vocab_size": 12, "max_position_embeddings": 8},
                                     vision_config={**tower, "image_size": image_size, "patch_size": 8})).eval()
    randomise(model)
    model.save_pretrained(folder)
    SiglipImageProcessor(size={"height": image_size, "width": image_size}).save_pretrained(folder)
    words = ["<unk>", "</s>", "a", "red", "blue", "square", "s", "photo", "of", "A", "Red"]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>", pad_token="</s>",
                            model_max_length=8).save_pretrained(folder)
    return model


def assert_same_features(ours, theirs, texts, image_size=32):
    """Features and probabilities, within fp32 rounding over two layers."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(3, 3, image_size, image_size, generator=generator)
    tokens = ours.tokenize(texts)
    with torch.no_grad():
        wanted = theirs(pixel_values=images, input_ids=tokens.long())
        features = ours(images, tokens)
    torch.testing.assert_close(features.image_features, normalize(wanted.image_embeds, dim=-1), atol=1e-5, rtol=0)
    torch.testing.assert_close(features.text_features, normalize(wanted.text_embeds, dim=-1), atol=1e-5, rtol=0)
    logits = features.logit_scale * features.image_features @ features.text_features.T
    if features.logit_bias is not None:
        logits = logits + features.logit_bias
    turn = torch.softmax if features.logit_bias is None else lambda logits, dim: torch.sigmoid(logits)
    torch.testing.assert_close(turn(logits, dim=-1), turn(wanted.logits_per_image, dim=-1), atol=1e-5, rtol=0)
    assert features.text_features.std(dim=0).max() > 0.05 and features.image_features.std(dim=0).max() > 0.05


@pytest.mark.parametrize("kind", CLIP_KINDS)
def test_a_transformers_clip_gives_the_same_features(kind, tmp_path):
    text, both, saved = CLIP_KINDS[kind]
    theirs = write_clip(tmp_path, text, both, saved)
    ours = load_model(tmp_path)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (kind == "shards")
    assert (tmp_path / "model.safetensors").exists() == (kind not in ("shards", "pickle"))
    assert ours.config["model_cfg"]["quick_gelu"] == ("hidden_act" not in both)
    assert ours.trims_text == (kind != "end of text below the largest id")
    assert ours.source_sha256 is not None and not ours.training
    assert all(tensor.dtype == torch.float32 for tensor in ours.towers.state_dict().values())
    assert_same_features(ours, theirs, TEXTS)


def test_an_imported_clip_is_a_model_folder_that_open_clip_reads(tmp_path):
    import open_clip

    write_clip(tmp_path / "theirs", *CLIP_KINDS["gelu_pytorch_tanh, other eps and mlp width"])
    ours = load_model(tmp_path / "theirs")
    save_model_folder(ours, tmp_path / "model")
    again = load_model(tmp_path / "model")
    other, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'model'}")
    tokens = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'model'}")(TEXTS)
    picture = Image.radial_gradient("L").resize((70, 50)).convert("RGB")
    assert again.config == ours.config
    assert torch.equal(preprocess(picture), ours.preprocess(picture)) and torch.equal(tokens, ours.tokenize(TEXTS).long())
    with torch.no_grad():
        images = preprocess(picture)[None]
        for image_features in (again.encode_image(images), other.eval().encode_image(images, normalize=True)):
            torch.testing.assert_close(image_features, ours.encode_image(images), atol=1e-6, rtol=0)
        for text_features in (again.encode_text(tokens), other.encode_text(tokens, normalize=True)):
            torch.testing.assert_close(text_features, ours.encode_text(tokens), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("image_size", "act"), [(32, "gelu_pytorch_tanh"), (48, "gelu")])
def test_a_transformers_siglip_gives_the_same_features(image_size, act, tmp_path, small_siglip_trunk):
    """48 pixels: timm has the small tower only at 32."""
    theirs = write_siglip(tmp_path / "theirs", image_size, act)
    ours = load_model(tmp_path / "theirs")
    texts = ["a red square", "A photo of a BLUE square!", "a_photo"]
    assert not ours.trims_text  # it pools at the last place, which is padding
    assert ours.tokenize(texts).tolist() == [[2, 3, 5, 1, 1, 1, 1, 1], [2, 7, 8, 2, 4, 5, 1, 1], [2, 7, 1, 1, 1, 1, 1, 1]]
    assert_same_features(ours, theirs, texts, image_size)
    save_model_folder(ours, tmp_path / "model")
    again = load_model(tmp_path / "model")
    assert torch.equal(again.tokenize(texts), ours.tokenize(texts))
    assert_same_features(again, theirs, texts, image_size)


def test_transformers_defaults_are_open_clips_own_architectures():
    import open_clip
    from open_clip.model import CLIPTextCfg, CLIPVisionCfg

    for model_type, name in (("clip", "ViT-B-32-quickgelu"), ("siglip", "ViT-B-16-SigLIP")):
        cfg, wanted = model_cfg_from_transformers({"model_type": model_type}), open_clip.get_model_config(name)
        if model_type == "siglip":  # open_clip's names stand for exact GELU where the original has tanh's approximation
            assert cfg["vision_cfg"].pop("act_kwargs") == cfg["text_cfg"].pop("act_kwargs") == {"approximate": "tanh"}
            assert cfg["text_cfg"].pop("hf_tokenizer_name") and wanted["text_cfg"].pop("hf_tokenizer_name")
        assert CLIPVisionCfg(**cfg.pop("vision_cfg")) == CLIPVisionCfg(**wanted.pop("vision_cfg"))
        assert CLIPTextCfg(**cfg.pop("text_cfg")) == CLIPTextCfg(**wanted.pop("text_cfg"))
        assert cfg == wanted


@pytest.mark.parametrize("shape", SIGLIP_TRUNKS)
def test_every_siglip_tower_has_timms_tensors(shape):
    from transformers import SiglipConfig, SiglipModel

    width, layers, heads, mlp_width, patch_size = shape
    vision = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads, "intermediate_size": mlp_width,
              "patch_size": patch_size, "image_size": SIGLIP_TRUNKS[shape][1][-1]}
    config = SiglipConfig(vision_config=vision, text_config={**TOWER, "vocab_size": 12, "projection_size": width})
    with torch.device("meta"):
        theirs = open_clip_weights(SiglipModel(config).state_dict(), "siglip")
        ours = make_towers(model_cfg_from_transformers(config.to_dict())).state_dict()
    assert {name: tensor.shape for name, tensor in ours.items()} == {name: tensor.shape for name, tensor in theirs.items()}


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_pictures_are_prepared_as_transformers_does(kind, tmp_path, small_siglip_trunk):
    from transformers import AutoImageProcessor

    if kind == "clip":
        write_clip(tmp_path, {}, {}, {})
    else:
        write_siglip(tmp_path)
    ours = load_model(tmp_path)
    gradient = Image.radial_gradient("L")
    picture = Image.merge("RGB", (gradient, gradient.transpose(Image.Transpose.ROTATE_90), Image.linear_gradient("L")))
    picture = picture.resize((96, 64))  # 48 x 32, of which 16 columns go: an odd rest is cut one pixel apart
    level = 1 / 255 / ours.std.min().item()
    # Pillow both: the same bytes. torchvision's tensor kernel rounds weights and bytes otherwise: two levels of 255.
    for backend, levels in (("pil", 0.01), ("torchvision", 2.01)):
        theirs = AutoImageProcessor.from_pretrained(tmp_path, backend=backend)(picture, return_tensors="pt").pixel_values[0]
        torch.testing.assert_close(ours.preprocess(picture), theirs, atol=levels * level, rtol=0)


def test_the_one_processor_file_of_transformers_5_is_read(tmp_path):
    write_clip(tmp_path, {}, {}, {})
    wanted = load_model(tmp_path).config
    (tmp_path / "processor_config.json").write_text(
        json.dumps({"image_processor": json.loads((tmp_path / "preprocessor_config.json").read_text())}))
    (tmp_path / "preprocessor_config.json").unlink()
    assert load_model(tmp_path).config == wanted


def test_the_old_config_dict_stands_in_the_place_of_the_part():
    config = {"model_type": "clip", "text_config": {"hidden_size": 64}, "text_config_dict": {"num_hidden_layers": 3}}
    text_cfg = model_cfg_from_transformers(config)["text_cfg"]
    assert (text_cfg["width"], text_cfg["layers"]) == (512, 3)  # as transformers' own CLIPConfig reads it


def test_image_processors_of_all_ages_are_read():
    old = preprocess_cfg_from_transformers({"size": 224, "crop_size": 224, "resample": 3}, "clip", 224)
    assert (old["resize_mode"], old["interpolation"], old["size"]) == ("shortest", "bicubic", 224)
    squash = preprocess_cfg_from_transformers({"size": {"height": 256, "width": 256}, "resample": 2}, "siglip", 256)
    assert (squash["resize_mode"], squash["interpolation"], squash["mean"]) == ("squash", "bilinear", [0.5, 0.5, 0.5])
