"""CLIP beside a supervised classifier: who is asked what, what is counted, and the whole comparison on a small set."""

import json
import sys
from dataclasses import asdict

import pytest
import torch
import yaml
from scipy.stats import binomtest

from clipkit.data.emoji import shards as emoji_shards_module
from clipkit.data.emoji.pack import read_emoji_rows
from clipkit.data.loader import make_train_loader
from clipkit.data.samples import PictureExamples
from clipkit.evaluation import tasks
from clipkit.evaluation.encode import EncodedTask
from clipkit.evaluation.tasks import CLASSIFICATION, Task
from clipkit.evaluation.zero_shot import evaluate
from clipkit.model.folder import load_model, save_model_folder
from clipkit.training.random_state import seed_all
from scripts.supervised import __main__ as command
from scripts.supervised import few_labels, methods, training
from tests.conftest import settings

STEPS, BATCH = 12, 16
RUN = ("name=small", "device=cpu", "data.workers=0", "train.threads=1", f"train.global_batch_size={BATCH}",
       "schedule.warmup=2")


@pytest.fixture
def small_pack(monkeypatch, tmp_path):
    """16 training concepts with their drawings, and some of each test, in place of the embedded set."""
    rows = read_emoji_rows()
    known = {row.concept for row in rows if row.split == "val" and row.style == "noto"} & {
        row.concept for row in rows if row.split == "test_style"}
    known = set(sorted(known)[:16])
    unseen = set(sorted({row.concept for row in rows if row.split == "test_concept"})[:4])
    train = {row.concept for row in rows if row.split == "train"}
    strange = set(sorted({row.concept for row in rows if row.split == "test_style"} - train)[:3])
    few = [row for row in rows if row.concept in known | unseen | strange]
    for module in (emoji_shards_module, tasks, training):
        monkeypatch.setattr(module, "read_emoji_rows", lambda: few)
    monkeypatch.setattr(methods, "IMAGENET_PACKAGE", "a-package-that-nobody-has")
    monkeypatch.setattr(few_labels, "SHOTS", (1,))
    monkeypatch.setattr(few_labels, "NUM_DRAWS", 2)
    return few


def write_run(folder, tiny_model, *more: str, steps: int = STEPS, lr: float = 3e-3):
    """A run folder as pretrain leaves it, of a model that has learned nothing."""
    cache = f"data.cache_dir={folder.parent / 'cache'}"
    values = asdict(settings(*RUN, cache, f"train.samples={steps * BATCH}", f"optim.lr={lr}", *more, model="tiny"))
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(values))))
    save_model_folder(tiny_model, folder / "model")
    return folder


def test_a_classifier_is_asked_for_the_candidates_that_it_knows():
    scores = torch.tensor([[0.1, 0.9, 0.5], [0.3, 0.2, 0.8]])  # of ant, bee, cow
    asked = ["cow", "dog", "ant"]
    wanted = torch.tensor([[0.5, -torch.inf, 0.1], [0.8, -torch.inf, 0.3]])
    assert torch.equal(methods.among(scores, ["ant", "bee", "cow"], asked), wanted)


def test_shares_are_those_worked_out_by_hand():
    none = -torch.inf
    scores = torch.tensor([[0.9, 0.1, none, 0.2], [0.8, 0.7, none, 0.1], [0.1, 0.2, none, 0.9], [0.3, 0.4, none, 0.2],
                           [0.1, 0.2, none, 0.3]])
    labels = torch.tensor([0, 1, 2, 3, 3])
    everything = methods.right_share(scores, labels, torch.tensor([True] * 4))  # right: the first and the last
    assert everything is not None and everything[:2] == (0.4, 5)
    exact = binomtest(2, 5).proportion_ci(method="wilson")
    assert everything[2:] == pytest.approx((exact.low, exact.high))
    known = methods.right_share(scores, labels, torch.tensor([True, True, False, True]))  # without the third
    assert known is not None and known[:2] == (0.5, 4)
    without_first = methods.right_share(scores, labels, torch.tensor([False, True, False, True]))  # now the second is right
    assert without_first is not None and without_first[:2] == (pytest.approx(2 / 3), 3)
    assert methods.right_share(scores, labels, torch.tensor([False, False, True, False])) is None  # no answer, not wrong


def test_the_likeness_to_a_class_is_that_of_its_most_alike_picture():
    generator = torch.Generator().manual_seed(0)
    asked, known = torch.randn(5, 4, generator=generator), torch.randn(7, 4, generator=generator)
    labels = torch.tensor([0, 2, 2, 0, 3, 3, 3])
    found = methods.nearest(asked, known, labels, 4)
    for picture in range(5):
        for number in range(4):
            likenesses = [float(asked[picture] @ known[row]) for row in range(7) if labels[row] == number]
            assert found[picture, number] == pytest.approx(max(likenesses, default=-torch.inf))


def encoded(features, labels) -> EncodedTask:
    return EncodedTask(features, [], labels, [], [], None, features)  # pyright: ignore[reportArgumentType]


