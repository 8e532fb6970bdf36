"""`clipkit diffusion evaluate`: its numbers against slow ways and scikit-learn, its files, and each bad input in one line."""

import csv
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from clipkit.commands.diffusion import evaluate as command
from clipkit.config.diffusion.evaluate import EvaluateConfig
from clipkit.config.schema import SettingsError
from clipkit.data.emoji.pack import read_emoji_rows
from clipkit.diffusion.conditioning import MapConditioning, load_text_conditioning
from clipkit.diffusion.judged_prompts import JudgedPrompts, common_concepts, judged_prompts
from clipkit.diffusion.judging import Pictures, copies, fit_styles, judge_samples, looks_real, make_judge, shuffled
from clipkit.diffusion.real_pictures import emoji_rows_of, open_pictures, places_of, trained_on
from clipkit.interop.export import export_text_encoder
from clipkit.model.build import build_model
from clipkit.model.folder import save_model_folder
from tests.conftest import TINY, command_settings
from tests.tiny_pipelines import make_pipeline

GENERATOR = torch.Generator()


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CLIPKIT_CACHE", str(tmp_path / "cache"))


def unit(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=GENERATOR.manual_seed(seed)), dim=-1)


PAIRS = JudgedPrompts("pairs", "label, style", ["a, x", "b, x", "a, y"], ["a", "b", "c"], [0, 1, 0], ["x", "x", "y"])


def pairs_judged(num=8, seed=0):
    """A judgement of random samples of PAIRS, and what it was made of."""
    styles = ["x", "y", None, "x", "y", "y", "x"] * 3
    training = Pictures(unit(21, 6, seed=1), torch.randn(21, 4, generator=GENERATOR.manual_seed(2)))
    prompts, classes = unit(3, 6, seed=3), unit(3, 6, seed=4)
    generated = Pictures(unit(num, 6, seed=5), torch.randn(num, 4, generator=GENERATOR.manual_seed(6)))
    judge = make_judge(PAIRS, "test", prompts, classes, training=training, training_styles=styles)
    prompt_of = torch.arange(num) % 3
    return judge_samples(judge, generated, prompt_of, training=training, held_out=generated), generated, training, styles


def test_every_accuracy_is_the_share_that_a_slow_loop_counts():
    found, generated, training, _ = pairs_judged()
    judge = found.judge

    def accuracies(pictures, wanted):
        hits = Counter()
        for features, style_features, prompt in zip(*pictures, wanted, strict=True):
            concept = max(range(3), key=lambda one: float(features @ judge.class_features[one]))
            style = judge.styles.names[int(judge.styles(style_features[None]))]
            hits["prompt_acc1"] += max(range(3), key=lambda one: float(features @ judge.prompt_features[one])) == int(prompt)
            hits["concept_acc1"] += concept == PAIRS.class_of[prompt]
            hits["style_acc1"] += style == PAIRS.styles[prompt]
            hits["both_acc1"] += concept == PAIRS.class_of[prompt] and style == PAIRS.styles[prompt]
        return {name: hits[name] / len(wanted) for name in ("prompt_acc1", "concept_acc1", "style_acc1", "both_acc1")}

    nearest = [int((training.features @ prompt).argmax()) for prompt in judge.prompt_features]
    for whose, pictures, prompt_of in (("samples", generated, found.prompt_of),
                                       ("shuffled prompts", generated, shuffled(found.prompt_of)),
                                       ("nearest training picture", training.rows(torch.tensor(nearest)), torch.arange(3))):
        wanted_values = accuracies(pictures, prompt_of)
        measures = found.measures[whose]
        assert {name: measures[name].value for name in wanted_values} == pytest.approx(wanted_values)
        assert all(measures[name].ci_low <= measures[name].value <= measures[name].ci_high for name in wanted_values)
    assert found.guess.tolist() == (generated.features @ judge.class_features.T).argmax(dim=1).tolist()
    assert sorted(shuffled(found.prompt_of).tolist()) == sorted(found.prompt_of.tolist())


def test_styles_are_told_as_scikit_learn_s_discriminant_analysis_tells_them():
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    names = ["x", "y", "z"]
    labels = np.arange(300) % 3
    features = torch.randn(300, 5, generator=GENERATOR.manual_seed(0)) * torch.tensor([5.0, 1, 1, 1, 0.1])
    features[:, 4] += 0.1 * torch.from_numpy(labels)  # what tells them apart varies least
    ours = fit_styles(features, [names[label] for label in labels], names)
    theirs = LinearDiscriminantAnalysis(priors=[1 / 3] * 3).fit(features.double().numpy(), labels)
    new = torch.randn(500, 5, generator=GENERATOR.manual_seed(1)) * torch.tensor([5.0, 1, 1, 1, 0.2])
    agreement = (ours(new).numpy() == theirs.predict(new.double().numpy())).mean()
    assert agreement > 0.97  # the ridge moves the borders a little
    plain = torch.stack([features[labels == one].mean(dim=0) for one in range(3)])
    by_distance = (torch.cdist(features, plain).argmin(dim=1).numpy() == labels).mean()
    assert (ours(features).numpy() == labels).mean() > by_distance + 0.1


