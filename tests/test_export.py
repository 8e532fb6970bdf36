"""`clipkit export`: the text encoder is the same function in transformers, and a folder appears whole or not at all."""

import json
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cosine_similarity, normalize

import clipkit
from clipkit.commands.export import export
from clipkit.config.export import ExportConfig
from clipkit.interop import text_encoder
from clipkit.interop.export import FORMATS, output_folder
from clipkit.interop.self_check import TEXTS, check_close, check_token_ids, clean, text_states
from clipkit.model.build import build_model
from clipkit.model.folder import load_model, save_model_folder
from tests.conftest import TINY, command_settings
from tests.test_import import randomise

pytestmark = pytest.mark.usefixtures("tokenizer_is_written_once")

TEXT = {**TINY["text_cfg"], "layers": 3}
# how the model differs from a plain CLIP, the padding, and what CLIPTextConfig has to say then
TOWERS = {
    "CLIP": ({}, {}, 49407, {"hidden_act": "gelu", "layer_norm_eps": 1e-5, "intermediate_size": 128}),
    "CustomTextCLIP with quick_gelu": ({"custom_text": True, "quick_gelu": True}, {}, 49407, {"hidden_act": "quick_gelu"}),
    "square projection, pooled at the end of text, open_clip's padding": (
        {"embed_dim": 32}, {"pool_type": "eos", "eos_id": 49407}, 0, {"projection_dim": 32}),
    "tanh GELU, other eps and mlp width, spare rows in the vocabulary": ({"custom_text": True}, {
        "act_kwargs": {"approximate": "tanh"}, "norm_kwargs": {"eps": 1e-3}, "mlp_ratio": 2.3, "vocab_size": 49410}, 49407,
        {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-3, "intermediate_size": 73, "vocab_size": 49410}),
}


def make_model(model_cfg: dict | None = None, text_cfg: dict | None = None):
    """A small CLIP with weights in which every mapping error shows."""
    torch.manual_seed(0)
    model = build_model(config={**TINY, **(model_cfg or {}), "text_cfg": {**TEXT, **(text_cfg or {})}}).eval()
    randomise(model.towers)
    return model


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def model_folder(model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "small"
    save_model_folder(model, folder)
    return folder


@pytest.fixture(scope="module")
def exported(model_folder, tmp_path_factory) -> Path:
    """The folder that the command makes of model_folder."""
    out = tmp_path_factory.mktemp("made") / "below" / "te"
    export(settings(f"model={model_folder}", f"out={out}"))
    return out


def layer_outputs(model, tokens: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """What open_clip itself computes: every block's output and the norm's, seen by hooks, and the text features."""
    towers = getattr(model.towers, "text", model.towers)
    seen: list[torch.Tensor] = []
    hooks = [module.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
             for module in (*towers.transformer.resblocks, towers.ln_final)]
    with torch.no_grad():
        features = model.towers.encode_text(tokens)
    for hook in hooks:
        hook.remove()
    return seen[:-1], seen[-1], features


def settings(*arguments: str) -> ExportConfig:
    return command_settings("export", ExportConfig, *arguments)


@pytest.mark.parametrize("kind", TOWERS)
def test_transformers_gives_the_hidden_states_and_features_of_open_clip(kind, tmp_path):
    from transformers import CLIPTextModelWithProjection, CLIPTokenizer

    model_cfg, text_cfg, pad_token_id, described = TOWERS[kind]
    model = make_model(model_cfg, text_cfg)
    folder = clipkit.export_text_encoder(model, tmp_path / "te", pad_token_id=pad_token_id)
    theirs, tokenizer = CLIPTextModelWithProjection.from_pretrained(folder).eval(), CLIPTokenizer.from_pretrained(folder)
    assert described.items() <= theirs.config.to_dict().items()
    assert (theirs.config.eos_token_id, theirs.config.pad_token_id, tokenizer.pad_token_id) == (49407, *2 * (pad_token_id,))
    assert tokenizer.model_max_length == theirs.config.max_position_embeddings == 16
    tokens = tokenizer(clean(TEXTS), padding="max_length", truncation=True, return_tensors="pt").input_ids
    if pad_token_id == 0:  # the whole row is open_clip's, but for the padding token itself
        plain = [i for i, text in enumerate(TEXTS) if "!" not in text]
        assert torch.equal(tokens[plain], model.tokenize([TEXTS[i] for i in plain]).long())
    hidden, last, features = layer_outputs(model, tokens)
    with torch.no_grad():
        given = theirs(tokens, output_hidden_states=True)
    for mine, wanted in zip((*given.hidden_states[1:], given.last_hidden_state, given.text_embeds), (*hidden, last, features),
                            strict=True):
        torch.testing.assert_close(mine, wanted, atol=1e-5, rtol=0)


def test_penultimate_gives_the_normalised_state_of_the_layer_before_the_last(model, tmp_path):
    from transformers import CLIPTextModel

    folder = clipkit.export_text_encoder(model, tmp_path / "te", layer="penultimate")
    theirs = CLIPTextModel.from_pretrained(folder).eval()
    tokens = model.tokenize(TEXTS).long()
    hidden, _, _ = layer_outputs(model, tokens)
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens).last_hidden_state, model.towers.ln_final(hidden[-2]), atol=1e-5, rtol=0)
    assert theirs.config.num_hidden_layers == 2


