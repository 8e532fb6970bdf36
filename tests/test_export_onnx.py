"""`clipkit export format=onnx`: both encoders give in ONNX Runtime what they give here, at any batch and any length."""

import errno
import json
import os
import sys

import pytest
import torch
from torch import nn

from clipkit.config.export import ExportConfig
from clipkit.interop.onnx_export import TextEncoder, write_onnx_folder
from clipkit.interop.onnx_file import compare_with_onnx, write_onnx
from clipkit.model.build import build_model
from clipkit.model.folder import load_model
from tests.conftest import TINY, command_settings
from tests.test_import import randomise, write_siglip

pytestmark = pytest.mark.usefixtures("tokenizer_is_written_once")

TEXTS = ["", "a red square!", "word " * 40]
INPUTS = [torch.randn(shape, generator=torch.Generator().manual_seed(0)) for shape in ((3, 4), (1, 4), (7, 4))]


def make_model(model_cfg=None):
    torch.manual_seed(0)
    model = build_model(config={**TINY, **(model_cfg or {})}).eval()
    randomise(model.towers)
    return model


def settings():
    return command_settings("export", ExportConfig, "model=x", "format=onnx")


def write(module, path, **changes):
    names = {"input_name": "x", "output_name": "y", "dynamic": {0: "batch"}}
    return write_onnx(module.eval(), INPUTS, path, **names, **changes)


def session(path):
    import onnxruntime

    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


class Shifts(nn.Module):
    """Gives another value each time: no file can agree with it."""

    calls = 0.0

    def forward(self, x):
        self.calls += 1.0
        return x + self.calls


def test_a_module_becomes_one_file_of_any_batch_that_carries_its_texts(tmp_path):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 3), nn.GELU())
    assert write(module, tmp_path / "small.onnx", metadata={"classes": '["a", "b"]'}) <= 1e-5
    assert [path.name for path in tmp_path.iterdir()] == ["small.onnx"]
    found = session(tmp_path / "small.onnx")
    assert found.get_inputs()[0].name == "x" and found.get_inputs()[0].shape == ["batch", 4]
    assert found.get_outputs()[0].name == "y" and found.get_modelmeta().custom_metadata_map["classes"] == '["a", "b"]'
    for x in INPUTS:
        y = torch.from_numpy(found.run(None, {"x": x.numpy()})[0])
        torch.testing.assert_close(y, module(x).detach(), atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match=r"small.onnx was not written: for the input \(3, 4\) ONNX Runtime gives \(3, 3\)"):
        compare_with_onnx(nn.Linear(4, 3), INPUTS, tmp_path / "small.onnx", atol=1e-4)