def test_copies_are_samples_nearer_to_training_pictures_than_real_ones_are():
    training, held_out = unit(50, 8, seed=0), unit(200, 8, seed=1)
    generated = torch.cat([training[:3], unit(3, 8, seed=2) * -1])
    found = copies(generated, training, held_out, scored_by="test")
    assert found.nearest[:3].tolist() == [0, 1, 2]
    torch.testing.assert_close(found.cosine, (generated @ training.T).amax(dim=1))
    limit = np.quantile((held_out @ training.T).amax(dim=1).numpy(), 0.99)
    assert found.measures["copied"].value == np.mean(found.cosine.numpy() > limit) >= 0.5
    assert found.real_measures["training_cosine"].value == pytest.approx((held_out @ training.T).amax(dim=1).mean().item())
    assert set(copies(generated, training, None, scored_by="test").measures) == {"training_cosine"}


def test_distances_are_told_by_kernels_and_fid_waits_for_enough_pictures(monkeypatch):
    real, generated = unit(12, 6, seed=0), unit(9, 6, seed=1)
    found = looks_real(real, generated, scored_by="test")
    assert set(found) == {"kid", "cmmd"}

    def mean_kernel(rows, columns):  # of features with norm sqrt(D), their products divided by D
        return np.mean([(float(a @ b) + 1) ** 3 for i, a in enumerate(rows) for j, b in enumerate(columns)
                        if rows is not columns or i != j])

    wanted = mean_kernel(real, real) + mean_kernel(generated, generated) - 2 * mean_kernel(real, generated)
    assert found["kid"].value == pytest.approx(wanted, abs=1e-5)
    monkeypatch.setattr("clipkit.diffusion.judging.MIN_FID_SAMPLES", 9)
    monkeypatch.setattr("clipkit.diffusion.metrics.MIN_FID_SAMPLES", 9)
    assert set(looks_real(real, generated, scored_by="test")) == {"kid", "cmmd", "fid"}


def test_the_common_concepts_are_drawn_in_every_train_style_and_always_the_same():
    rows = read_emoji_rows()
    chosen = common_concepts(rows)
    styles = {row.style for row in rows if row.split == "train"}
    for one in chosen:
        assert {row.style for row in rows if row.split == "train" and row.concept == one.concept} == styles
    assert len({row.concept for row in chosen}) == 100 and chosen == common_concepts(list(reversed(rows)))
    task = judged_prompts(["emoji_common"])
    assert task.prompts == task.classes == [row.label for row in chosen] and len(set(task.prompts)) == 100
    assert len({row.group for row in chosen}) > 5  # of all groups


def test_the_held_out_pairs_are_those_of_val_and_none_of_them_is_in_train():
    task, rows = judged_prompts(["emoji_val"]), read_emoji_rows()
    val = [row for row in rows if row.split == "val"]
    assert len(task.prompts) == len(val) == 338 and len(task.classes) == 302
    train = {(row.label, row.style) for row in rows if row.split == "train"}
    pairs = list(zip([task.classes[one] for one in task.class_of], task.styles, strict=True))
    assert pairs == [(row.label, row.style) for row in val] and not train & set(pairs)
    assert {label for label, _ in pairs} <= {label for label, _ in train}
    place = [row.style for row in val].index("noto-v1")
    assert task.prompts[place] == f"{val[place].label}, noto blob style"
    found = emoji_rows_of([f"emoji-val-000.tar/{key}" for key in task.real_keys])
    assert [row.label for row in found] == [row.label for row in val]
    assert emoji_rows_of(["00000.png", "a.tar/noto-0001"]) == [None, None]


def test_real_pictures_are_shards_or_a_folder(shards, tmp_path):
    assert open_pictures([shards]).images.count() == 128
    assert open_pictures([str(Path(shards).parent)]).images.count() == 128
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "photos" / "a.png")
    assert open_pictures(["photos"]).images.count() == 1
    with pytest.raises(ValueError, match="of which photos is a folder of pictures; give that alone"):
        open_pictures([shards, "photos"])
    (tmp_path / "config.yaml").write_text("data: {train: [emoji]}")
    assert trained_on(str(tmp_path)) == ("emoji",)
    with pytest.raises(ValueError, match="real is empty, and photos is no run that says what it was trained on; give"):
        trained_on("photos")
    assert places_of(["b", "a"], ["x/a", "x/b"]) == [1, 0] and places_of(["c"], ["x/a"]) is None


