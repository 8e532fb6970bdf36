"""`clipkit zero-shot`, `clipkit compare` and `clipkit embed`, from the command line's settings to the files they leave."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.metrics import accuracy_score, balanced_accuracy_score, log_loss, top_k_accuracy_score

from clipkit.commands.compare import compare
from clipkit.commands.embed import embed
from clipkit.commands.zero_shot import zero_shot
from clipkit.config.schema import SettingsError
from clipkit.config.zero_shot import CompareConfig, EmbedConfig, ZeroShotConfig
from clipkit.model.folder import load_model, save_model_folder
from tests.conftest import TINY, command_settings

COLOURS = {"red": (220, 30, 30), "green": (30, 180, 40), "blue": (30, 40, 220), "yellow": (230, 220, 40),
           "white": (250, 250, 250), "black": (5, 5, 5)}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from clipkit.model.build import build_model

    torch.manual_seed(3)
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_model_folder(build_model(config=TINY), folder)
    return folder


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of class folders: noisy squares, 8 of each colour in test and 6 in train."""
    root, rng = tmp_path_factory.mktemp("squares"), np.random.default_rng(0)
    for split, num in (("train", 6), ("test", 8)):
        for name, colour in COLOURS.items():
            (root / split / name).mkdir(parents=True)
            for number in range(num):
                noise = rng.integers(-60, 60, (20, 20, 3))
                pixels = np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{number}.png")
    return root


@pytest.fixture
def cache(tmp_path: Path) -> str:
    return f"cache_dir={tmp_path / 'cache'}"


def run(*arguments: str) -> None:
    zero_shot(command_settings("zero-shot", ZeroShotConfig, *arguments))


