"""`clipkit zero-shot` a second time: what is in the store and in the folder. And names of files that are no text."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from clipkit.commands.compare import compare
from clipkit.commands.embed import embed
from clipkit.commands.zero_shot import zero_shot
from clipkit.config.zero_shot import CompareConfig, EmbedConfig, ZeroShotConfig
from clipkit.evaluation import lazy_model
from clipkit.evaluation.lazy_model import count_cut, facts_of, logit_scale_of, open_model
from clipkit.evaluation.store import EmbeddingStore, identify, text_key
from clipkit.model.folder import load_model, save_model_folder
from tests.conftest import TINY, command_settings

CPU = torch.device("cpu")


@pytest.fixture
def model_folder(tiny_model, tmp_path: Path) -> Path:
    save_model_folder(tiny_model, tmp_path / "tiny")
    return tmp_path / "tiny"


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    return squares(tmp_path / "pets", {"cat": 4, "dog": 3})


def squares(root: Path, classes: dict[str, int]) -> Path:
    rng = np.random.default_rng(0)
    for name, num in classes.items():
        (root / name).mkdir(parents=True)
        for number in range(num):
            Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(root / name / f"{number}.png")
    return root


def run(folder: Path, *arguments: str, model: Path) -> None:
    common = (f"model={model}", "templates=[{}, a {}]", f"out={folder}", f"cache_dir={folder.parent / 'cache'}")
    zero_shot(command_settings("zero-shot", ZeroShotConfig, *common, *arguments))


def refuse(*_: object, **__: object) -> None:
    raise AssertionError("the model was loaded")


def test_a_second_call_loads_no_model(model_folder: Path, pets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                      capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path / "first", f"task={pets}", model=model_folder)
    told = capsys.readouterr().out
    monkeypatch.setattr(lazy_model, "load_model", refuse)
    run(tmp_path / "second", f"task={pets}", model=model_folder)
    assert (tmp_path / "first" / "results.csv").read_text() == (tmp_path / "second" / "results.csv").read_text()
    assert capsys.readouterr().out.splitlines()[1] == told.splitlines()[1]  # name, parameters, size
    with pytest.raises(AssertionError, match="the model was loaded"):
        run(tmp_path / "third", f"task={pets}", "templates=[the {}]", model=model_folder)  # a new prompt needs it


def test_what_is_known_of_a_model_is_the_model_s(tiny_model, model_folder: Path, tmp_path: Path) -> None:
    store, texts = EmbeddingStore(tmp_path / "cache"), ["a cat", "word " * 40]
    first = open_model(str(model_folder), pretrained=None, device=CPU, store=store)
    known = open_model(str(model_folder), pretrained=None, device=CPU, store=store)
    assert type(first).__name__ == "ImageTextModel" and type(known).__name__ == "LazyModel"
    assert replace(facts_of(known), identity=None) == replace(facts_of(first), identity=None)
    assert facts_of(known).num_parameters == sum(parameter.numel() for parameter in tiny_model.parameters())
    assert logit_scale_of(known) == tiny_model.towers.logit_scale.exp().item()
    assert text_key(identify(known)) == text_key(identify(load_model(model_folder)))
    assert count_cut(first, texts, store) == count_cut(known, texts, store) == count_cut(known, texts, None) == 1


def test_other_weights_are_noticed_before_and_while_a_model_is_measured(tiny_model, model_folder: Path, tmp_path: Path) -> None:
    store = EmbeddingStore(tmp_path / "cache")
    open_model(str(model_folder), pretrained=None, device=CPU, store=store)
    known = open_model(str(model_folder), pretrained=None, device=CPU, store=store)
    tiny_model.towers.logit_scale.data += 1
    save_model_folder(tiny_model, model_folder)
    with pytest.raises(ValueError, match=r"the files of the model changed while it was measured \(is it being trained\?\)"):
        _ = known.towers
    other = open_model(str(model_folder), pretrained=None, device=CPU, store=store)
    assert logit_scale_of(other) == pytest.approx(logit_scale_of(known) * np.e)


@pytest.mark.slow
def test_a_second_call_imports_no_tower(model_folder: Path, pets: Path, tmp_path: Path) -> None:
    run(tmp_path / "first", f"task={pets}", model=model_folder)
    code = ("import sys; from clipkit.commands.zero_shot import main; main(sys.argv[1:]); "
            "assert not {'open_clip', 'timm', 'torchvision', 'transformers'} & set(sys.modules)")
    subprocess.run([sys.executable, "-c", code, f"model={model_folder}", f"task={pets}", "templates=[{}, a {}]", "device=cpu",
                    f"out={tmp_path / 'second'}", f"cache_dir={tmp_path / 'cache'}"], check=True)


def test_results_of_other_tasks_stay_and_those_of_other_weights_go(tiny_model, model_folder: Path, pets: Path, tmp_path: Path,
                                                                   capsys: pytest.CaptureFixture[str]) -> None:
    birds, out = squares(tmp_path / "birds", {"owl": 3, "rook": 2}), tmp_path / "out"
    run(out, f"task=[{pets},{birds}]", "report=false", model=model_folder)
    whole = (out / "results.csv").read_text(), pd.read_parquet(out / "predictions.parquet")
    run(out, f"task={birds}", "report=false", model=model_folder)
    assert (out / "results.csv").read_text() == whole[0]
    pd.testing.assert_frame_equal(pd.read_parquet(out / "predictions.parquet"), whole[1])
    run(tmp_path / "other", f"task={birds}", "report=false", model=model_folder)
    capsys.readouterr()
    compare(command_settings("compare", CompareConfig, f"a={out}", f"b={tmp_path / 'other'}"))
    told = capsys.readouterr().out
    assert f"note      only a was asked: {pets} zeroshot_classification" in told and str(birds)[-10:] in told
    tiny_model.towers.visual.proj.data.neg_()
    save_model_folder(tiny_model, model_folder)
    run(out, f"task={birds}", "report=false", model=model_folder)
    assert f"note      the results of other weights in {out} are replaced" in capsys.readouterr().out
    assert {row["task"] for row in json.loads((out / "results.json").read_text())} == {str(birds)}


def test_what_a_call_that_ended_early_had_measured_is_there(model_folder: Path, pets: Path, tmp_path: Path) -> None:
    empty, out = tmp_path / "bad", tmp_path / "out"
    (empty / "cat").mkdir(parents=True)
    (empty / "cat" / "0.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="no image that can be used"):
        run(out, f"task=[{pets},{empty}]", model=model_folder)
    assert {row["task"] for row in json.loads((out / "results.json").read_text())} == {str(pets)}
    assert len(pd.read_parquet(out / "predictions.parquet")) == 7


def test_results_of_an_older_schema_stop_the_command_before_any_work(model_folder: Path, pets: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "results.json").write_text('[{"schema_version": 0}]')
    with pytest.raises(ValueError, match=r"results\.json holds results of schema version 0, this clipkit writes 1; move"):
        run(tmp_path / "out", "task=nowhere", model=model_folder)
    assert os.listdir(tmp_path / "out") == ["results.json"]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_a_file_name_that_is_no_text_is_shown_with_escapes(model_folder: Path, pets: Path, tmp_path: Path,
                                                           capsys: pytest.CaptureFixture[str]) -> None:
    os.rename(pets / "cat" / "0.png", os.fsencode(pets / "cat") + b"/caf\xe9.png")
    run(tmp_path / "out", f"task={pets}", model=model_folder)
    keys = pd.read_parquet(tmp_path / "out" / "predictions.parquet")["key"].tolist()
    assert "cat/caf\\udce9.png" in keys and len(set(keys)) == 7
    run(tmp_path / "again", f"task={pets}", model=model_folder)  # from the store
    assert pd.read_parquet(tmp_path / "again" / "predictions.parquet")["key"].tolist() == keys
    zero_shot(command_settings("zero-shot", ZeroShotConfig, f"model={model_folder}", f"images={pets / 'cat'}", "query=a cat",
                               f"out={tmp_path / 'found'}", f"cache_dir={tmp_path / 'cache'}"))
    assert "caf\\udce9.png" in (tmp_path / "found" / "matches.csv").read_text(encoding="utf-8")
    embed(command_settings("embed", EmbedConfig, f"model={model_folder}", f"data={pets}", f"out={tmp_path / 'embedded'}"))
    assert "cat/caf\\udce9.png" in pd.read_parquet(tmp_path / "embedded" / "samples.parquet")["key"].tolist()


def test_pictures_without_captions_or_labels_are_embedded_and_that_is_said(model_folder: Path, tmp_path: Path,
                                                                           capsys: pytest.CaptureFixture[str]) -> None:
    squares(tmp_path, {"flat": 3})
    embed(command_settings("embed", EmbedConfig, f"model={model_folder}", f"data={tmp_path / 'flat'}", f"out={tmp_path}"))
    assert "note      pictures alone, without captions or labels: " in capsys.readouterr().out
    assert np.load(tmp_path / "image_features.npy").shape == (3, TINY["embed_dim"])
    assert not (tmp_path / "text_features.npy").exists()
    with pytest.raises(FileNotFoundError, match="nowhere"):
        embed(command_settings("embed", EmbedConfig, f"model={model_folder}", "data=nowhere", f"out={tmp_path}"))
