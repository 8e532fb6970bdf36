"""Pictures of metrics.jsonl."""

import json
import math
from pathlib import Path

import pytest

from clipkit.training.curves import overlay, plot_curves, read_metrics, series


def write_metrics(run_dir: Path, steps: int = 300, shift: float = 0.0) -> Path:
    run_dir.mkdir(parents=True, exist_ok=True)
    lines = []
    for step in range(1, steps + 1):
        done = step / steps
        loss = 5.9 * math.exp(-2.5 * done) + 0.3 + 0.15 * math.sin(step * 12.9898) * (1 - done / 2) + shift * done
        lines.append({"step": step, "loss": loss, "loss_minus_log_batch": loss - math.log(256),
                      "in_batch_accuracy_image": 0.9 * done ** 0.5 + 0.02 * math.sin(step * 7.1),
                      "in_batch_accuracy_text": 0.87 * done ** 0.5, "lr": 2e-3 * min(1, done * 20) * (1 - done),
                      "logit_scale": 14 + 30 * done, "samples_per_second": 285 + 9 * math.sin(step)})
        if step % 50 == 0:
            for task, top in (("emoji_val", 0.55), ("emoji_test_style", 0.42)):
                value = top * done ** 0.5
                lines.append({"step": step, "task": task, "metric": "acc1", "value": value, "n": 1358,
                              "ci_low": value - 0.027, "ci_high": value + 0.027})
    lines.insert(5, {"step": 6, "loss": None})
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 301, "lo')
    return run_dir


def png_size(path: Path) -> tuple[int, int]:
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG")
    return int.from_bytes(content[16:20], "big"), int.from_bytes(content[20:24], "big")


def test_curves_of_a_run_are_drawn(tmp_path):
    run_dir = write_metrics(tmp_path / "emoji")
    path = plot_curves(run_dir)
    assert path == run_dir / "curves.png"
    assert png_size(path)[0] > 1000
    assert {file.name for file in run_dir.iterdir()} == {"metrics.jsonl", "curves.png"}
    assert plot_curves(run_dir, tmp_path / "other.png").is_file()


def test_a_run_that_has_hardly_begun_is_drawn_too(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    assert plot_curves(tmp_path).is_file()
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 5.5}\n{"step": 1, "warning": "x"}\n'
                                            '{"step": 1, "task": "t", "metric": "acc1", "value": 0.1}\n')
    assert plot_curves(tmp_path).is_file()
    with pytest.raises(FileNotFoundError, match="give a run folder in which training has begun"):
        plot_curves(tmp_path / "absent")


def test_losses_of_several_runs_are_laid_over_each_other(tmp_path):
    runs = [write_metrics(tmp_path / str(index), shift=1e-6 * index) for index in range(3)]
    out = overlay([runs[0], runs[1] / "metrics.jsonl", runs[2]], ["1 process", "2 processes", "4 processes"],
                  tmp_path / "overlay.png", title="one curve on any hardware")
    assert png_size(out)[0] > 600
    with pytest.raises(ValueError, match="got 3 paths and 1 labels; give one label a path"):
        overlay(runs, ["a"], out)
    with pytest.raises(ValueError, match="got 0 paths"):
        overlay([], [], out)


def test_evaluation_lines_and_nulls_stay_out_of_training_series(tmp_path):
    records = read_metrics(write_metrics(tmp_path) / "metrics.jsonl")
    steps, losses = series(records, "loss")
    assert len(steps) == 300
    assert all(math.isfinite(loss) for loss in losses)
    assert series(records, "value") == ([], [])