def scores_of(model_folder: Path, labelled: Path, templates: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """The slow obvious way: (48,) labels and (48, 6) cosines, one picture and one text at a time."""
    model = load_model(model_folder)
    weights = []
    with torch.no_grad():
        for name in sorted(COLOURS):
            texts = [model.encode_text(model.tokenize([text.replace("{}", name)]))[0] for text in templates]
            mean = torch.stack(texts).mean(dim=0)
            weights.append(mean / mean.norm())
        files = sorted((labelled / "test").glob("*/*.png"))
        images = [model.encode_image(model.preprocess(Image.open(file).convert("RGB"))[None])[0] for file in files]
    labels = np.array([sorted(COLOURS).index(file.parent.name) for file in files])
    return labels, (torch.stack(images) @ torch.stack(weights).T).numpy()


def test_every_number_of_a_labelled_folder_is_scikit_learns(model_folder: Path, labelled: Path, cache: str,
                                                            tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    run(f"model={model_folder}", f"task={labelled}", "templates=[a {} square, {}]", f"out={out}", cache)
    labels, scores = scores_of(model_folder, labelled, ["a {} square", "{}"])
    rows = {row["metric"]: row for row in json.loads((out / "results.json").read_text())}
    value = {metric: row["value"] for metric, row in rows.items()}
    guesses = scores.argmax(axis=1)
    logit_scale = load_model(model_folder).towers.logit_scale.exp().item()
    assert value["acc1"] == accuracy_score(labels, guesses)
    assert value["acc5"] == top_k_accuracy_score(labels, scores, k=5)
    assert value["mean_per_class_recall"] == pytest.approx(balanced_accuracy_score(labels, guesses), abs=1e-12)
    assert value["mean_per_class_recall"] == pytest.approx(value["acc1"], abs=1e-12)  # the set is balanced
    logits = torch.tensor(scores, dtype=torch.float64)
    assert value["nll"] == pytest.approx(log_loss(labels, (logits * logit_scale).softmax(dim=1).numpy()), rel=1e-4)
    assert value["nll_100"] == pytest.approx(F.cross_entropy(100 * logits, torch.tensor(labels)).item(), rel=1e-4)
    assert all(row["ci_low"] <= row["value"] <= row["ci_high"] for row in rows.values())
    assert {row["n"] for row in rows.values()} == {48}
    predictions = pd.read_parquet(out / "predictions.parquet")
    assert predictions["guess"].tolist() == guesses.tolist()
    assert (predictions["rank"] == 0).mean() == value["acc1"]
    assert predictions["key"].is_unique
    with (out / "results.csv").open() as file:
        assert [row["metric"] for row in csv.DictReader(file)] == list(rows)
    assert "<html" in (out / "report.html").read_text()
    assert "acc1" in capsys.readouterr().out


def test_a_second_call_and_one_without_the_store_give_the_same_files(model_folder: Path, labelled: Path, cache: str,
                                                                     tmp_path: Path) -> None:
    common = (f"model={model_folder}", f"task={labelled}", "templates=plain", "report=false", cache)
    run(*common, f"out={tmp_path / 'first'}")
    run(*common, f"out={tmp_path / 'second'}")
    run(*common, f"out={tmp_path / 'fresh'}", "store=false", "workers=1")
    texts = [(tmp_path / folder / "results.csv").read_text() for folder in ("first", "second", "fresh")]
    assert texts[0] == texts[1] == texts[2]


def test_probes_learn_from_the_train_split(model_folder: Path, labelled: Path, cache: str, tmp_path: Path) -> None:
    run(f"model={model_folder}", f"task={labelled}", "kind=[linear_probe,few_shot]", "shots=[1,4]", "templates=plain",
        f"out={tmp_path}", "report=false", cache)
    value = {row["metric"]: row["value"] for row in json.loads((tmp_path / "results.json").read_text())}
    assert set(value) == {"lp_acc1", "lp_acc5", "lp_mean_per_class_recall", "lp_lambda", "fewshot_k1_acc1", "fewshot_k4_acc1"}
    assert value["lp_acc1"] > 0.5  # colours are told apart even by random towers
    predictions = pd.read_parquet(tmp_path / "predictions.parquet")
    assert (predictions["rank"] == 0).mean() == value["lp_acc1"]


def test_classes_without_a_picture_and_with_too_few_are_told(model_folder: Path, labelled: Path, cache: str, tmp_path: Path,
                                                             capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(labelled, tmp_path / "set")
    (tmp_path / "set" / "test" / "pink").mkdir()
    common = (f"model={model_folder}", f"task={tmp_path / 'set'}", "templates=plain", f"out={tmp_path / 'out'}", "report=false")
    run(*common, cache)
    assert "1 of 7 classes" in capsys.readouterr().out
    for number in (0, 1, 2):
        (tmp_path / "set" / "train" / "red" / f"{number}.png").unlink()
    run(*common, cache, "kind=few_shot", "shots=[4]", "seeds=2")
    assert "2 of 7 classes of" in capsys.readouterr().out


def test_one_s_own_pictures_get_names_or_are_found(model_folder: Path, labelled: Path, cache: str, tmp_path: Path) -> None:
    common = (f"model={model_folder}", f"images={labelled / 'test'}", cache)
    run(*common, "classes=[red,blue]", "templates=plain", f"out={tmp_path / 'named'}")
    with (tmp_path / "named" / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 48
    assert all(float(row["probability_1"]) >= float(row["probability_2"]) for row in rows)
    with Image.open(tmp_path / "named" / "predictions.png") as sheet:
        assert sheet.width > 100
    run(*common, "query=something red, and 'quoted'", "top=3", f"out={tmp_path / 'found'}")
    with (tmp_path / "found" / "matches.csv").open() as file:
        found = list(csv.DictReader(file))
    model = load_model(model_folder)
    with torch.no_grad():
        text = model.encode_text(model.tokenize(["something red, and 'quoted'"]))[0]
        files = sorted((labelled / "test").glob("*/*.png"))
        scores = [float(model.encode_image(model.preprocess(Image.open(file).convert("RGB"))[None])[0] @ text)
                  for file in files]
    wanted = [str(files[index].relative_to(labelled / "test")) for index in np.argsort(scores)[::-1][:3]]
    assert [row["file"] for row in found] == wanted


def test_two_models_are_measured_and_compared(model_folder: Path, labelled: Path, cache: str, tmp_path: Path,
                                              capsys: pytest.CaptureFixture[str]) -> None:
    from clipkit.model.build import build_model

    torch.manual_seed(4)
    save_model_folder(build_model(config=TINY), tmp_path / "other")
    run(f"model=[{model_folder},{tmp_path / 'other'}]", f"task={labelled}", "templates=plain", f"out={tmp_path / 'out'}",
        "report=false", cache)
    assert "other against tiny" in capsys.readouterr().out
    table = tmp_path / "table.csv"
    compare(command_settings("compare", CompareConfig, f"a={tmp_path / 'out' / 'tiny'}", f"b={tmp_path / 'out' / 'other'}",
                             f"out={table}"))
    row = pd.read_csv(table).iloc[0]
    a, b = (pd.read_parquet(tmp_path / "out" / name / "predictions.parquet")["rank"] == 0 for name in ("tiny", "other"))
    assert row["difference"] == pytest.approx(b.mean() - a.mean())
    assert row["only_b"] == (b & ~a).sum()


def test_embeddings_are_the_models(model_folder: Path, shards: str, tmp_path: Path) -> None:
    embed(command_settings("embed", EmbedConfig, f"model={model_folder}", f"data={shards}", f"out={tmp_path}"))
    images, texts = np.load(tmp_path / "image_features.npy"), np.load(tmp_path / "text_features.npy")
    assert images.shape == texts.shape == (128, TINY["embed_dim"])
    captions = pd.read_parquet(tmp_path / "captions.parquet")["caption"]
    model = load_model(model_folder)
    with torch.no_grad():
        wanted = model.encode_text(model.tokenize([captions[7]]))[0].numpy()
    np.testing.assert_allclose(texts[7], wanted, atol=1e-6)  # fp32, other batch
    assert np.allclose(np.linalg.norm(images, axis=1), 1, atol=1e-5)


@pytest.mark.parametrize(("arguments", "message"), [
    (("classes=[cat,dog]",), "give images=<folder>"),
    (("images=photos",), "needs either classes"),
    (("images=photos", "query=x", "classes=[a,b]"), "needs either classes"),
    (("images=photos", "query=x", "task=emoji_val"), "give one of them"),
    (("images=photos", "query=x", "model=[a,b]"), "takes one model"),
    (("kind=captioning",), "choose one of"),
])
def test_settings_that_do_not_go_together_are_refused(arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        command_settings("zero-shot", ZeroShotConfig, *arguments)


def test_what_is_not_there_is_told_in_one_line(model_folder: Path, labelled: Path, cache: str, tmp_path: Path) -> None:
    shutil.copytree(labelled / "test", tmp_path / "no_train")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        run(f"model={model_folder}", "task=nowhere", cache)
    with pytest.raises(ValueError, match="no labelled train split"):
        run(f"model={model_folder}", f"task={tmp_path / 'no_train'}", "kind=linear_probe", cache, f"out={tmp_path}")
    with pytest.raises(ValueError, match="made for"):
        run(f"model={model_folder}", f"task={labelled}", "kind=zeroshot_retrieval", cache, f"out={tmp_path}")
    with pytest.raises(ValueError, match="several models are called tiny"):
        run(f"model=[{model_folder},{model_folder}]", f"task={labelled}", cache)
    with pytest.raises(FileNotFoundError, match="clipkit zero-shot model="):
        compare(CompareConfig(a=str(tmp_path), b=str(tmp_path), out=None))
    with pytest.raises(SettingsError, match="a and b are needed"):
        command_settings("compare", CompareConfig)
    with pytest.raises(SettingsError, match="data and out are needed"):
        command_settings("embed", EmbedConfig)
