"""Results as files and as a table."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from clipkit.evaluation.prediction_files import on_shared_questions, write_predictions_file
from clipkit.evaluation.results import Provenance, Result, read_results, results_table, write_results

RESULTS_COLUMNS = [  # design.md, "Results"
    "schema_version", "name", "pretrained", "task", "split", "kind", "metric", "value", "n", "ci_low", "ci_high",
    "num_classes", "prompts", "n_bad", "precision", "weights_sha256", "step", "clipkit_version",
]


def result(**changes) -> Result:
    values = {"task": "emoji_val", "split": "val", "kind": "zeroshot_classification", "metric": "acc1", "value": 0.5,
              "n": 338, "ci_low": 0.447, "ci_high": 0.553, "num_classes": 302, "prompts": "label", "n_bad": 0}
    return Result(**{**values, **changes})


def test_results_are_written_with_the_columns_of_the_design(tmp_path: Path) -> None:
    provenance = Provenance("emoji", None, "fp32", "abc", 12, "0.1")
    write_results(tmp_path / "zero_shot", [result(), result(metric="acc5", value=1 / 3)], provenance)
    with (tmp_path / "zero_shot" / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == RESULTS_COLUMNS
    assert (rows[0]["name"], rows[0]["pretrained"], rows[1]["metric"]) == ("emoji", "", "acc5")
    assert float(rows[1]["value"]) == 1 / 3
    from_json = json.loads((tmp_path / "zero_shot" / "results.json").read_text())
    assert [list(row) for row in from_json] == [RESULTS_COLUMNS] * 2
    assert from_json[0]["pretrained"] is None
    assert [str(row["value"]) for row in from_json] == [row["value"] for row in rows]


def test_what_the_same_weights_have_on_other_tasks_stays(tmp_path: Path) -> None:
    provenance = Provenance("emoji", None, "fp32", "abc", 12, "0.1")
    write_results(tmp_path, [result(), result(metric="acc5"), result(task="pets", value=0.9)], provenance)
    write_results(tmp_path, [result(value=0.6), result(split="test", value=0.7), result(prompts="plain")], provenance)
    about = [(row["task"], row["split"], row["prompts"], row["metric"], row["value"]) for row in read_results(tmp_path)]
    assert about == [("pets", "val", "label", "acc1", 0.9), ("emoji_val", "val", "label", "acc1", 0.6),
                     ("emoji_val", "test", "label", "acc1", 0.7), ("emoji_val", "val", "plain", "acc1", 0.5)]
    with (tmp_path / "results.csv").open(newline="") as file:
        assert [row["task"] for row in csv.DictReader(file)] == ["pets", *["emoji_val"] * 3]
    for other in (replace(provenance, weights_sha256="def"), replace(provenance, weights_sha256=None)):
        write_results(tmp_path, [result(task="birds")], other)
        assert [row["task"] for row in read_results(tmp_path)] == ["birds"]


@pytest.mark.parametrize(("name", "content", "message"), [
    ("results.json", '[{"schema_version": 0, "acc1": 0.5}]', r"results.json holds results of schema version 0, this clipkit "
     r"writes 1; move the results away, or give out=<another folder>$"),
    ("results.csv", "schema_version,value\n2,0.5\n", "results.csv holds results of schema version 2, this clipkit writes 1; "),
    ("results.json", '[{"acc1": 0.5}]', r"results.json cannot be read as results \(KeyError: 'schema_version'\); move the"),
    ("results.json", '[{"schema', r"results.json cannot be read as results \(JSONDecodeError: .*\); move the results away"),
])
def test_results_of_another_schema_are_refused_and_stay(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        write_results(tmp_path, [result()], Provenance("emoji", None, "fp32", "abc", 12, "0.1"))
    assert (tmp_path / name).read_text() == content
    assert len(list(tmp_path.iterdir())) == 1


def answers(task: str, ranks: list[int], prompts: str = "label") -> pd.DataFrame:
    return pd.DataFrame({"task": task, "kind": "zeroshot_classification", "prompts": prompts, "direction": "",
                         "key": [str(number) for number in range(len(ranks))], "rank": ranks})


def test_predictions_of_the_same_weights_on_other_questions_stay(tmp_path: Path) -> None:
    provenance = Provenance("emoji", None, "fp32", "abc", 12, "0.1")
    write_predictions_file(tmp_path / "new", answers("pets", [0, 1]), provenance)
    write_predictions_file(tmp_path / "new", answers("birds", [2]), provenance)
    path = write_predictions_file(tmp_path / "new", answers("pets", [3]), provenance)
    found = pd.read_parquet(path)
    assert list(zip(found["task"], found["rank"], strict=True)) == [("birds", 2), ("pets", 3)]
    assert set(found["name"]) == {"emoji"} and set(found["weights_sha256"]) == {"abc"}
    write_predictions_file(tmp_path / "new", answers("pets", [4]), replace(provenance, weights_sha256="def"))
    assert pd.read_parquet(path)["rank"].tolist() == [4]
    path.write_bytes(b"half")
    write_predictions_file(tmp_path / "new", answers("birds", [5]), replace(provenance, weights_sha256="def"))
    assert pd.read_parquet(path)["rank"].tolist() == [5]
    assert [file.name for file in path.parent.iterdir()] == ["predictions.parquet"]


def test_two_evaluations_are_compared_on_what_both_were_asked() -> None:
    a = pd.concat([answers("pets", [0, 1]), answers("birds", [2])])
    b = pd.concat([answers("pets", [1, 0]), answers("pets", [5], prompts="plain")])
    shared = on_shared_questions(a, b)
    assert shared[0]["rank"].tolist() == [0, 1] and shared[1]["rank"].tolist() == [1, 0]
    assert shared[2] == ["only a was asked: birds zeroshot_classification label",
                         "only b was asked: pets zeroshot_classification plain"]
    one, other = answers("birds", [2]), answers("pets", [1])
    assert on_shared_questions(one, other)[0] is one  # nothing in common: compare_predictions says so


def test_no_results_are_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there are no results to write"):
        write_results(tmp_path, [], Provenance("emoji", None, "fp32", None, None, "0.1"))


def test_the_table_has_a_line_a_prompt_rule_and_metrics_as_columns() -> None:
    retrieval = result(task="/a/very/long/folder/of/my/pairs.tar", kind="zeroshot_retrieval", num_classes=None, n=50,
                       metric="image_retrieval_recall@1", prompts="captions")
    baseline = result(prompts="pixel nearest neighbour", value=0.295)
    lines = results_table([result(), result(metric="acc5", value=0.75), baseline, retrieval]).splitlines()
    assert lines[0].split() == ["task", "n", "classes", "prompts", "acc1", "acc5"]
    assert lines[2].split() == ["emoji_val", "338", "302", "label", "50.0%", "(44.7-55.3)", "75.0%", "(44.7-55.3)"]
    assert "pixel nearest neighbour" in lines[3]
    assert lines[3].endswith("29.5% (44.7-55.3)")
    assert lines[5].split() == ["task", "n", "prompts", "image", "R@1"]
    assert lines[7].startswith("...long/folder/of/my/pairs.tar  50")
    assert all(line == line.rstrip() for line in lines)