def test_hidden_states_of_the_check_are_those_of_open_clip(model):
    tokens = model.tokenize(TEXTS).long()
    hidden, last, features = layer_outputs(model, tokens)
    ours = text_states(model.towers, tokens)
    for mine, wanted in zip((*ours.hidden[1:], ours.last, ours.projected), (*hidden, last, features), strict=True):
        torch.testing.assert_close(mine, wanted, atol=1e-6, rtol=0)


def test_bf16_keeps_the_direction_of_the_features(model, exported):
    from transformers import CLIPTextModelWithProjection

    theirs = CLIPTextModelWithProjection.from_pretrained(exported, dtype=torch.bfloat16).eval()
    tokens = model.tokenize(TEXTS).long()
    with torch.no_grad():
        cosines = cosine_similarity(theirs(tokens).text_embeds.float(), model.encode_text(tokens))
    assert cosines.min() > 0.9999


def test_the_command_writes_model_tokenizer_card_and_provenance(model_folder, exported):
    names = {path.name for path in exported.iterdir()}
    assert names >= {"config.json", "model.safetensors", "vocab.json", "merges.txt", "tokenizer_config.json", "README.md",
                     "clipkit_export.json"}
    assert len({path.stat().st_mode for path in exported.iterdir()}) == 1  # all may read what the folder's maker lets them
    assert [path.name for path in exported.parent.iterdir()] == ["te"]  # no hidden folder is left
    record = json.loads((exported / "clipkit_export.json").read_text(encoding="utf-8"))
    assert record["source"] == {"model": "small", "pretrained": None, "weights_sha256": load_model(model_folder).source_sha256}
    assert (record["format"], record["layer"], record["layers"], record["pad_token_id"]) == ("text_encoder", "last", 3, 49407)
    assert set(record["greatest_differences"]) == {"hidden_states", "hidden_states[-2]", "last_hidden_state", "pooler_output",
                                                   "text_embeds", "encode_text"}
    assert max(record["greatest_differences"].values()) <= 1e-5
    assert {"torch", "open_clip_torch", "transformers"} <= set(record["versions"]) and "ftfy" in record["cleaning"]
    assert not any(str(model_folder.parent) in path.read_text(encoding="utf-8") for path in exported.glob("*.json"))


