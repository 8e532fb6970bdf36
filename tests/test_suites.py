"""Suites: their tasks are opened and averaged, those left out are named, and the average never says more than it is."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from clipkit.config.schema import SettingsError, parse
from clipkit.config.suite import SuiteConfig
from clipkit.config.zero_shot import ZeroShotConfig
from clipkit.evaluation.results import Result
from clipkit.evaluation.suites import measured_tasks, open_suite, read_suite, suite_table, summarise
from clipkit.evaluation.tasks import Task
from tests.conftest import TINY, command_settings
from tests.hub_server import HubServer
from tests.test_hub import hub
from tests.test_tasks import benchmark_set, class_folders

__all__ = ["hub"]  # the fixture


def a_suite(*tasks: dict, name: str = "mine") -> SuiteConfig:
    return parse(SuiteConfig, {"name": name, "tasks": list(tasks)})


def a_task(name: str, kind: str) -> Task:
    return Task(name, "test", kind, images=None)  # pyright: ignore[reportArgumentType]


def a_result(task: str, metric: str, value: float, low: float, high: float, *, n: int = 100, prompts: str = "plain",
             kind: str = "zeroshot_classification") -> Result:
    return Result(task, "test", kind, metric, value, n, low, high, 2, prompts, 0)


def test_the_average_is_that_of_the_main_metrics_with_the_interval_of_independent_tasks():
    suite = a_suite({"name": "A", "task": "a", "metric": "acc1", "n": 100},
                    {"name": "B", "task": "b", "metric": "mean_recall@1", "n": 60}, {"name": "C", "left_out": "no such metric"})
    tasks = [a_task("a", "zeroshot_classification"), a_task("b", "zeroshot_retrieval")]
    of_b = {"kind": "zeroshot_retrieval", "prompts": "captions"}
    results = [a_result("a", "acc1", 0.6, 0.5, 0.7), a_result("a", "acc5", 0.9, 0.8, 0.95),
               a_result("a", "acc1", 0.1, 0.0, 0.2, prompts="another"),
               a_result("b", "image_retrieval_recall@1", 0.2, 0.16, 0.24, n=250, **of_b),
               a_result("b", "text_retrieval_recall@1", 0.4, 0.32, 0.48, n=50, **of_b)]
    summary = summarise(suite, tasks, results, {"a": 0.61, "b": 0.31})
    average = summary.results[0]
    assert (average.task, average.kind, average.metric, average.n) == ("mine", "suite", "average_2_of_3", 150)
    assert average.value == pytest.approx((0.6 + 0.3) / 2)
    half_width = np.hypot(0.1, 0.06) / 2  # B's: the mean of 0.04 and 0.08
    assert (average.ci_low, average.ci_high) == pytest.approx((0.45 - half_width, 0.45 + half_width))
    assert summary.notes == ("B has 50 images, the suite expects 60", "suite mine without C: no such metric")
    table = summary.tables["suite"]
    assert table["value"].tolist()[:2] == pytest.approx([0.6, 0.3]) and table["left_out"].tolist()[2] == "no such metric"
    text = suite_table(table, average)
    assert "mine: average_2_of_3" in text and "46.00%" in text and "C" not in text.split()
    whole = a_suite({"name": "A", "task": "a", "metric": "acc1"})
    assert summarise(whole, tasks[:1], results).results[0].metric == "average"


def test_the_interval_of_the_average_is_as_wide_as_draws_of_new_images_scatter():
    from clipkit.evaluation.statistics import wilson_interval

    rng, rates, sizes = np.random.default_rng(0), np.array([0.3, 0.6, 0.9]), np.array([200, 400, 100])
    suite = a_suite(*({"name": f"T{number}", "task": f"t{number}", "metric": "acc1"} for number in range(3)))
    tasks = [a_task(f"t{number}", "zeroshot_classification") for number in range(3)]
    averages, half_widths = [], []
    for _ in range(200):
        shares = rng.binomial(sizes, rates) / sizes
        results = [a_result(f"t{number}", "acc1", share, *wilson_interval(share, int(n)), n=int(n))
                   for number, (share, n) in enumerate(zip(shares, sizes, strict=True))]
        average = summarise(suite, tasks, results).results[0]
        assert average.ci_low is not None and average.ci_high is not None
        averages.append(average.value)
        half_widths.append((average.ci_high - average.ci_low) / 2)
    # The standard deviation of 200 draws is known to 5 %.
    assert np.mean(half_widths) == pytest.approx(1.96 * np.std(averages), rel=0.15)


def test_the_suites_that_ship_say_what_their_source_says():
    suite = read_suite("datacomp38")
    assert len(suite.tasks) == 38 and len(measured_tasks(suite)) == 33
    metrics = {one.name: one.metric for one in suite.tasks}
    assert {name for name, metric in metrics.items() if metric == "mean_per_class_recall"} == {
        "Caltech-101", "FGVC Aircraft", "Oxford Flowers-102", "Oxford-IIIT Pet"}  # as in DataComp
    assert {name for name, metric in metrics.items() if metric is None} == {
        "WinoGAViL", "iWildCam", "FMoW", "Dollar Street", "GeoDE"}
    assert all(one.revision is None and one.split is None and one.prompts is None for one in suite.tasks)
    assert len(read_suite("imagenet_shifts").tasks) == 6 and len(read_suite("retrieval").tasks) == 2
    assert command_settings("zero-shot", ZeroShotConfig, "suite=datacomp38").suite == suite


@pytest.mark.parametrize(("tasks", "message"), [
    ([{"name": "A"}], "A needs either task"),
    ([{"name": "A", "task": "a", "metric": "acc1", "left_out": "x"}], "A needs either task"),
    ([{"name": "A", "task": "a", "metric": "acc2"}], "metric of A is 'acc2'; choose one of acc1"),
    ([{"name": "A", "task": "a"}], "metric of A is None; choose one of acc1"),
    ([{"name": "A", "left_out": "x"}], "has no task to measure"),
    ([{"name": "A", "left_out": "x"}, {"name": "A", "task": "a", "metric": "acc1"}], "several tasks called A"),
    ([{"name": "A", "tasks": "a"}], r"suite.tasks.tasks is not a setting|tasks.tasks is not a setting"),
])
def test_a_suite_that_contradicts_itself_is_refused(tasks, message):
    with pytest.raises(SettingsError, match=message):
        a_suite(*tasks)


def test_what_does_not_go_with_a_suite_is_refused(tmp_path):
    for name in ("task", "templates", "images", "split", "group", "duplicates"):
        with pytest.raises(SettingsError, match=f"suite=retrieval says itself what is measured and how; leave {name} out"):
            command_settings("zero-shot", ZeroShotConfig, "suite=retrieval", f"{name}=keep")
    with pytest.raises(SettingsError, match="suite=nowhere: no such choice; choose one of datacomp38"):
        command_settings("zero-shot", ZeroShotConfig, "suite=nowhere")
    with pytest.raises(FileNotFoundError, match="there is no suite 'nowhere'; choose one of datacomp38, imagenet_shifts"):
        read_suite("nowhere")
    (tmp_path / "list.yaml").write_text("- a\n")
    with pytest.raises(ValueError, match=r"list.yaml is no suite: it needs name and tasks"):
        read_suite(tmp_path / "list.yaml")
    class_folders(tmp_path / "pets", {"cat": 2, "hen": 1})
    with pytest.raises(ValueError, match=r"metric of Pets in suite mine is mean_recall@1, but .*pets is made for zeroshot_"):
        open_suite(a_suite({"name": "Pets", "task": str(tmp_path / "pets"), "metric": "mean_recall@1"}))


def test_a_suite_of_folders_and_a_set_on_the_hub_from_yaml_to_csv(hub: HubServer, tmp_path: Path, capsys):
    """Two local sets and one on the hub, through the command, twice: the second time without a connection."""
    from clipkit.commands.zero_shot import zero_shot
    from clipkit.model.build import build_model
    from clipkit.model.folder import save_model_folder

    save_model_folder(build_model(config=TINY), tmp_path / "tiny")
    class_folders(tmp_path / "pets", {"cat": 3, "hen": 2})
    benchmark_set(tmp_path / "pairs", "test", [b"a cat\na grey cat", b"a fox", b"a hen"], suffix="txt", kind="retrieval")
    birds = benchmark_set(tmp_path / "birds", "test", [b"2", b"0", b"1", b"1", b"0"])
    (birds / "classnames.txt").write_text("crane\nfox\ncrane\n")
    commit = hub.add("datasets", "someone/wds_birds", birds)
    (tmp_path / "own" / "suite").mkdir(parents=True)
    (tmp_path / "own" / "suite" / "three.yaml").write_text(
        "name: three\ntasks:\n"
        f"  - {{name: Pets, task: '{tmp_path / 'pets'}', metric: acc1, n: 6, prompts: [plain]}}\n"
        f"  - {{name: Pairs, task: '{tmp_path / 'pairs'}', metric: mean_recall@1, n: 3}}\n"
        f"  - {{name: Birds, task: 'hf://someone/wds_birds', revision: {commit}, metric: mean_per_class_recall, n: 5}}\n"
        "  - {name: Songs, left_out: they are no pictures}\n")

    def run(*arguments: str) -> dict:
        zero_shot(command_settings("zero-shot", ZeroShotConfig, "suite=three", f"model={tmp_path / 'tiny'}", "device=cpu",
                                   f"out={tmp_path / 'out'}", f"cache_dir={tmp_path / 'cache2'}", *arguments,
                                   config_dir=tmp_path / "own"))
        rows = json.loads((tmp_path / "out" / "results.json").read_text())
        return {(row["kind"], row["metric"]): row for row in rows if row["kind"] == "suite" or row["metric"] == "acc1"}

    average = run()["suite", "average_3_of_4"]
    said = capsys.readouterr().out
    table = pd.read_csv(tmp_path / "out" / "suite.csv").set_index("name")
    assert average["value"] == pytest.approx(table["value"][:3].mean()) and average["n"] == 5 + 3 + 5
    assert table.loc["Birds", "commit"] == commit and table["metric"].tolist()[:2] == ["acc1", "mean_recall@1"]
    assert "Pets has 5 images, the suite expects 6" in said and "suite three without Songs: they are no pictures" in said
    assert f"is at commit {commit}" in said and "of each only the first is ever guessed" in said
    assert "three: average_3_of_4" in said and "average_3_of_4" in (tmp_path / "out" / "report.html").read_text()
    hub.requests.clear()
    assert run("offline=true", "report=false")["suite", "average_3_of_4"] == average and hub.requests == []
    shutil.rmtree(tmp_path / "cache")
    shutil.rmtree(tmp_path / "out")
    capsys.readouterr()
    with pytest.raises(FileNotFoundError, match=r"1 of 3 sets could not be had: Birds: offline, and the cache .* lacks "
                                                r"test/nshards.txt of hf://someone/wds_birds.*; give the same command again"):
        run("offline=true", "report=false")
    rows = json.loads((tmp_path / "out" / "results.json").read_text())  # the others are measured
    assert {row["metric"] for row in rows} >= {"acc1", "text_retrieval_recall@1", "average_2_of_4"}
    assert "suite three without Birds: it cannot be had: offline" in capsys.readouterr().out


def test_a_suite_goes_on_past_sets_that_cannot_be_had(tmp_path: Path):
    class_folders(tmp_path / "pets", {"cat": 2, "hen": 1})
    pets = {"name": "Pets", "task": str(tmp_path / "pets"), "metric": "acc1"}
    gone = {"name": "Gone", "task": str(tmp_path / "nowhere"), "metric": "acc1"}
    suite, tasks, missing = open_suite(a_suite(gone, pets))
    assert [task.name for task in tasks] == [pets["task"]] and list(missing) == ["Gone"]
    assert [one.name for one in measured_tasks(suite)] == ["Pets"]
    left_out = suite.tasks[0].left_out
    assert left_out is not None and left_out.startswith("it cannot be had: ") and "nowhere" in left_out
    assert open_suite(a_suite(pets))[2] == {}
    with pytest.raises(FileNotFoundError, match=r"none of the 1 sets of suite mine can be had; Gone: .*nowhere"):
        open_suite(a_suite(gone))
    with pytest.raises(ValueError, match="metric of Pets in suite mine is mean_recall@1"):  # the suite's own fault
        open_suite(a_suite(gone, {**pets, "metric": "mean_recall@1"}))
