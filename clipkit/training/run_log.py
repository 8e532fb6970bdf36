"""Where a run's numbers go: metrics.jsonl, TensorBoard, wandb, and the live line. Only rank 0 writes."""

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from clipkit.training.atomic_files import one_line_os_error, write_text_atomically
from clipkit.training.live_line import LiveLine
from clipkit.training.log_sinks import SINKS, Sink


class RunLog:
    """The log of one session of a run. Every method does nothing on other ranks than 0."""

    def __init__(self, run_dir: Path | str, *, total_steps: int, resume_step: int = 0,
                 to: Sequence[str] = ("tensorboard",), config: Mapping[str, Any] | None = None, is_main: bool = True,
                 stream: TextIO | None = None, plain_seconds: float = 10.0,
                 clock: Callable[[], float] = time.monotonic) -> None:
        """
        Args:
          run_dir: The run folder. Lines of metrics.jsonl after `resume_step` are dropped.
          total_steps: Steps of the whole run, for progress and ETA.
          resume_step: Steps done before this session.
          to: Besides metrics.jsonl: "tensorboard", "wandb".
          config: The run's settings, for wandb.
          is_main: False on all ranks but 0.
          stream: For the live line; standard output if None.
          plain_seconds: Least time between two live lines where `stream` is no terminal.
          clock: Seconds; tests give their own.

        Raises:
          ValueError: `to` names something unknown, or a package that is not installed.
          OSError: metrics.jsonl cannot be written; one line.
        """
        self.is_main = is_main
        self.run_dir, self.total_steps, self.last_step = Path(run_dir), total_steps, resume_step
        self.clock = clock
        self.first: tuple[int, float] | None = None  # (step, time) of the first step() call, from which ETA counts
        self.told: set[str] = set()
        self.sinks: list[Sink] = []
        if not is_main:
            return
        self.live = LiveLine(stream or sys.stdout, plain_seconds=plain_seconds, clock=clock)
        unknown = [name for name in to if name not in SINKS]
        if unknown:
            raise ValueError(f"log.to names {unknown[0]!r}; choose from {', '.join(SINKS)}")
        self.metrics_file = self.run_dir / "metrics.jsonl"
        try:
            self.sinks += [SINKS[name](self.run_dir, resume_step, dict(config or {})) for name in to]
            cut_metrics(self.metrics_file, resume_step)
            self.metrics = self.metrics_file.open("ab", buffering=0)  # each line is with the system at once
        except OSError as error:
            for sink in self.sinks:
                sink.close()
            raise one_line_os_error(error, self.metrics_file) from error

    def step(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Write one training line and show it.

        Args:
          step: Optimizer steps done.
          metrics: Names as in metrics.jsonl: samples_seen, loss, loss_minus_log_batch, lr, logit_scale,
            samples_per_second, data_wait_fraction, in_batch_accuracy_image, ...; values are numbers, or a dict of
            numbers (bad samples by cause).

        Raises:
          OSError: the line cannot be written; one line.
        """
        if not self.is_main:
            return
        self.last_step = step
        self._write({"step": step, **metrics})
        self._to_sinks(step, {f"train/{name}": value for name, value in _flat(metrics)})
        if self.first is None:
            self.first = (step, self.clock())
        text = live_text(step, self.total_steps, metrics, self._seconds_left(step))
        self.live.update(text, always=step >= self.total_steps)

    def evaluation(self, step: int, records: Iterable[Mapping[str, Any]]) -> None:
        """Write one line a record and say one line a task.

        Args:
          step: The step whose weights were measured. Evaluate before the checkpoint of that step, so that a resumed run
            neither loses these lines nor has them twice.
          records: Each with task, metric, value, n, ci_low, ci_high.

        Raises:
          OSError: the lines cannot be written; one line.
        """
        if not self.is_main:
            return
        by_task: dict[str, list[Mapping[str, Any]]] = {}
        for record in records:
            self._write({"step": step, **record})
            prompts = f" ({record['prompts']})" if record.get("prompts") else ""
            by_task.setdefault(f"{record['task']}{prompts}", []).append(record)
            self._to_sinks(step, {f"{record['task']}{prompts}/{record['metric']}": float(record["value"])})
        for task, found in by_task.items():
            self.say(f"step {step:,}  {task}: " + ", ".join(map(_metric_text, found)))

    def warn(self, text: str) -> None:
        """Say a warning once; the same words again are not repeated. It is kept in metrics.jsonl too."""
        if self.is_main and text not in self.told:
            self.told.add(text)
            self.say(f"warning: {text}")
            self._write({"step": self.last_step, "warning": text})

    def say(self, text: str) -> None:
        """Print a full line without tearing the live line."""
        if self.is_main:
            self.live.say(text)

    def close(self) -> None:
        """Flush and close everything; the last live line stays."""
        if not self.is_main or self.metrics.closed:
            return
        self.live.close()
        self.metrics.close()
        for sink in self.sinks:
            sink.close()

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()

    def _write(self, record: Mapping[str, Any]) -> None:
        line = json.dumps(_finite(record), default=float).encode() + b"\n"
        try:
            while line:  # a disk that fills up takes a part, and fails at the next
                line = line[self.metrics.write(line):]
        except OSError as error:
            raise one_line_os_error(error, self.metrics_file) from error

    def _to_sinks(self, step: int, values: Mapping[str, float]) -> None:
        try:
            for sink in self.sinks:
                sink.scalars(step, values)
        except OSError as error:
            raise one_line_os_error(error, self.run_dir) from error

    def _seconds_left(self, step: int) -> float | None:
        assert self.first is not None
        first_step, first_time = self.first
        if step <= first_step:
            return None
        return (self.clock() - first_time) / (step - first_step) * max(0, self.total_steps - step)


def cut_metrics(path: Path, last_step: int) -> int:
    """Drop the lines of metrics.jsonl after `last_step`, and a half-written last line; atomically.

    Returns:
      How many lines were dropped.
    """
    if not path.exists():
        return 0
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    kept = [line for line in lines if (step := _step_of(line)) is not None and step <= last_step]
    if len(kept) < len(lines) or (lines and not _ends_with_newline(path)):
        write_text_atomically(path, "".join(line + "\n" for line in kept))
    return len(lines) - len(kept)


def live_text(step: int, total_steps: int, metrics: Mapping[str, Any], seconds_left: float | None) -> str:
    """The status in one line: progress, loss beside chance, samples/s, data wait, ETA; only what is given."""
    width = len(f"{total_steps:,}")
    parts = [f"step {step:{width},}/{total_steps:,}", f"{step / max(1, total_steps):4.0%}"]
    if "loss" in metrics:
        loss = f"loss {metrics['loss']:.3f}"
        gap = metrics.get("loss_minus_log_batch")
        parts.append(loss if gap is None else f"{loss} (chance {metrics['loss'] - gap:.2f})")
    if "samples_per_second" in metrics:
        parts.append(f"{metrics['samples_per_second']:,.0f} samples/s")
    if "data_wait_fraction" in metrics:
        parts.append(f"data wait {metrics['data_wait_fraction']:.0%}")
    if seconds_left is not None:
        parts.append(f"ETA {duration_text(seconds_left)}")
    return "  ".join(parts)


def closing_words(run_dir: Path, *, with_sheet: bool) -> str:
    """Where a finished CLIP's model and pictures are, and what to try next."""
    sheet = f", {run_dir / 'predictions.png'}" if with_sheet else ""
    return (f"\nmodel     {run_dir / 'model'} (open_clip: local-dir:{run_dir / 'model'})\n"
            f"pictures  {run_dir / 'curves.png'}{sheet}\n"
            f"next      tensorboard --logdir {run_dir}\n"
            f"          python -c \"import clipkit, PIL.Image as P; m = clipkit.load_model('{run_dir}'); "
            "print(clipkit.zero_shot_classifier(m, ['a cat', 'a dog'])([P.open('photo.png')]))\"")


def duration_text(seconds: float) -> str:
    """45 -> "45s", 432 -> "7m12s", 7500 -> "2h05m", 200000 -> "2d07h"."""
    whole = max(0, round(seconds))
    minutes, hours, days = whole // 60, whole // 3600, whole // 86400
    if days:
        return f"{days}d{hours % 24:02d}h"
    if hours:
        return f"{hours}h{minutes % 60:02d}m"
    return f"{minutes}m{whole % 60:02d}s" if minutes else f"{whole}s"


def _metric_text(record: Mapping[str, Any]) -> str:
    low, high = record.get("ci_low"), record.get("ci_high")
    interval = f" [{low:.3f}, {high:.3f}]" if low is not None and high is not None else ""
    count = f" n={record['n']:,}" if record.get("n") is not None else ""
    return f"{record['metric']} {record['value']:.3f}{interval}{count}"


def _flat(metrics: Mapping[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    """The numbers among the metrics; {"bad": {"no image": 3}} -> [("bad/no image", 3.0)]."""
    found: list[tuple[str, float]] = []
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            found += _flat(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)):
            found.append((f"{prefix}{name}", float(value)))
    return found


def _finite(value: Any) -> Any:
    """JSON has no NaN: a non-finite number is written as null."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _step_of(line: str) -> int | None:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return None


def _ends_with_newline(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"
