"""Accuracy by group: counted by hand, from tables and from the json of shards, with the worst group and the gap."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binomtest

from clipkit.evaluation.groups import group_outcome, with_groups
from clipkit.evaluation.image_sets import ShardImages, Target
from clipkit.evaluation.outcome import Outcome
from clipkit.evaluation.results import is_of_group, results_table
from clipkit.evaluation.store import EmbeddingStore
from clipkit.evaluation.tasks import CLASSIFICATION, RETRIEVAL, Groups, Task, load_task
from clipkit.evaluation.zero_shot import measure
from tests.conftest import write_tar
from tests.test_choices import PAIRS, table
from tests.test_report import classification, report, result
from tests.test_tasks import picture


def answers(hits: dict[str, list[int]], **columns) -> tuple[Groups, Outcome]:
    """Answers of the groups named, 1 = right, each about a picture of its own."""
    keys = {f"{group}{number}": group for group, given in hits.items() for number in range(len(given))}
    ranks = [1 - hit for given in hits.values() for hit in given]
    frame = classification(len(keys), prompts="plain", **{"key": list(keys), "rank": ranks, **columns})
    value = 1 - float(np.mean(ranks))
    return Groups("where", keys, {}), Outcome([result(prompts="plain", value=value, n=len(keys))], frame, ())


def test_groups_are_counted_each_with_its_n_and_wilsons_interval() -> None:
    groups, outcome = answers({"north": [1, 1, 0], "south": [1, 0, 0, 0], "west": [1, 1]})
    found = group_outcome(groups, outcome)
    by_metric = {one.metric: one for one in found.results}
    assert {metric: (one.value, one.n) for metric, one in by_metric.items()} == {
        "acc1[where=north]": (2 / 3, 3), "acc1[where=south]": (0.25, 4), "acc1[where=west]": (1.0, 2),
        "worst_group_acc1": (0.25, 4), "group_gap_acc1": (0.75, 6)}
    wilson = binomtest(1, 4).proportion_ci(method="wilson")
    assert (by_metric["worst_group_acc1"].ci_low, by_metric["worst_group_acc1"].ci_high) == pytest.approx(tuple(wilson))
    best = binomtest(2, 2).proportion_ci(method="wilson")
    gap = by_metric["group_gap_acc1"]
    assert gap.ci_low == pytest.approx(0.75 - np.hypot(1 - best.low, wilson.high - 0.25))
    assert gap.ci_high == pytest.approx(0.75 + np.hypot(0, 0.25 - wilson.low))
    assert "lowest acc1[where=south], 25.0% of 4" in found.notes[0]


def test_the_mean_over_groups_by_their_size_is_the_whole() -> None:
    rng = np.random.default_rng(0)
    groups, outcome = answers({name: rng.integers(0, 2, rng.integers(1, 40)).tolist() for name in "abcdefg"})
    parts = [one for one in group_outcome(groups, outcome).results if is_of_group(one.metric)]
    assert sum(one.value * one.n for one in parts) / sum(one.n for one in parts) == pytest.approx(outcome.results[0].value)


def test_captions_of_one_picture_hang_together_and_pictures_without_a_group_are_told() -> None:
    from clipkit.evaluation.statistics import wilson_interval

    groups, outcome = answers({"a": [1] * 10 + [0] * 10, "b": [1]})
    assert outcome.predictions is not None
    keys = [f"a{number // 5}" for number in range(20)] + ["elsewhere"]  # five captions a picture, all right or all wrong
    frame = outcome.predictions.assign(key=keys, kind=RETRIEVAL, direction="image_retrieval")
    whole = result(kind=RETRIEVAL, metric="image_retrieval_recall@1", prompts="plain")
    found = group_outcome(groups, Outcome([whole], frame, ()))
    one, = found.results  # a single group has no gap
    assert (one.metric, one.value, one.n) == ("image_retrieval_recall@1[where=a]", 0.5, 20)
    assert (one.ci_low, one.ci_high) == pytest.approx(wilson_interval(0.5, 4))
    assert found.notes == ("1 of 21 answers on sets/my <task> are in no group: no value of where",)


def test_kinds_without_single_answers_say_so() -> None:
    outcome = Outcome([result(kind="few_shot", metric="fewshot_k1_acc1")], None, ())
    assert group_outcome(Groups("x", {"a": "b"}, {}), outcome) == Outcome(
        [], None, ("group=x is about single answers, of which few_shot has none",))


def labelled_table(folder: Path) -> str:
    folder.mkdir()
    for number in range(6):
        (folder / f"{number}.png").write_bytes(picture(number))
    rows = ["image,label,camera,year", "0.png,cat,old,2001", "1.png,hen,old,2001", "2.png,cat,new,2001", "3.png,cat,new,",
            "4.png,hen,,2004", "5.png,hen,new,2004"]
    (folder / "t.csv").write_text("\n".join(rows))
    return str(folder / "t.csv")


def test_a_tables_column_groups_zero_shot_classification(tiny_model, tmp_path: Path) -> None:
    task = with_groups(load_task(labelled_table(tmp_path / "t"), templates="plain"), "camera")
    found = measure(tiny_model, task)
    assert found.predictions is not None
    right = found.predictions.set_index("key")["rank"] == 0
    by_metric = {one.metric: one.value for one in found.results}
    assert by_metric["acc1[camera=old]"] == right[["0.png", "1.png"]].mean()
    assert by_metric["acc1[camera=new]"] == pytest.approx(right[["2.png", "3.png", "5.png"]].mean())
    assert any("1 of 6 answers" in note for note in found.notes)
    text = results_table(found.results)
    assert "worst_group_acc1" in text and "camera=" not in text  # single groups are for the files and the report


def test_a_json_field_of_shards_is_read_once(tmp_path: Path) -> None:
    (tmp_path / "set" / "test").mkdir(parents=True)
    members = []
    for number in range(5):
        fields = json.dumps({"region": "east" if number < 2 else 7}).encode() if number < 4 else b"{damaged"
        members += [(f"{number}.png", picture(number)), (f"{number}.cls", b"0"), (f"{number}.json", fields)]
    write_tar(tmp_path / "set" / "test" / "0.tar", members)
    (tmp_path / "set" / "test" / "nshards.txt").write_text("1\n")
    (tmp_path / "set" / "classnames.txt").write_text("cat\ncat\nhen\n")
    store = EmbeddingStore(tmp_path / "cache")
    task = with_groups(load_task(str(tmp_path / "set"), templates="plain", duplicates="merge"), "region", store)
    assert task.groups == Groups("region", {"0.tar/0": "east", "0.tar/1": "east", "0.tar/2": "7", "0.tar/3": "7"}, {})
    assert len(list((tmp_path / "cache" / "embeddings" / "facts").iterdir())) == 1
    assert with_groups(task, "region", store).groups == task.groups


def test_a_shard_that_cannot_be_reached_is_an_error_and_leaves_nothing_in_the_store(tmp_path: Path, monkeypatch) -> None:
    images = ShardImages(("http://127.0.0.1:9/0.tar",), lambda raw: Target(), "none", with_npy=False)
    store = EmbeddingStore(tmp_path)
    monkeypatch.setattr("clipkit.data.remote.FIRST_WAIT_SECONDS", 0.0)
    with pytest.raises(OSError, match=r"http://127.0.0.1:9/0.tar cannot be read now"):
        with_groups(Task("x", "all", RETRIEVAL, images), "region", store)
    assert not store.folder.exists()


def test_a_column_of_choices_groups_questions(tiny_model, tmp_path: Path) -> None:
    task = with_groups(load_task(table(tmp_path / "t", PAIRS)), "tag")
    metrics = [one.metric for one in measure(tiny_model, task).results]
    assert metrics == ["acc", "text_acc", "image_acc", "tie_rate", "acc[tag=order]", "acc[tag=place]", "worst_group_acc",
                       "group_gap_acc"]


def test_columns_that_make_no_groups_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = load_task(labelled_table(tmp_path / "t"))
    with pytest.raises(ValueError, match=r"group is 'lens', which no picture of task .* has a value of; choose one of cam"):
        with_groups(task, "lens")
    (tmp_path / "plain" / "cat").mkdir(parents=True)
    (tmp_path / "plain" / "cat" / "0.png").write_bytes(picture(0))
    with pytest.raises(ValueError, match="its pictures have no other columns or json fields"):
        with_groups(load_task(str(tmp_path / "plain")), "x")
    monkeypatch.setattr("clipkit.evaluation.groups.MAX_GROUPS", 1)
    with pytest.raises(ValueError, match=r"group is 'camera', which has 2 values in task .*; give a column with at most 1"):
        with_groups(task, "camera")


def test_the_report_shows_the_worst_group_first(tmp_path: Path) -> None:
    groups, outcome = answers({"<north>": [1, 1, 0], "south": [1, 0, 0, 0], "west": [1, 1]})
    found = [*outcome.results, *group_outcome(groups, outcome).results]
    text, page = report(tmp_path, results=found, predictions=pd.DataFrame(outcome.predictions))
    assert "acc1 by where" in page.text and "3 groups, from 25.0% to 100.0%" in page.text
    order = [page.text.rindex(f"{name}{value} n {n}") for name, value, n in
             (("south", "25.0%", 4), ("<north>", "66.7%", 3), ("west", "100.0%", 2))]
    assert order == sorted(order)
    assert "worst_group_acc1" in page.text and "where=south" not in text  # no column of its own
    assert CLASSIFICATION in {one.kind for one in found}
    many, whole = answers({f"g{number:02d}": [number % 2] for number in range(50)})
    _, page = report(tmp_path, results=[*whole.results, *group_outcome(many, whole).results], predictions=whole.predictions)
    assert len(page.all("div", **{"class": "recall wide"})) == 40
