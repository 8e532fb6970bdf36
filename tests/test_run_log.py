"""metrics.jsonl, TensorBoard, wandb, the live line, the step timer, and the diagnoses."""

import errno
import io
import json
import math
import os
import sys
import types
from pathlib import Path

import pytest
import torch

from clipkit.training.diagnose import cut_captions, duplicate_captions, flat_loss, loader_bottleneck, mean_cosine
from clipkit.training.live_line import LiveLine
from clipkit.training.run_log import RunLog, cut_metrics, duration_text, live_text
from clipkit.training.step_timer import StepTimer


class Clock:
    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def read(run_dir: Path) -> list[dict]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=pytest.fail) for line in lines]


METRICS = {"samples_seen": 2560, "loss": 3.25, "loss_minus_log_batch": 3.25 - math.log(256), "lr": 1e-3,
           "samples_per_second": 285.4, "data_wait_fraction": 0.031, "bad": {"no image": 2}}
RECORD = {"task": "emoji_val", "metric": "acc1", "value": 0.4123, "n": 1358, "ci_low": 0.386, "ci_high": 0.439}


def test_each_step_is_one_json_line_that_is_there_at_once(tmp_path):
    log = RunLog(tmp_path, total_steps=100, to=[], stream=io.StringIO())
    log.step(10, {**METRICS, "grad_norm": float("nan"), "lr": torch.tensor(0.5)})
    assert read(tmp_path) == [{"step": 10, **METRICS, "grad_norm": None, "lr": 0.5}]
    log.evaluation(10, [RECORD])
    assert read(tmp_path)[1] == {"step": 10, **RECORD}
    log.close()
    log.close()


def test_a_resumed_run_drops_the_lines_after_its_checkpoint(tmp_path):
    with RunLog(tmp_path, total_steps=100, to=[], stream=io.StringIO()) as log:
        for step in (10, 20, 30):
            log.step(step, {"loss": float(step)})
            log.evaluation(step, [RECORD])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 31, "lo')  # killed while writing
    with RunLog(tmp_path, total_steps=100, resume_step=20, to=[], stream=io.StringIO()) as log:
        log.step(30, {"loss": 31.0})
    assert [(line["step"], line.get("loss")) for line in read(tmp_path)] == [
        (10, 10.0), (10, None), (20, 20.0), (20, None), (30, 31.0)]
    RunLog(tmp_path, total_steps=100, to=[], stream=io.StringIO()).close()
    assert read(tmp_path) == []


def test_cutting_is_atomic_and_leaves_a_whole_file_alone(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    assert cut_metrics(path, 5) == 0
    path.write_text('{"step": 1}\n{"step": 2}\n')
    inode = path.stat().st_ino
    assert cut_metrics(path, 2) == 0
    assert path.stat().st_ino == inode
    path.write_text('{"step": 1}\n{"step": 2}')
    assert cut_metrics(path, 2) == 0
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'

    def fail(*_args):
        raise OSError(errno.ENOSPC, "full")
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="the disk is full"):
            cut_metrics(path, 1)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_other_ranks_write_nothing(tmp_path):
    stream = io.StringIO()
    with RunLog(tmp_path / "absent", total_steps=10, to=["wandb"], is_main=False, stream=stream) as log:
        log.step(1, METRICS)
        log.evaluation(1, [RECORD])
        log.warn("x")
        log.say("y")
    assert stream.getvalue() == ""
    assert not (tmp_path / "absent").exists()


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    log = RunLog(tmp_path, total_steps=10, to=[], stream=io.StringIO())

    class Full(io.BytesIO):
        def write(self, line):
            raise OSError(errno.ENOSPC, "No space left on device")
    log.metrics.close()
    monkeypatch.setattr(log, "metrics", Full())
    with pytest.raises(OSError, match=r"^cannot write .*metrics.jsonl: the disk is full"):
        log.step(1, METRICS)
    with pytest.raises(OSError, match=r"^cannot write .*metrics.jsonl: "):
        RunLog(tmp_path / "absent", total_steps=1, to=[])


def test_unknown_or_missing_places_to_log_are_named(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"log.to names 'mlflow'; choose from tensorboard, wandb"):
        RunLog(tmp_path, total_steps=1, to=["mlflow"])
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"log.to names wandb, which is not installed; run `pip install wandb`"):
        RunLog(tmp_path, total_steps=1, to=["wandb"])
    monkeypatch.setitem(sys.modules, "tensorboard.compat.proto", None)  # imported before or not
    with pytest.raises(ValueError, match=r"log.to names tensorboard, which is not installed"):
        RunLog(tmp_path, total_steps=1, to=["tensorboard"])