def test_the_command_prints_what_it_compared_and_wrote(model_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(FORMATS, "text_encoder", lambda model, folder, config: {"greatest_differences": {"text_embeds": 2e-6},
                                                                                "notes": ["something to know"]})
    export(settings(f"model={model_folder}", f"out={tmp_path / 'te'}"))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("clipkit export: ") and "checked   text_embeds          greatest difference 2.0e-06" in lines
    assert lines[-2] == "note      something to know" and lines[-1].startswith(f"written   {tmp_path / 'te'}: 2 files, ")


def test_without_out_a_run_keeps_its_exports(model_folder, tmp_path):
    run = tmp_path / "runs" / "mine"
    (run / "model").mkdir(parents=True)
    (run / "config.yaml").write_text("")
    for source in (run, run / "model"):
        assert output_folder(settings(f"model={source}")) == run / "export" / "text_encoder"
    assert output_folder(settings(f"model={model_folder}")) == Path("export/small/text_encoder")
    assert output_folder(settings("model=ViT-B-32")) == Path("export/ViT-B-32/text_encoder")


def wrong_projection(weights, model_type):
    converted = RIGHT(weights, model_type)
    return {**converted, "text_projection.weight": converted["text_projection.weight"].T.contiguous()}


def wrong_layer(weights, model_type):
    converted = RIGHT(weights, model_type)
    name = "text_model.encoder.layers.1.mlp.fc2.bias"
    return {**converted, name: converted[name] + 1e-3}


RIGHT = text_encoder.transformers_weights


@pytest.mark.parametrize(("wrong", "where"), [(wrong_projection, "text_embeds"), (wrong_layer, r"hidden_states\[2\]")])
def test_a_wrong_mapping_is_found_where_it_begins_and_nothing_is_written(wrong, where, tmp_path, monkeypatch):
    monkeypatch.setattr(text_encoder, "transformers_weights", wrong)
    with pytest.raises(ValueError, match=f"^nothing was written: the export first differs from the model in {where}:") as error:
        clipkit.export_text_encoder(make_model({"embed_dim": 32}), tmp_path / "te")
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_what_is_allowed_grows_with_the_greatest_number_of_a_vector():
    ours = torch.tensor([[1000.0, 1.0], [1.0, 0.5]])
    found: dict[str, float] = {}
    check_close("here", ours + torch.tensor([[0, 9e-3], [0, 0]]), ours, found)
    check_close("here", ours + torch.tensor([[0, 0], [0, 9e-6]]), ours, found)
    assert found == {"here": pytest.approx(9e-3, rel=1e-2)}
    for wrong in (torch.tensor([[0, 0], [0, 2e-5]]), torch.tensor([[0, 2e-2], [0, 0]]), torch.tensor([torch.nan, 0])):
        with pytest.raises(ValueError, match=r"^nothing was written: the export first differs from the model in here\[3\]: by"):
            check_close("here", ours + wrong, ours, found, detail="[3]")
    with pytest.raises(ValueError, match=r"in there: shapes \(2,\) and \(2, 2\)"):
        check_close("there", ours[0], ours, found)
    with pytest.raises(ValueError, match="in there: by 1 of"):
        check_close("there", torch.tensor(3), torch.tensor(4), found, atol=0)


def test_a_wrong_activation_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr("clipkit.interop.to_transformers_text.activation_name", lambda module: "quick_gelu")
    with pytest.raises(ValueError, match=r"hidden_states\[1\]"):
        clipkit.export_text_encoder(make_model(), tmp_path / "te")


def test_a_wrong_tokenizer_is_found(model):
    def shifted(*arguments, **options):
        ids = model.tokenize(arguments[0]).long()
        ids[1, 1] += 1
        return type("Ids", (), {"input_ids": ids})()

    shifted.pad_token = "<|endoftext|>"
    with pytest.raises(ValueError, match=r"^nothing was written: for the text '!' the written tokenizer gives"):
        check_token_ids(shifted, model)


@pytest.mark.parametrize(("name", "changes", "layer"), [
    ("ViT-B-32", {}, "last"), ("ViT-L-14-quickgelu", {"layers": 2}, "last"), ("ViT-H-14", {"layers": 3}, "penultimate")])
@pytest.mark.slow
def test_towers_of_open_clips_own_shapes_agree(name, changes, layer, tmp_path):
    """Random weights; a small image tower takes the place of theirs."""
    import open_clip
    from transformers import CLIPTextModelWithProjection

    config = open_clip.get_model_config(name)
    assert config is not None
    torch.manual_seed(0)
    model = build_model(config={**TINY, "embed_dim": config["embed_dim"], "quick_gelu": config.get("quick_gelu", False),
                                "text_cfg": {**config["text_cfg"], **changes}}).eval()
    with torch.no_grad():
        for parameter in [one for one in model.towers.parameters() if one.ndim == 1]:  # norms and biases start at 1 and 0
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    folder = clipkit.export_text_encoder(model, tmp_path / "te", layer=layer)
    record = json.loads((folder / "clipkit_export.json").read_text(encoding="utf-8"))
    assert max(record["greatest_differences"].values()) <= 1e-5
    theirs = CLIPTextModelWithProjection.from_pretrained(folder).eval()
    tokens = model.tokenize(TEXTS).long()
    if layer == "last":
        with torch.no_grad():
            features = normalize(theirs(tokens).text_embeds, dim=-1)
            torch.testing.assert_close(features, model.encode_text(tokens), atol=1e-5, rtol=0)
