"""What a transformers folder may not be: each case is refused in one line."""

import json

import pytest
import torch

from clipkit.interop.from_transformers import model_cfg_from_transformers, preprocess_cfg_from_transformers
from clipkit.model.folder import load_model
from tests.test_import import CLIP_TEXT, CLIP_VISION, write_clip


@pytest.mark.parametrize(("config", "message"), [
    ({"model_type": "bert"}, "model_type is 'bert'"),
    ({"model_type": "siglip2"}, "NaFlex"),
    ({"vision_config": {**CLIP_VISION, "hidden_act": "relu"}}, "hidden_act is 'relu'"),
    ({"vision_config": {**CLIP_VISION, "hidden_act": "gelu"}}, "one setting of quick_gelu"),
    ({"vision_config": {**CLIP_VISION, "patch_size": [8, 16]}}, "patch_size is"),
    ({"vision_config": {**CLIP_VISION, "num_channels": 4}}, "num_channels is 4"),
    ({"vision_config": {**CLIP_VISION, "num_attention_heads": 5}}, "no multiple of its 5 heads"),
    ({"text_config": {**CLIP_TEXT, "eos_token_id": [1, 2]}}, "eos_token_id is"),
    ({"model_type": "siglip", "vision_config": {"hidden_size": 96}, "text_config": {"projection_size": 96}}, "timm has SigLIP"),
    ({"model_type": "siglip", "vision_config": {"vision_use_head": False}}, "vision_use_head"),
    ({"model_type": "siglip", "vision_config": {"layer_norm_eps": 1e-5}}, "layer_norm_eps is 1e-05"),
    ({"model_type": "siglip", "text_config": {"projection_size": 12}}, "gives 12 features"),
    ({"model_type": "siglip", "text_config": {"hidden_act": "quick_gelu"}}, "SigLIP towers do not have"),
])
def test_a_configuration_that_open_clip_cannot_represent_is_refused(config, message):
    with pytest.raises(ValueError, match=message) as error:
        model_cfg_from_transformers({"model_type": "clip", **config})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("processor", "message"), [
    ({"do_resize": False}, "do_resize is false"),
    ({"do_pad": True}, "do_pad is true"),
    ({"rescale_factor": 1.0}, r"rescale_factor is 1\.0"),
    ({"resample": 1}, "resample is 1"),
    ({"crop_size": 200}, "crops to"),
    ({"do_center_crop": False}, "crops to nothing"),
    ({"size": {"shortest_edge": 256}}, "resizes to"),
])
def test_an_image_processor_that_open_clip_cannot_represent_is_refused(processor, message):
    with pytest.raises(ValueError, match=message) as error:
        preprocess_cfg_from_transformers(processor, "clip", 224)
    assert "\n" not in str(error.value)


class Evil:
    def __reduce__(self):
        return print, ("code ran",)


@pytest.mark.parametrize("missing", ["model.safetensors", "preprocessor_config.json", "vocab.json", "config.json"])
def test_a_folder_without_a_part_says_what_was_looked_for(missing, tmp_path):
    write_clip(tmp_path, {}, {}, {})
    (tmp_path / missing).unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json" if missing == "config.json" else missing) as error:
        load_model(tmp_path)
    assert "\n" not in str(error.value)


def test_weights_that_are_not_the_models_are_refused_in_one_line(tmp_path, capsys):
    from safetensors.torch import load_file, save_file

    write_clip(tmp_path, {}, {}, {})
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    broken = {
        "no tensor of a transformers clip": {**weights, "classifier.weight": torch.zeros(2)},
        r"\(32,\), the weights have nothing": {n: t for n, t in weights.items() if n != "text_model.final_layer_norm.bias"},
        r"the weights have \(8, 32\)": {**weights, "text_model.embeddings.position_embedding.weight": torch.zeros(8, 32)},
        "not the k_proj": {n: t for n, t in weights.items() if n != "text_model.encoder.layers.0.self_attn.k_proj.bias"},
    }
    for message, tensors in broken.items():
        save_file(tensors, file)
        with pytest.raises(ValueError, match=message) as error:
            load_model(tmp_path)
        assert "\n" not in str(error.value)
    file.unlink()
    torch.save({"logit_scale": Evil()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="could run its code"):
        load_model(tmp_path)
    assert "code ran" not in capsys.readouterr().out
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../model.safetensors"}}))
    with pytest.raises(FileNotFoundError, match="no file of the folder"):
        load_model(tmp_path)
