"""An open_clip name with weights has the activation that the weights were trained with."""

import pytest
import torch

from clipkit.model.build import build_model
from clipkit.model.folder import load_model, save_model_folder
from tests.conftest import TINY


@pytest.fixture
def tiny_name(monkeypatch, tmp_path):
    """An open_clip name without QuickGELU whose tag "openai" demands it; the tag's file; a reference model with QuickGELU."""
    import open_clip.factory
    import open_clip.pretrained

    torch.manual_seed(0)
    model = build_model(config={**TINY, "quick_gelu": True}).eval()
    (tmp_path / "tag").mkdir()
    save_model_folder(model, tmp_path / "tag")
    weights = (tmp_path / "tag" / "open_clip_model.safetensors").rename(tmp_path / "openai.safetensors")
    tags = {"openai": {"file": str(weights), "quick_gelu": True, "mean": (0.5, 0.5, 0.5)}, "other": {"file": str(weights)}}
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "Tiny", TINY)
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "Tiny", tags)
    return weights, model


def text_features(model):
    with torch.no_grad():
        return model.encode_text(model.tokenize(["a red square"]))


def test_a_tag_trained_with_quick_gelu_brings_it_along(tiny_name, tmp_path):
    _, reference = tiny_name
    model = load_model("Tiny", pretrained="openai")
    assert model.config["model_cfg"]["quick_gelu"] is True and model.config["preprocess_cfg"]["mean"] == (0.5, 0.5, 0.5)
    assert torch.equal(text_features(model), text_features(reference)) and model.source_sha256 is not None
    save_model_folder(model, tmp_path / "saved")
    assert torch.equal(text_features(load_model(tmp_path / "saved")), text_features(reference))
    plain = load_model("Tiny", pretrained="other")
    assert "quick_gelu" not in plain.config["model_cfg"]
    assert not torch.allclose(text_features(plain), text_features(reference), atol=1e-5)


def test_a_weights_file_has_its_folders_activation_or_a_stated_assumption(tiny_name, tmp_path):
    weights, reference = tiny_name
    with pytest.warns(UserWarning, match="Tiny assumes GELU: for weights of OpenAI.* give Tiny-quickgelu"):
        load_model("Tiny", pretrained=str(weights))
    save_model_folder(reference, tmp_path / "saved")
    model = load_model("Tiny", pretrained=str(tmp_path / "saved" / "open_clip_model.safetensors"))
    assert torch.equal(text_features(model), text_features(reference))
    with pytest.raises(ValueError, match="has its own weights"):
        load_model(tmp_path / "saved", pretrained="openai")