def run(model, **more):
    chosen = {"model": model, "steps": 2, "device": "cpu", "prompts": "[a red square,a green square,a blue square]",
              "n_samples": 7, **more}
    arguments = [f"{key}={value}" for key, value in chosen.items() if value is not None]
    command.evaluate(command_settings("diffusion/evaluate", EvaluateConfig, *arguments))


def test_an_evaluation_leaves_samples_results_and_a_report_and_uses_samples_again(folders, shards, capsys):
    torch.manual_seed(1)
    save_model_folder(build_model(config=TINY), Path("scorer/model"))
    run(folders["v"], scored_by="scorer", real=shards, held_out=shards, out="out")
    shown = capsys.readouterr().out
    for word in ("clipkit diffusion evaluate: ", "7 of 3 prompts", "prompt_acc1", "nearest training picture",
                 "written   out/results.csv"):
        assert word in shown, word
    samples = next(Path("out").glob("prompts-*"))
    assert len(list(samples.glob("[0-9]*.png"))) == 7 and (samples / "sheet.png").is_file()
    with Path("out/results.csv").open() as file:
        rows = {row["metric"]: row for row in csv.DictReader(file)}
    assert {"prompt_acc1", "clip_score", "kid", "cmmd", "training_cosine", "copied", "shuffled_prompt_acc1",
            "retrieved_prompt_acc1", "real_kid", "real_training_cosine"} <= set(rows)
    assert (rows["prompt_acc1"]["n"], rows["prompt_acc1"]["num_classes"], rows["kid"]["kind"]) == ("7", "3", "text_to_image")
    assert float(rows["real_training_cosine"]["value"]) == pytest.approx(1)  # here the held-out pictures are the training's
    assert rows["kid"]["prompts"] == "given; ddim 2 steps, guidance 3, seed 0" and "scored by scorer " in rows["kid"]["split"]
    assert len(json.loads(Path("out/results.json").read_text())) == len(rows)
    report = (samples / "report.html").read_text()
    assert "a green square" in report and report.count("<img") == 14 and "is not known" in report
    before = {path: path.stat().st_mtime_ns for path in samples.glob("[0-9]*.png")}
    run(folders["v"], scored_by="scorer", real=shards, held_out=shards, out="out")
    assert {path: path.stat().st_mtime_ns for path in samples.glob("[0-9]*.png")} == before
    assert "conditioned by" not in capsys.readouterr().out  # the model was not even loaded
    with Path("out/results.csv").open() as file:
        assert list(csv.DictReader(file)) == list(rows.values())


def test_a_clip_does_not_judge_itself_unless_told_to(shards, tmp_path, capsys):
    torch.manual_seed(0)
    save_model_folder(build_model(config=TINY), Path("clip/model"))
    exported = export_text_encoder("clip", tmp_path / "te")
    folder = make_pipeline(tmp_path / "pipeline", load_text_conditioning(str(exported)))
    with pytest.raises(ValueError, match=r"scored_by is clip, the CLIP that conditions .*: it would judge itself"):
        run(folder, scored_by="clip", real=shards)
    assert not Path("evaluation").exists()
    run(folder, scored_by="clip", real=shards, same_scorer="true", n_samples=3)
    assert "it judges itself" in capsys.readouterr().out and Path("evaluation/results.csv").is_file()


def test_settings_that_do_not_fit_are_answered_in_one_line(folders, shards, tmp_path):
    with pytest.raises(SettingsError, match="scored_by is empty; give a CLIP other than the one"):
        run(folders["v"])
    with pytest.raises(SettingsError, match="prompts is empty; give emoji_common"):
        run(folders["v"], scored_by="scorer", prompts="[]")
    with pytest.raises(ValueError, match=r"prompts has one text \('a cat'\)"):
        run(folders["v"], scored_by="scorer", prompts="a cat")
    with pytest.raises(ValueError, match=r"real is empty, and .* is no run"):
        run(folders["v"], scored_by="scorer")
    save_model_folder(build_model(config=TINY), Path("scorer/model"))
    pictures = make_pipeline(tmp_path / "pipeline", MapConditioning("semantic_map", side=8))
    with pytest.raises(ValueError, match=r"makes pictures from pictures \(semantic_map\)"):
        run(pictures, scored_by="scorer", real=shards)
    two = Pictures(unit(2, 6), unit(2, 6))
    with pytest.raises(ValueError, match=r"asks for the style 'y', and no picture of real=\.\.\. is known to have it; give"):
        make_judge(PAIRS, "test", unit(3, 6), unit(3, 6), training=two, training_styles=["x", None])
