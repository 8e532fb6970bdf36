"""The report's parts on probes, several right classes and templates, and the figures they are drawn with."""

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from clipkit.evaluation.report_figures import Curve, curves_figure, difference_bar
from clipkit.evaluation.tasks import MULTI_LABEL
from tests.test_report import AWKWARD, Page, classification, report, result

TASK = "sets/my <task>"


def probe_results(**changes) -> list:
    return [result(value=0.5, prompts="label"),
            result(kind="linear_probe", metric="lp_acc1", value=0.62, prompts="projected features", **changes)]


def lambdas() -> pd.DataFrame:
    frames = []
    for rule, best in (("projected features", 2), ("trunk features", 4)):
        frames.append(pd.DataFrame({"task": TASK, "kind": "linear_probe", "prompts": rule,
                                    "regularisation": np.logspace(-6, 6, 7),
                                    "validation_accuracy": [0.1, 0.3, 0.61, 0.5, 0.6, 0.2, 0.1], "num_validation": 41,
                                    "chosen": [place == best for place in range(7)]}))
    return pd.concat(frames, ignore_index=True)


def draws(accuracies: dict[int, list[float]]) -> pd.DataFrame:
    return pd.DataFrame([{"task": TASK, "kind": "few_shot", "prompts": "2 draws", "shots": k, "draw": draw, "accuracy": value,
                          "regularisation": 1.0} for k, values in accuracies.items() for draw, value in enumerate(values)])


def few_shot_results(values: dict[int, float]) -> list:
    return [result(kind="few_shot", metric=f"fewshot_k{k}_acc1", value=value, ci_low=value - 0.1, ci_high=value + 0.1,
                   prompts="2 draws") for k, value in values.items()]


def classes() -> pd.DataFrame:
    return pd.DataFrame({"task": TASK, "kind": MULTI_LABEL, "prompts": "openai80", "class": AWKWARD,
                         "num_positive": [5, 40, 0, 7, 8, 9, 300], "average_precision": [0.25, 0.5, np.nan, 0.1, 0.9, 0.75, 1],
                         "auroc": [0.6, 0.7, np.nan, 0.8, 0.95, 0.9, np.nan]})


def templates(number: int) -> pd.DataFrame:
    effect = np.linspace(-0.05, 0.05, number)
    columns = {"task": TASK, "kind": "zeroshot_classification", "prompts": "openai80",
               "template": [f"<template {place}> {{}}" for place in range(number)], "n": 300, "acc1_whole": 0.6,
               "acc1_alone": 0.5, "alone_ci_low": 0.4, "alone_ci_high": 0.6, "acc1_without": 0.6 + effect}
    for which, middle in (("alone", effect * 0 - 0.1), ("without", effect)):
        columns |= {f"{which}_difference": middle, f"{which}_difference_ci_low": middle - 0.01,
                    f"{which}_difference_ci_high": middle + 0.01}
    return pd.DataFrame(columns)


def test_a_linear_probe_shows_its_choice_of_lambda_and_what_it_confuses(tmp_path: Path) -> None:
    frame = classification(kind="linear_probe", prompts="projected features")
    frame = frame.drop(columns=["probability_100", "nll", "nll_100"])
    results = [*probe_results(), result(kind="linear_probe", metric="lp_acc1", value=0.58, prompts="trunk features")]
    _, page = report(tmp_path, results=results, predictions=frame, tables={"lambdas": lambdas()})
    right = int((frame["guess"] == frame["label"]).sum())
    for shown in (f"right for {right} of 300 pictures", "without a label, give 50.0%", "41 validation pictures", "0.01",
                  "61.0%", "100", "62.0%", "58.0%", "Worst confusions", "10⁻⁶", "projected features", "taken for"):
        assert shown in page.text
    assert len(page.all("polyline")) == 2 and len(page.all("circle", r="5.5")) == 2
    assert "nan" not in page.text.lower().replace("naïve", "")


def test_few_shot_says_how_many_labelled_pictures_the_texts_are_worth(tmp_path: Path) -> None:
    values = {1: 0.3, 4: 0.45, 16: 0.55}
    tables = {"draws": draws({k: [value - 0.02, value + 0.02] for k, value in values.items()})}
    results = [*probe_results(), *few_shot_results(values)]
    text, page = report(tmp_path, results=results, predictions=pd.DataFrame(), tables=tables)
    assert ("Texts alone (\u201clabel\u201d) are right for 50.0%, no less than a classifier that has learned from 4 pictures "
            "a class (45.0%), less than one that has learned from 16 pictures a class (55.0%).") in page.text
    assert "2 draws of them" in page.text and "zero-shot" in page.text and "linear probe, all labels" in page.text
    assert len(page.all("circle")) == 3 + 6 and text.count('class="whisker"') == 3