def test_tensorboard_gets_every_number_and_a_resumed_run_hides_what_it_repeats(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with RunLog(tmp_path, total_steps=100, stream=io.StringIO()) as log:
        for step in (10, 20, 30):
            log.step(step, {**METRICS, "loss": float(step)})
        log.evaluation(20, [RECORD])
    with RunLog(tmp_path, total_steps=100, resume_step=10, stream=io.StringIO()) as log:
        log.step(20, {"loss": 21.0})
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(point.step, point.value) for point in events.Scalars("train/loss")] == [(10, 10.0), (20, 21.0)]
    assert {"train/bad/no image", "train/lr"} <= set(events.Tags()["scalars"])


def test_wandb_continues_the_same_run(tmp_path, monkeypatch):
    calls: list = []
    run = types.SimpleNamespace(id="abc", define_metric=lambda *a, **k: None, log=calls.append,
                                finish=lambda: calls.append("finish"))

    def init(**options):
        calls.append(options)
        return run
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    for resume_step in (0, 10):
        with RunLog(tmp_path, total_steps=100, resume_step=resume_step, to=["wandb"], config={"seed": 1},
                    stream=io.StringIO()) as log:
            log.step(10, {"loss": 2.0})
    assert [call["id"] for call in calls if "id" in call] == [None, "abc"]
    assert calls[0]["config"] == {"seed": 1}
    assert calls[1:3] == [{"step": 10, "train/loss": 2.0}, "finish"]


