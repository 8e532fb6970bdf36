"""What `clipkit zero-shot` leaves beside single numbers: templates, the choice of lambda, draws, and classes, each as CSV."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from clipkit.commands.zero_shot import zero_shot
from clipkit.config.zero_shot import ZeroShotConfig
from clipkit.model.folder import save_model_folder
from tests.conftest import command_settings
from tests.test_report import Page

COLOURS = {"black": (5, 5, 5), "green": (30, 180, 40), "red": (220, 30, 30)}


@pytest.fixture
def measured(tiny_model, tmp_path: Path):
    """Run the command on squares of three colours, 6 of each in train and 5 in test; returns the folder of results."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 6), ("test", 5)):
        for name, colour in COLOURS.items():
            (tmp_path / "set" / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = np.clip(np.array(colour) + rng.integers(-60, 60, (16, 16, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(tmp_path / "set" / split / name / f"{number}.png")
    save_model_folder(tiny_model, tmp_path / "model")

    def run(*arguments: str) -> Path:
        places = {"model": "model", "cache_dir": "cache", "out": "out"}
        zero_shot(command_settings("zero-shot", ZeroShotConfig,
                                   *(f"{key}={tmp_path / place}" for key, place in places.items()), *arguments))
        return tmp_path / "out"

    return run


def test_templates_and_probes_leave_tables_that_agree_with_the_results(measured, tmp_path: Path, capsys) -> None:
    out = measured(f"task={tmp_path / 'set'}", "kind=[zeroshot_classification,linear_probe,few_shot]", "shots=[1,2]",
                   "templates=[a {} square, {}, no {}, plain]", "template_effects=true", "features=[projected,trunk]")
    results = pd.read_csv(out / "results.csv")
    whole = results[(results["metric"] == "acc1") & (results["prompts"] == "3 templates given")]["value"].item()
    plain = results[(results["metric"] == "acc1") & (results["prompts"] == "plain")]["value"].item()
    templates = pd.read_csv(out / "templates.csv").set_index("template")
    assert set(templates.index) == {"a {} square", "{}", "no {}"} and (templates["acc1_whole"] == whole).all()
    assert templates.loc["{}", "acc1_alone"] == plain
    assert "'plain' of" in capsys.readouterr().out  # a single text has no effect that could be told from the whole
    lambdas = pd.read_csv(out / "lambdas.csv")
    chosen = lambdas[lambdas["chosen"]].set_index("prompts")["regularisation"]
    told = results[results["metric"] == "lp_lambda"].set_index("prompts")["value"]
    pd.testing.assert_series_equal(chosen, told, check_names=False)
    best = lambdas.groupby("prompts")["validation_accuracy"].max()
    assert (lambdas[lambdas["chosen"]].set_index("prompts")["validation_accuracy"] == best).all()
    draws = pd.read_csv(out / "draws.csv")
    means = draws.groupby("shots")["accuracy"].mean()
    assert {k: results[results["metric"] == f"fewshot_k{k}_acc1"]["value"].item() for k in (1, 2)} == pytest.approx(dict(means))
    text = Page((out / "report.html").read_text()).text
    for title in ("What each template does", "The choice of lambda", "labelled pictures a class"):
        assert title in text


def test_nearest_pictures_and_tip_adapter_leave_what_was_chosen(measured, tmp_path: Path) -> None:
    out = measured(f"task={tmp_path / 'set'}", "kind=[few_shot,tip_adapter,knn]", "shots=[1,2]", "seeds=2",
                   "templates=[a {} square, plain]", "features=[projected,trunk]")
    results = pd.read_csv(out / "results.csv").set_index(["kind", "prompts", "metric"])["value"]
    neighbours = pd.read_csv(out / "neighbours.csv")
    chosen = neighbours[neighbours["chosen"]].set_index("prompts")
    best = neighbours.groupby("prompts")["validation_accuracy"].max()
    predictions = pd.read_parquet(out / "predictions.parquet")
    for rule in ("projected features", "trunk features"):
        assert chosen.loc[rule, "neighbours"] == results["knn", rule, "knn_k"]
        assert chosen.loc[rule, "temperature"] == results["knn", rule, "knn_temperature"]
        assert chosen.loc[rule, "validation_accuracy"] == best[rule]
        right = predictions.loc[predictions["prompts"] == rule, "rank"] == 0
        assert right.mean() == results["knn", rule, "knn_acc1"] > 1 / 3
    draws = pd.read_csv(out / "draws.csv")
    for rule in ("a {} square", "plain"):
        of_rule = draws[(draws["kind"] == "tip_adapter") & (draws["prompts"] == rule)]
        means = of_rule.groupby("shots")["accuracy"].mean()
        assert {k: results["tip_adapter", rule, f"tip_adapter_k{k}_acc1"] for k in (1, 2)} == pytest.approx(dict(means))
        assert of_rule[["alpha", "beta"]].notna().all(axis=None) and 0 <= results["tip_adapter", rule, "zeroshot_acc1"] <= 1
    text = Page((out / "report.html").read_text()).text
    for title in ("The choice of k", "Nearest pictures", "Tip-Adapter", "in the cache; texts alone are right for"):
        assert title in text


def test_a_multi_label_task_leaves_its_classes(measured, tmp_path: Path, capsys) -> None:
    rows = [["image", "label"]]
    for name in COLOURS:
        rows += [[f"set/test/{name}/{number}.png", name] for number in range(5)]
    rows += [["set/test/red/0.png", "black"]]
    (tmp_path / "t.csv").write_text("\n".join(",".join(row) for row in rows))
    from clipkit.evaluation.outcome import join
    from clipkit.evaluation.tasks import load_task
    from clipkit.evaluation.zero_shot import measure
    from clipkit.model.folder import load_model

    measured(f"task={tmp_path / 'set'}", "kind=linear_probe", "template_effects=true", "report=false")
    assert "template_effects is about zeroshot_classification" in capsys.readouterr().out
    task = load_task(str(tmp_path / "t.csv"), templates="plain", kind="zeroshot_multilabel")
    found = join([measure(load_model(tmp_path / "model"), task)])
    table, mean = found.tables["classes"], found.results[0]
    assert table["num_positive"].tolist() == [6, 5, 5] and table["class"].tolist() == list(COLOURS)
    assert mean.value == pytest.approx(table["average_precision"].mean())
    assert torch.tensor(table["auroc"]).mean().item() == pytest.approx(
        next(one.value for one in found.results if one.metric == "macro_auroc"))


def test_tables_are_of_the_last_call(measured, tmp_path: Path) -> None:
    call = (f"task={tmp_path / 'set'}", "templates=[a {}, no {}]", "report=false")
    assert (measured(*call, "template_effects=true") / "templates.csv").is_file()
    assert not (measured(*call) / "templates.csv").exists()
