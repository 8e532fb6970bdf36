"""The second table: times to an accuracy are read from the runs as the rule says, and stand apart on the page."""

import json

import pytest

from scripts.bench.mathematics import LEVERS, Curve, bench, compare, curve_of, seconds_to
from scripts.bench.mathematics_page import mathematics_section
from scripts.bench.rounds import save_figures

FINAL = {"emoji_val": (0.4, 0.35, 0.45), "emoji_test_style": (0.2, 0.18, 0.22), "emoji_test_concept": (0.1, 0.08, 0.12)}


def curve(*points: tuple[float, float], end: float = 0.4) -> Curve:
    return Curve([*points, (100.0, end)], 100.0, 5000, FINAL | {"emoji_val": (end, end - 0.05, end + 0.05)}, 338)


def write_run(folder, *lines) -> None:
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def acc1(value: float, task: str = "emoji_val", prompts: str = "ensemble") -> dict:
    return {"task": task, "metric": "acc1", "value": value, "n": 338, "ci_low": 0.0, "ci_high": 1.0, "prompts": prompts}


def test_the_seconds_of_runs_one_after_the_other_add_up(tmp_path):
    write_run(tmp_path / "low", acc1(0.01), {"samples_seen": 100, "samples_per_second": 50.0},
              {"samples_seen": 300, "samples_per_second": 100.0}, acc1(0.9, prompts="label"), acc1(0.2))
    write_run(tmp_path / "full", {"samples_seen": 50, "samples_per_second": 25.0}, acc1(0.3), acc1(0.1, "emoji_test_style"),
              {"step": 9, "warning": "slow"})
    found = curve_of([tmp_path / "low", tmp_path / "full"])
    assert found.points == [(0.0, 0.01), (4.0, 0.2), (6.0, 0.3)]
    assert (found.seconds, found.samples, found.num_val) == (6.0, 350, 338)
    assert found.final == {"emoji_val": (0.3, 0.0, 1.0), "emoji_test_style": (0.1, 0.0, 1.0)}


def test_the_time_to_an_accuracy_lies_on_the_line_between_two_evaluations():
    assert seconds_to(curve((0.0, 0.0), (50.0, 0.2)), 0.3) == pytest.approx(75)
    assert seconds_to(curve((0.0, 0.0), (50.0, 0.5)), 0.3) == pytest.approx(30)  # first reached, lost again or not
    assert seconds_to(curve((0.0, 0.0), (50.0, 0.2)), 0.2) == pytest.approx(50)
    assert seconds_to(curve((0.0, 0.0)), 0.41) is None


def test_a_lever_is_held_against_95_per_cent_of_where_its_baseline_ends():
    figure = compare("patches", "ViT", curve((0.0, 0.0), (50.0, 0.38), end=0.39), curve((0.0, 0.0)), seed=3)
    assert figure.notes["target"] == pytest.approx(0.38) and figure.notes["reached"]
    assert (figure.ours, figure.peer, figure.ratio_median) == pytest.approx((50, 95, 1.9))


def test_a_lever_that_never_reaches_the_target_is_given_a_bound():
    figure = compare("patches", "ViT", curve((0.0, 0.0), end=0.3), curve((0.0, 0.0)), seed=3)
    assert not figure.notes["reached"]
    assert (figure.ours, figure.ratio_median) == pytest.approx((100, 0.95))


def test_a_baseline_that_learned_nothing_gives_no_target():
    with pytest.raises(ValueError, match=r"the baseline of ViT ends with a val top-1 of 0.010, .*; train it for longer"):
        compare("patches", "ViT", curve(), curve(end=0.01), seed=0)


def test_the_page_has_both_tables_and_says_what_was_not_reached(tmp_path):
    assert mathematics_section(tmp_path / "mathematics.json", tmp_path / "curves.png").startswith("Not measured yet")
    save_figures(tmp_path / "mathematics.json", [
        compare("patches", "ViT", curve((0.0, 0.0), end=0.4), curve((0.0, 0.0)), seed=0),
        compare("short", "ViT", curve((0.0, 0.0), end=0.3), curve((0.0, 0.0)), seed=0)])
    text = mathematics_section(tmp_path / "mathematics.json", tmp_path / "curves.png")
    assert "| patches | ViT | 0 | 0.380 | 95 | 95 | **1.00** |" in text
    assert "| short | ViT | 0 | 0.380 | 95 | not reached in 100 | **below 0.95** |" in text
    assert text.count("| ViT | 0 | none | 5,000 | 100 | 0.400 [0.350, 0.450] | 0.200 [0.180, 0.220] | 0.100 [") == 1
    assert "| ViT | 0 | short | 5,000 | 100 | 0.300 [0.250, 0.350] |" in text
    assert "how far seeds differ was not measured: it is one" in text
    assert (tmp_path / "curves.png").stat().st_size > 1000


def test_a_run_that_is_there_is_not_repeated_and_one_that_fails_says_why(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.executable", "/bin/false")
    with pytest.raises(RuntimeError, match=r"baseline-0-0/run.log ends with: "):
        bench(None, tmp_path)
    values = [(number, kind, name) for kind, count in (("baseline", 3), ("lever", len(LEVERS))) for number in range(count)
              for name in (("low", "full") if (kind, number) == ("lever", 1) else ("run",))]
    for number, kind, name in values:
        run = tmp_path / f"{kind}-{number}-0" / name
        (run / "zero_shot").mkdir(parents=True)
        (run / "zero_shot" / "results.csv").touch()
        lines = [{"samples_seen": 100, "samples_per_second": 50.0}, *(acc1(0.3, task) for task in FINAL)]
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    figures = bench(tmp_path / "figures.json", tmp_path)
    assert [figure.notes["lever"] for figure in figures] == list(LEVERS)
    assert len(json.loads((tmp_path / "figures.json").read_text())) == len(LEVERS)