def test_few_shot_stands_without_anything_to_compare_with(tmp_path: Path) -> None:
    _, page = report(tmp_path, results=few_shot_results({2: 0.4}), predictions=pd.DataFrame(),
                     tables={"draws": draws({2: [0.4]}), "another": pd.DataFrame({"x": [1]})})
    assert "With 2 labelled pictures a class, 40.0% are right." in page.text and not page.all("line", **{"class": "diagonal"})


def test_classes_of_a_multi_label_task_stand_from_low_to_high(tmp_path: Path) -> None:
    metrics = {"mean_average_precision": 0.583, "macro_auroc": 0.79, "micro_auroc": 0.81}
    results = [result(kind=MULTI_LABEL, metric=metric, value=value, ci_low=0.5, ci_high=0.65)
               for metric, value in metrics.items()]
    text, page = report(tmp_path, results=results, predictions=pd.DataFrame(), tables={"classes": classes()})
    assert ("mean average precision over 6 classes is 58.3% (95% interval 50.0% to 65.0%, 300 pictures). The area under the "
            "ROC curve is 79.0% on average over classes, 81.0% over all pairs") in page.text
    assert "1 class has no picture and no part in the mean: שלום עולם" in page.text
    places = [text.index(f"{value} <small>n ") for value in ("10.0%", "25.0%", "50.0%", "75.0%", "90.0%", "100.0%")]
    assert places == sorted(places)
    assert text.count("<u style=") == 5  # a class that all pictures belong to has no AUROC


def test_templates_stand_by_what_the_whole_loses_without_them(tmp_path: Path) -> None:
    text, page = report(tmp_path, tables={"templates": templates(25)})
    assert "all 25, openai80" in page.text and "5 templates between; all of them are in templates.csv" in page.text
    assert "-5.0 -6.0 to -4.0" in page.text and "+5.0 +4.0 to +6.0" in page.text and "60.0%" in page.text
    assert "<template 0> {}" in page.text and "<template 12> {}" not in page.text
    # Of the 20 shown, those between +-1 point leave 0 in: places 10 to 14, of which none is shown.
    assert text.count('class="range clear"') == 20
    assert "between" not in report(tmp_path, tables={"templates": templates(3)})[1].text


def test_a_task_measured_in_several_ways_has_a_link_for_each(tmp_path: Path) -> None:
    predictions = pd.concat([classification(), classification(kind="linear_probe", prompts="projected features")])
    results = [*few_shot_results({1: 0.3}), *probe_results()]
    _, page = report(tmp_path, results=results, predictions=predictions,
                     tables={"draws": draws({1: [0.3, 0.3]}), "lambdas": lambdas()})
    assert [attrs["id"] for attrs in page.all("section")] == ["task-0", "task-1", "task-2"]
    order = [page.text.index(title) for title in ("labelled pictures a class", "Surest and right", "The choice of lambda")]
    assert order == sorted(order)  # that of the results
    assert len(page.all("a", href="#task-2")) == 1


@pytest.mark.parametrize("values", [[0.0], [1.0], [0.001, 0.999], [0.431, 0.433], [-0.02, 1.02], [0.5, 0.55, 0.61]])
def test_a_figures_scale_holds_all_its_points(values: list[float]) -> None:
    points = [(math.log2(2 + place), value) for place, value in enumerate(values)]
    page = Page(curves_figure([Curve("one", points)], title="t", axis="x", ticks=[(1, "2")], levels=[("level <b>", values[0])]))
    ys = [float(attrs["cy"]) for attrs in page.all("circle")]
    rules = sorted(float(attrs["y1"]) for attrs in page.all("line", **{"class": "grid"}))
    assert 2 <= len(rules) <= 8
    assert all(rules[0] - 0.1 <= y <= rules[-1] + 0.1 for y in ys)
    assert "level <b>" in page.text


def test_a_difference_is_clear_where_its_interval_leaves_out_zero() -> None:
    assert "clear" in difference_bar(0.02, 0.01, 0.03, 0.05) and "clear" not in difference_bar(0.02, -0.01, 0.05, 0.05)
    beyond = Page(difference_bar(0.5, 0.4, 0.6, 0.05)).all("rect", **{"class": "mark clear"})[0]
    assert 0 <= float(beyond["x"]) <= 100
