"""What cannot be exported: each case is refused in one line by the name of the field, before anything is written."""

import json
import sys
from importlib import metadata

import pytest

import clipkit
from clipkit.commands.export import export
from clipkit.config.schema import SettingsError
from clipkit.interop import provenance
from clipkit.interop.to_transformers_text import activation_name, layer_norm_eps, refuse_text_cfg, refuse_tokenizer
from clipkit.model.folder import save_model_folder
from tests.test_export import make_model, settings


@pytest.mark.parametrize(("field", "value"), [
    ("kind", "cbow"), ("hf_model_name", "roberta-base"), ("no_causal_mask", True), ("embed_cls", True), ("pool_type", "last"),
    ("pool_type", "first"), ("proj_type", "none"), ("proj_bias", True), ("ls_init_value", 0.1), ("qk_norm", True),
    ("scaled_cosine_attn", True), ("scale_heads", True), ("scale_attn_inner", True), ("scale_attn", True), ("scale_fc", True),
    ("block_type", "custom"), ("final_ln_after_pool", True), ("hf_tokenizer_name", "bert-base-uncased"),
    ("norm_kwargs", {"bias": False}), ("tokenizer_kwargs", {"clean": "canonicalize"}),
    ("tokenizer_kwargs", {"reduction_mask": "simple"}), ("pool_type", "none"), ("output_tokens", True),
])
def test_a_field_that_has_no_counterpart_is_refused_by_its_name(field, value):
    with pytest.raises(ValueError, match=rf"^text_cfg\.{field} .*use format=") as error:
        refuse_text_cfg({"width": 32, field: value})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text_cfg", [
    {}, {"kind": "transformer", "hf_model_name": None, "proj_bias": False, "block_type": "default", "norm_kwargs": None},
    {"norm_kwargs": {"eps": 1e-6}, "tokenizer_kwargs": {"clean": "lower"}, "pool_type": "eos", "eos_id": 49407, "pad_id": 0},
])
def test_a_plain_tower_is_not_refused(text_cfg):
    refuse_text_cfg(text_cfg)


@pytest.mark.parametrize(("text_cfg", "message"), [
    ({"kind": "cbow"}, r"text_cfg\.kind is 'cbow'"),
    ({"no_causal_mask": True, "pool_type": "last", "proj_bias": True}, "no_causal_mask is True.*transformers for a SigLIP"),
    ({"vocab_size": 1000}, r"vocab_size is 1000, but the tokenizer's ids go up to 49407"),
    ({"pool_type": "eos"}, r"text_cfg\.eos_id is 2, but the end of text of CLIP's tokenizer is 49407"),
    ({"ls_init_value": 0.1}, r"text_cfg\.ls_init_value is 0\.1"),
])
def test_a_model_that_cannot_be_mapped_leaves_nothing_behind(text_cfg, message, tmp_path):
    with pytest.raises(ValueError, match=message) as error:
        clipkit.export_text_encoder(make_model(text_cfg=text_cfg), tmp_path / "te")
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_the_penultimate_layer_of_one_layer_is_refused(tmp_path):
    with pytest.raises(ValueError, match="needs a text tower of 2 layers or more, and this one has 1; use layer=last"):
        clipkit.export_text_encoder(make_model(text_cfg={"layers": 1}), tmp_path / "te", layer="penultimate")


def test_a_tokenizer_that_is_not_clips_is_refused():
    from open_clip.tokenizer import SimpleTokenizer

    refuse_tokenizer(SimpleTokenizer())
    for tokenizer in (SimpleTokenizer(additional_special_tokens=["<new>"]), object()):
        with pytest.raises(ValueError, match=r"^the tokenizer \(\w+\) is not CLIP's byte-pair encoding"):
            refuse_tokenizer(tokenizer)


def test_modules_without_counterpart_are_refused():
    from torch import nn

    with pytest.raises(ValueError, match=r"the activation is SiLU \(act_kwargs\); transformers' CLIP has quick_gelu, gelu"):
        activation_name(nn.SiLU())
    with pytest.raises(ValueError, match=r"eps are \[1e-06, 1e-05\] \(norm_kwargs\)"):
        layer_norm_eps(nn.LayerNorm(4), nn.Sequential(nn.LayerNorm(4, eps=1e-6)))


