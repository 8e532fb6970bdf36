"""`clipkit export format=open_clip`: any source becomes a model folder that open_clip itself loads."""

import json

import pytest
import torch

from clipkit.commands.export import export
from clipkit.interop.fixed_pictures import fixed_pictures
from clipkit.interop.self_check import TEXTS
from clipkit.model.folder import load_model, save_model_folder
from clipkit.model.image_text import stack_images
from tests.test_export import make_model, settings
from tests.test_import import write_clip, write_siglip


def test_a_transformers_clip_becomes_a_model_folder(tmp_path):
    import open_clip

    theirs = write_clip(tmp_path / "clip", {}, {}, {})
    export(settings(f"model={tmp_path / 'clip'}", "format=open_clip", f"out={tmp_path / 'model'}"))
    assert {path.name for path in (tmp_path / "model").iterdir()} == {
        "open_clip_config.json", "open_clip_model.safetensors", "README.md", "clipkit_export.json"}
    other, _, _ = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'model'}")
    tokens = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'model'}")(list(TEXTS))
    with torch.no_grad():
        images = stack_images(load_model(tmp_path / "clip"), fixed_pictures())
        wanted = theirs(pixel_values=images, input_ids=tokens)
        torch.testing.assert_close(other.encode_text(tokens, normalize=True), wanted.text_embeds, atol=1e-5, rtol=0)
        torch.testing.assert_close(other.eval().encode_image(images, normalize=True), wanted.image_embeds, atol=1e-5, rtol=0)
    record = json.loads((tmp_path / "model" / "clipkit_export.json").read_text())
    assert max(record["greatest_differences"].values()) <= 1e-5 and record["source"]["model"] == "clip"


def test_clip_to_transformers_text_and_back_keeps_every_bit(tmp_path):
    """The weights of the text tower, there and back through the two mappings."""
    from clipkit.interop.to_transformers_text import text_weights
    from clipkit.interop.transformers_weights import open_clip_weights, transformers_weights

    weights = text_weights(make_model({"custom_text": True}).towers)
    again = open_clip_weights(transformers_weights(weights, "clip"), "clip")
    assert again.keys() == weights.keys() and all(torch.equal(again[name], tensor) for name, tensor in weights.items())


def test_an_activation_that_open_clip_does_not_read_is_told(tmp_path, small_siglip_trunk, capsys):
    write_siglip(tmp_path / "siglip")
    export(settings(f"model={tmp_path / 'siglip'}", "format=open_clip", f"out={tmp_path / 'model'}"))
    assert "note      open_clip does not read vision_cfg.act_kwargs" in capsys.readouterr().out
    ours, again = load_model(tmp_path / "siglip"), load_model(tmp_path / "model")
    images = stack_images(ours, fixed_pictures())
    with torch.no_grad():
        assert torch.equal(ours.encode_image(images), again.encode_image(images))


def test_a_bag_of_words_is_refused(tmp_path):
    save_model_folder(make_model(text_cfg={"kind": "cbow"}), tmp_path / "model")
    with pytest.raises(ValueError, match=r"text_cfg\.kind is 'cbow', which open_clip cannot load"):
        export(settings(f"model={tmp_path / 'model'}", "format=open_clip", f"out={tmp_path / 'out'}"))
    assert not (tmp_path / "out").exists()


def test_another_function_in_open_clip_is_found(tmp_path, monkeypatch):
    from clipkit.model.image_text import ImageTextModel

    save_model_folder(make_model(), tmp_path / "model")
    encode = ImageTextModel.encode_text
    monkeypatch.setattr(ImageTextModel, "encode_text", lambda self, tokens: encode(self, tokens) + 1e-3)
    with pytest.raises(ValueError, match="the export first differs from the model in text_features"):
        export(settings(f"model={tmp_path / 'model'}", "format=open_clip", f"out={tmp_path / 'out'}"))
    assert not (tmp_path / "out").exists()
