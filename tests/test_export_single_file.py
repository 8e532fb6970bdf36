"""single_file=true: names, shapes and numbers of the one file that ComfyUI-style tools, SD 3 and Flux users swap in."""

import json

import pytest
import torch
from torch.nn.functional import cosine_similarity

import clipkit
from clipkit.commands.export import export
from clipkit.interop.self_check import TEXTS
from clipkit.interop.single_file import PLACES, write_single_file
from clipkit.interop.to_transformers_text import clip_text_config, text_weights
from clipkit.interop.transformers_weights import transformers_weights
from clipkit.model.build import make_towers
from clipkit.model.folder import save_model_folder
from tests.test_export import make_model, settings

pytestmark = pytest.mark.usefixtures("tokenizer_is_written_once")


@pytest.mark.parametrize(("dtype", "cosine"), [("fp16", 0.9999), ("fp32", 1 - 1e-6)])
def test_one_file_holds_the_tower_under_transformers_names(dtype, cosine, tmp_path, capsys):
    from safetensors.torch import load_file
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    model = make_model()
    save_model_folder(model, tmp_path / "model")
    export(settings(f"model={tmp_path / 'model'}", f"out={tmp_path / 'te'}", "single_file=true", f"single_file_dtype={dtype}"))
    tensors = load_file(tmp_path / "te" / "text_encoder.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16 if dtype == "fp16" else torch.float32}
    theirs = CLIPTextModelWithProjection(CLIPTextConfig.from_pretrained(tmp_path / "te")).eval()
    theirs.load_state_dict(tensors)  # strict: the names are those of transformers, none more and none less
    tokens = model.tokenize(TEXTS).long()
    with torch.no_grad():
        assert cosine_similarity(theirs(tokens).text_embeds, model.encode_text(tokens)).min() >= cosine
    record = json.loads((tmp_path / "te" / "clipkit_export.json").read_text())["single_file"]
    assert (record["file"], record["dtype"], record["place"]) == ("text_encoder.safetensors", dtype, None)
    assert record["misfits"] == {"CLIP-L": "hidden_size is 32, not 768", "bigG": "hidden_size is 32, not 1280"}
    assert "text_encoder.safetensors does not fit the place CLIP-L: hidden_size is 32, not 768" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "place"), [("ViT-L-14-quickgelu", "CLIP-L"), ("ViT-bigG-14", "bigG"), ("ViT-L-14", None)])
def test_open_clips_l_and_big_g_fit_their_places_tensor_by_tensor(name, place):
    """On the meta device: nothing is computed. ViT-L-14 has exact GELU, which the CLIP-L place does not expect."""
    import open_clip
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    config = open_clip.get_model_config(name)
    with torch.device("meta"):
        towers = make_towers({**config, "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 32, "layers": 1,
                                                       "head_width": 16}})
        tokenizer = open_clip.tokenizer.SimpleTokenizer()
        described = clip_text_config(towers, config["text_cfg"], tokenizer)
        ours = transformers_weights(text_weights(towers), "clip")
        wants = PLACES["bigG" if "G" in name else "CLIP-L"][1]
        theirs = CLIPTextModelWithProjection(CLIPTextConfig(**wants)).state_dict()
    assert (wants.items() <= described.items()) == (place is not None)
    assert {key: tensor.shape for key, tensor in ours.items()} == {key: tensor.shape for key, tensor in theirs.items()}


def test_a_tower_that_fits_takes_the_file_name_of_its_place(tmp_path, monkeypatch):
    described = {"hidden_size": 4, "hidden_act": "gelu"}
    monkeypatch.setitem(PLACES, "CLIP-L", ("clip_l.safetensors", described))
    both = dict.fromkeys(PLACES["bigG"][1]) | described
    found = write_single_file(tmp_path, {"a": torch.ones(4, 4)}, both, "fp16")
    assert found == {"file": "clip_l.safetensors", "dtype": "fp16", "place": "CLIP-L", "misfits": {}}
    assert [path.name for path in tmp_path.iterdir()] == ["clip_l.safetensors"]


def test_numbers_beyond_fp16_are_refused(tmp_path):
    model = make_model()
    with torch.no_grad():
        model.towers.text_projection.mul_(1e6)
    with pytest.raises(ValueError, match=r"^text_projection.weight has numbers that fp16 cannot hold; use single_file_dtype="):
        clipkit.export_text_encoder(model, tmp_path / "te", single_file=True)
    assert not list(tmp_path.iterdir())