def test_a_file_that_gives_other_values_is_not_put_in_place_and_the_older_one_stays(tmp_path):
    (tmp_path / "model.onnx").write_text("older")
    with pytest.raises(ValueError, match=r"model.onnx was not written: .* a difference of [0-9.]+ to torch's"):
        write(Shifts(), tmp_path / "model.onnx")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["older"]


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match=r"cannot write .*model.onnx: the disk is full"):
        write(nn.Linear(4, 3), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("package", ["onnx", "onnxruntime", "onnxscript"])
def test_a_missing_package_is_named_with_what_to_install(package, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=rf'ONNX files need .*{package}.*: pip install "clipkit-vl\[export\]"'):
        write(nn.Linear(4, 3), tmp_path / "model.onnx")


@pytest.mark.parametrize("kind", [{}, {"custom_text": True, "quick_gelu": True},
                                  {"text_cfg": {"kind": "cbow", "width": 32, "context_length": 16}}])
def test_the_text_encoder_gives_the_same_features_at_every_length_that_holds_the_texts(kind):
    model = make_model(kind)
    encoder = TextEncoder(model.towers, model.config["model_cfg"]["text_cfg"])
    tokens = model.tokenize(TEXTS[:2]).long()
    with torch.no_grad():
        wanted = model.encode_text(tokens)
        for length in range(int(tokens.argmax(dim=-1).max()) + 1, 17):
            torch.testing.assert_close(encoder(tokens[:, :length]), wanted, atol=1e-6, rtol=0)


def assert_onnx_is_the_model(model, folder):
    """Batches and lengths that the self-check does not have."""
    from transformers import AutoTokenizer

    facts = write_onnx_folder(model, folder, settings())
    assert max(facts["greatest_differences"].values()) <= 1e-4
    known = json.loads((folder / "clipkit_onnx.json").read_text())
    assert known["preprocess_cfg"] == json.loads(json.dumps(model.config["preprocess_cfg"]))  # tuples are lists there
    assert known["logit_scale"] == pytest.approx(model.towers.logit_scale.exp().item())
    size = model.config["preprocess_cfg"]["size"]
    side = size if isinstance(size, int) else size[0]
    images = torch.randn(3, 3, side, side, generator=torch.Generator().manual_seed(1))
    tokens = model.tokenize(TEXTS).long()
    image_encoder, text_encoder = session(folder / "image_encoder.onnx"), session(folder / "text_encoder.onnx")
    any_length = facts["text_lengths"] != f"{tokens.shape[1]} only"
    with torch.no_grad():
        image_features, text_features = model.encode_image(images), model.encode_text(tokens)
    for rows in (1, 3):
        found = image_encoder.run(None, {"pixel_values": images[:rows].numpy()})[0]
        torch.testing.assert_close(torch.from_numpy(found), image_features[:rows], atol=1e-4, rtol=0)
    for length in (8, 11, tokens.shape[1]) if any_length else (tokens.shape[1],):
        found = text_encoder.run(None, {"input_ids": tokens[:2, :length].numpy()})[0]  # the two short texts
        torch.testing.assert_close(torch.from_numpy(found), text_features[:2], atol=1e-4, rtol=0)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(["a red square!"], padding="max_length", truncation=True, max_length=tokens.shape[1], return_tensors="pt")
    found = text_encoder.run(None, {"input_ids": ids.input_ids.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(found), text_features[1:2], atol=1e-4, rtol=0)
    return any_length


@pytest.mark.slow
@pytest.mark.parametrize("kind", [
    {}, {"custom_text": True, "quick_gelu": True}, {"text_cfg": {"kind": "cbow", "width": 32, "context_length": 16}},
    {"vision_cfg": {"image_size": 32, "timm_model_name": "resnet10t", "timm_pool": "avg", "timm_proj": "linear"}},
    {"init_logit_bias": -10}])
def test_onnx_runtime_gives_the_features_of_every_kind_of_tower(kind, tmp_path):
    assert assert_onnx_is_the_model(make_model(kind), tmp_path)


@pytest.mark.slow
def test_a_siglip_keeps_its_text_length(tmp_path, small_siglip_trunk):
    write_siglip(tmp_path / "theirs")
    (tmp_path / "out").mkdir()
    model = load_model(tmp_path / "theirs")
    facts = write_onnx_folder(model, tmp_path / "out", settings())  # compares and raises
    assert facts["text_lengths"] == "8 only"
    assert session(tmp_path / "out" / "text_encoder.onnx").get_inputs()[0].shape == ["batch", 8]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["RN50", "ViT-B-32-quickgelu", "ViT-L-14", "ViT-H-14"])
def test_towers_of_open_clips_own_shapes_agree(name, tmp_path):
    import open_clip

    model_cfg = open_clip.get_model_config(name)
    for part in ("vision_cfg", "text_cfg"):
        model_cfg[part]["layers"] = 2 if part == "text_cfg" or name != "RN50" else model_cfg[part]["layers"]
    torch.manual_seed(0)
    model = build_model(config=model_cfg).eval()
    assert assert_onnx_is_the_model(model, tmp_path)