def test_few_labels_are_measured_on_the_pictures_that_were_not_labelled(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    names = {methods.TRAIN: 5, methods.VAL: 4, methods.CONCEPT: 3}
    sets = {name: Task(name, "", CLASSIFICATION, None, tuple(f"{name[:8]}{number}" for number in range(count)))  # pyright: ignore
            for name, count in names.items()}
    of_tower = {}
    for name, count in names.items():
        labels = torch.arange(count).repeat_interleave(4)
        of_tower[name] = encoded(torch.eye(6)[labels] + 0.01 * torch.randn(len(labels), 6, generator=generator), labels)
    by_text = torch.zeros(12, 3)
    by_text[:, 1] = 1  # always the second concept: right in a third of the others in every draw
    rows = few_labels.few_labels({"a tower": of_tower}, by_text, sets | {
        methods.VAL: Task("", "", CLASSIFICATION, None, sets[methods.TRAIN].classes[:4])})  # pyright: ignore
    assert [(row["method"], row["labels_per_concept"], row["n"]) for row in rows] == [
        (method, k, 12 - 3 * k) for k in (1, 2, 3) for method in (methods.BY_TEXT, "probe on a tower")]
    assert all(row["value"] == pytest.approx(1 / 3 if row["method"] == methods.BY_TEXT else 1) for row in rows)


def test_the_tower_starts_as_the_run_s_and_sees_its_pictures(small_pack, tmp_path, tiny_model):
    config = training.read_settings(write_run(tmp_path / "run", tiny_model, steps=2, lr=1e-12))
    seed_all(config.seed)
    start = training.make_model(config)
    found = training.train(config)
    after = found.model.towers.visual.state_dict()
    for name, tensor in start.towers.visual.state_dict().items():
        torch.testing.assert_close(after[name], tensor, atol=1e-9, rtol=0)  # two steps of 1e-12
    loader, plan = training.make_loader(config, start)
    theirs = make_train_loader(
        config.data, shards=[emoji_shards_module.emoji_shards("train", config.data.cache_dir)], lanes=plan.lanes,
        tokenize=start.tokenize, seed=config.seed,
        examples=PictureExamples(data=config.data, image_size=32, group_by="none"), global_batch_size=BATCH)
    assert plan.total_steps == 2 and torch.equal(next(loader).images, next(theirs).images)


@pytest.mark.slow
def test_the_whole_comparison_leaves_table_json_and_picture(small_pack, tmp_path, tiny_model, monkeypatch, capsys):
    run, out = write_run(tmp_path / "run", tiny_model), tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["supervised", f"--model={run}", f"--out={out}"])
    command.main()
    report = json.loads((out / "comparison.json").read_text())
    assert (out / "comparison.png").stat().st_size > 10_000
    assert report["supervised"]["steps"] == STEPS and report["supervised"]["samples"] == STEPS * BATCH
    values = {(row["method"], row["column"]): row for row in report["table"]}
    methods_found = {method for method, _ in values}
    assert methods_found == {"CLIP, by text", "supervised softmax", "probe on CLIP's tower", "nearest training picture"}
    names = (methods.VAL, methods.STYLE, methods.CONCEPT)
    for result in evaluate(load_model(run), names, cache_dir=tmp_path / "cache"):
        if (result.metric, result.prompts) == ("acc1", "ensemble"):
            row = values["CLIP, by text", result.task]
            assert (row["value"], row["n"], row["ci_low"]) == pytest.approx((result.value, result.n, result.ci_low))
    for method in methods_found - {"CLIP, by text"}:
        assert values[method, methods.CONCEPT]["value"] is None
        in_style, seen = values[method, methods.STYLE], values[method, methods.SEEN]
        assert in_style["n"] > seen["n"] == 16
        assert in_style["value"] * in_style["n"] == pytest.approx(seen["value"] * 16)  # never right about the others
    shown = capsys.readouterr().out
    assert "no answer" in shown and "pip install a-package-that-nobody-has" in shown

    monkeypatch.setattr(training, "train", None)  # is not called again
    again = training.trained_classifier(training.read_settings(run), out / "classifier.safetensors")
    assert again.facts == report["supervised"] and len(again.head.bias) == len(training.train_concepts())
    other = training.read_settings(write_run(tmp_path / "other", tiny_model, lr=1e-3))
    with pytest.raises(ValueError, match=r"safetensors was trained with other settings .*\(optim.lr\); give another --out"):
        training.trained_classifier(other, out / "classifier.safetensors")


def test_a_run_that_does_not_fit_is_answered_in_one_line(tmp_path, tiny_model, monkeypatch, capsys):
    with pytest.raises(FileNotFoundError, match=r"there is no .*config.yaml; give --model=<run folder>, or make .* pretrain"):
        training.read_settings(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"was trained on x.tar; the comparison is about .*: give a run with data.train=emoji"):
        training.read_settings(write_run(tmp_path / "shards", tiny_model, "data.train=x.tar", "train.epochs=null"))
    with pytest.raises(ValueError, match=r"has train.ema_decay or train.overfit_batches, which .*; give a run without"):
        training.read_settings(write_run(tmp_path / "average", tiny_model, "train.ema_decay=0.9"))
    monkeypatch.setattr(sys, "argv", ["supervised", f"--model={tmp_path / 'nothing'}"])
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert ended.value.code == 2 and capsys.readouterr().err.count("\n") == 1