@pytest.mark.parametrize(("arguments", "message"), [
    (["format=pickle"], "format is 'pickle'; choose one of text_encoder, transformers, onnx, open_clip"),
    (["layer=first"], "layer is 'first'; choose one of last, penultimate"),
    (["pad_token_id=1"], "pad_token_id is 1; choose one of 49407, 0"),
    (["single_file_dtype=bf16"], "single_file_dtype is 'bf16'; choose one of fp16, fp32"),
    (["format=onnx", "layer=penultimate"], "layer and single_file are settings of format=text_encoder, and format is onnx"),
    (["format=transformers", "single_file=true"], "and format is transformers; leave them out"),
    (["format=open_clip", "pad_token_id=0"], "format=open_clip keeps the model's own padding"),
    (["layer=penultimate", "single_file=true"], "single_file=true needs layer=last"),
])
def test_settings_that_do_not_go_together_are_refused(arguments, message):
    with pytest.raises(SettingsError) as error:
        settings(*arguments)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("damage", ["weights", "json", "keys"])
def test_a_damaged_model_folder_is_one_line(damage, tmp_path):
    folder = tmp_path / "model"
    save_model_folder(make_model(), folder)
    config, weights = folder / "open_clip_config.json", folder / "open_clip_model.safetensors"
    if damage == "weights":
        weights.write_bytes(weights.read_bytes()[:100_000])
    else:
        config.write_text(config.read_text()[:50] if damage == "json" else json.dumps({"preprocess_cfg": {}}))
    message = "is damaged" if damage == "weights" else "is no (readable|open_clip) configuration"
    with pytest.raises(ValueError, match=message) as error:
        export(settings(f"model={folder}", f"out={tmp_path / 'te'}"))
    assert "\n" not in str(error.value) and [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_missing_model_and_a_taken_folder_are_told_before_anything_is_loaded(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*no/such"):
        export(settings(f"model={tmp_path}/no/such", f"out={tmp_path / 'te'}"))
    monkeypatch.setattr("clipkit.model.folder.load_model", None)
    with pytest.raises(ValueError, match="which exists"):
        export(settings("model=ViT-B-32", f"out={tmp_path}"))


def test_missing_transformers_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "installed", lambda name: None)
    with pytest.raises(ValueError, match=r'^the export needs transformers, .*: pip install "clipkit-vl\[export\]"$'):
        clipkit.export_text_encoder(make_model(), tmp_path / "te")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("versions", "lines"), [
    ({"transformers": "4.56.0", "diffusers": "0.42.1"}, []), ({"transformers": "5.23.0"}, []), ({}, []),
    ({"transformers": "4.55.4"}, ["transformers 4.55.4 is outside the versions that were tried, 4.56 to 5.23"]),
    ({"transformers": "6.0rc1", "diffusers": "0.43.0.dev0"}, ["transformers 6.0rc1 is", "diffusers 0.43.0.dev0 is outside"]),
])
def test_versions_that_were_not_tried_are_named(versions, lines, monkeypatch):
    def version(name):
        if name not in versions:
            raise metadata.PackageNotFoundError
        return versions[name]

    monkeypatch.setattr(provenance.metadata, "version", version)
    found = provenance.untried_versions()
    assert len(found) == len(lines) and all(one.startswith(line) for one, line in zip(found, lines, strict=True))


def test_random_weights_are_mentioned(tmp_path, capsys, monkeypatch, quick_format):
    monkeypatch.setattr("clipkit.model.folder.load_model", lambda source, pretrained: make_model())
    export(settings("model=ViT-B-32", f"out={tmp_path / 'te'}"))
    assert "note      ViT-B-32 without pretrained=... has random weights" in capsys.readouterr().out


def test_the_command_line_answers_in_one_line(tmp_path, capsys, monkeypatch):
    from clipkit.__main__ import main

    monkeypatch.setattr(sys, "argv", ["clipkit", "export", "formt=onnx"])
    with pytest.raises(SystemExit):
        main()
    assert capsys.readouterr().err == "clipkit: formt is not a setting; did you mean format?\n"