def test_a_terminal_shows_one_line_and_messages_above_it(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    terminal, clock = Terminal(), Clock()
    live = LiveLine(terminal, clock=clock)
    live.say("first")
    live.update("step 1")
    clock.seconds = 0.01
    live.update("step 2")  # a moment later: left out
    live.say("warning: slow")
    clock.seconds = 1.0
    live.update("x" * 100)
    live.close()
    live.close()
    assert terminal.getvalue() == ("first\n\rstep 1\x1b[K\r\x1b[Kwarning: slow\nstep 1\r" + "x" * 39 + "\x1b[K\n")


def test_a_log_file_gets_a_plain_line_now_and_then(tmp_path):
    stream, clock = io.StringIO(), Clock()
    with RunLog(tmp_path, total_steps=40, to=[], stream=stream, plain_seconds=10, clock=clock) as log:
        for step in range(1, 41):
            clock.seconds = step * 1.0
            log.step(step, METRICS)
            if step == 15:
                log.warn("the loader is slow")
                log.warn("the loader is slow")
        log.evaluation(40, [RECORD, {**RECORD, "metric": "acc5", "ci_low": None}])
    lines = stream.getvalue().splitlines()
    assert "\r" not in stream.getvalue()
    assert [line.split("/")[0].split() for line in lines[:-1] if line.startswith("step")] == [
        ["step", "1"], ["step", "11"], ["step", "21"], ["step", "31"], ["step", "40"]]
    assert lines[1] == ("step 11/40   28%  loss 3.250 (chance 5.55)  285 samples/s  data wait 3%  ETA 29s")
    assert lines.count("warning: the loader is slow") == 1
    assert lines[-1] == "step 40  emoji_val: acc1 0.412 [0.386, 0.439] n=1,358, acc5 0.412 n=1,358"
    assert {"step": 15, "warning": "the loader is slow"} in read(tmp_path)


def test_durations_and_progress_read_well():
    assert [duration_text(s) for s in (0.2, 45, 432, 7500, 200_000)] == ["0s", "45s", "7m12s", "2h05m", "2d07h"]
    assert live_text(5, 1000, {}, None) == "step     5/1,000    0%"
    assert live_text(1000, 1000, {"loss": float("nan")}, 0.0) == "step 1,000/1,000  100%  loss nan  ETA 0s"


def test_the_timer_separates_waiting_training_and_pauses():
    clock = Clock()

    def loader():
        for index in range(4):
            clock.seconds += 1.0
            yield index

    timer = StepTimer(clock)
    clock.seconds += 50.0  # a first evaluation
    for index in timer.batches(loader()):
        clock.seconds += 3.0
        if index == 1:
            with timer.paused():
                clock.seconds += 100.0
    rates = timer.take(samples=64)
    assert rates.samples_per_second == 4.0
    assert rates.data_wait_fraction == 0.25
    assert rates.seconds == 16.0
    clock.seconds += 2.0
    assert timer.take(samples=10) == (5.0, 0.0, 2.0)


def test_the_loader_is_named_as_bottleneck_with_what_to_change():
    def ask(wait, **more):
        return loader_bottleneck(wait, **({"samples_per_second": 285.0, "workers": 2, "cores": 8} | more))
    assert ask(0.1) is None
    assert "41% of the time is spent waiting for data (285 samples/s with 2 workers); raise data.workers to 7" \
        in ask(0.41)
    assert "use data.decode=fast" in ask(0.5, workers=7)
    assert "use shards of smaller images, a faster disk" in ask(0.5, workers=8, decode="fast")


CHANCE = math.log(256)
FLAT = {"chance_loss": CHANCE, "step": 1000, "total_steps": 2000, "warmup_steps": 40, "learning_rate": 1e-3}


def test_a_falling_loss_or_an_early_step_gets_no_diagnosis():
    falling = [CHANCE + 1 - 0.05 * index for index in range(50)]
    assert flat_loss(falling, **FLAT) is None
    flat = [CHANCE + 0.001] * 50
    assert flat_loss(flat, **FLAT | {"step": 100}) is None
    assert flat_loss(flat[:5], **FLAT) is None
    assert flat_loss([float("nan")] * 50, **FLAT) is None
    assert flat_loss(flat, **FLAT | {"step": 300, "warmup_steps": 400}) is None  # an ordinary warm-up is under way


def test_a_flat_loss_is_explained_by_its_likeliest_cause():
    torch.manual_seed(0)
    flat = [CHANCE + 0.001] * 50
    healthy = torch.nn.functional.normalize(torch.randn(64, 32), dim=1)
    collapsed = torch.nn.functional.normalize(torch.randn(1, 32) + 0.01 * torch.randn(64, 32), dim=1)
    text = flat_loss(flat, **FLAT | {"warmup_steps": 10_000})
    assert "after 1,000 steps the loss is 5.546, that of guessing (5.545)" in text
    assert "the warm-up (10,000 steps) is longer than the run (2,000 steps)" in text
    assert "the warm-up takes 1,500 of 2,000 steps" in flat_loss(flat, **FLAT | {"warmup_steps": 1500})
    assert "the text features have collapsed (mean cosine 1.00" in flat_loss(
        flat, **FLAT, image_features=healthy, text_features=collapsed)
    assert "60% of a batch's captions" in flat_loss(flat, **FLAT, image_features=healthy, duplicate_fraction=0.6)
    assert "optim.lr=1e-07 is very low" in flat_loss(flat, **FLAT | {"learning_rate": 1e-7})
    assert "optim.lr=0.5 is very high" in flat_loss(flat, **FLAT | {"learning_rate": 0.5})
    assert "train.overfit_batches=1" in flat_loss(flat, **FLAT, duplicate_fraction=0.0)


def test_duplicates_and_cosines_agree_with_counting():
    tokens = torch.tensor([[1, 2], [3, 4], [1, 2], [5, 6], [1, 2]])
    assert duplicate_captions(tokens) == 3 / 5
    torch.manual_seed(0)
    features = torch.nn.functional.normalize(torch.randn(9, 5), dim=1)
    cosines = features @ features.T
    expected = (cosines.sum() - cosines.trace()) / (9 * 8)
    assert mean_cosine(features) == pytest.approx(expected.item(), abs=1e-6)
    assert mean_cosine(features[:1]) == 0.0


def test_a_full_disk_under_tensorboard_is_one_line_too(tmp_path, monkeypatch):
    with RunLog(tmp_path, total_steps=10, stream=io.StringIO()) as log:
        monkeypatch.setattr(log.sinks[0], "scalars", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
        with pytest.raises(OSError, match=r"^cannot write .*: the disk is full"):
            log.step(1, METRICS)


def test_captions_that_fill_the_context_are_told():
    tokens = torch.tensor([[5, 6, 7, 0], [5, 6, 7, 8]] + [[5, 7, 0, 0]] * 6)
    said = cut_captions(tokens, 0)
    assert said is not None and said.startswith("12% of the captions fill all 4 tokens") and "text_cfg.context_length" in said
    assert cut_captions(tokens[:1], 0) is None and cut_captions(tokens + 1, 1) == cut_captions(tokens, 0)
