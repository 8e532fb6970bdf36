"""Results as files and as a table."""

import csv
import json
from pathlib import Path

import pytest

from clipkit.evaluation.results import Provenance, Result, results_table, write_results

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
