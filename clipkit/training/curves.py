"""Pictures of metrics.jsonl: the curves of one run, and the losses of several runs over each other."""

import io
import json
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipkit.training.atomic_files import write_bytes_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette: told apart with any kind of colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#6A3D9A", "#555555")
STYLE = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25,
         "grid.linewidth": 0.6, "axes.titlesize": 10, "axes.titleweight": "bold", "axes.titlelocation": "left",
         "legend.frameon": False, "legend.fontsize": 8, "lines.linewidth": 1.4, "figure.dpi": 130}
Series = tuple[list[float], list[float]]  # steps, values
Panel = Callable[["Axes", Sequence[dict[str, Any]]], None]  # draws records into axes


def plot_curves(run_dir: Path | str, out: Path | str | None = None, *, panels: Sequence[Panel] | None = None) -> Path:
    """Draw the curves of a run, three panels in a row.

    Args:
      run_dir: The run folder, with metrics.jsonl.
      out: The PNG; curves.png in the run folder if None. Replaced as a whole.
      panels: Three or six; None = a CLIP's: loss, in-batch accuracy, evaluation, learning rate, logit scale, throughput.

    Returns:
      The PNG's path.

    Raises:
      FileNotFoundError: there is no metrics.jsonl.
    """
    run_dir = Path(run_dir)
    records = read_metrics(run_dir / "metrics.jsonl")
    with _style():
        chosen = panels or (_draw_loss, _draw_in_batch_accuracy, _draw_evaluation, _draw_learning_rate, _draw_logit_scale,
                            _draw_throughput)
        rows = len(chosen) // 3
        figure = _new_figure(11, 3.1 * rows)
        for axes, draw in zip(figure.subplots(rows, 3).flatten(), chosen, strict=True):
            draw(axes, records)
            _finish(axes)
        figure.suptitle(run_dir.resolve().name, x=0.012, ha="left", fontweight="bold", fontsize=12)
        return _save(figure, Path(out) if out else run_dir / "curves.png")


def overlay(paths: Sequence[Path | str], labels: Sequence[str], out: Path | str, *, title: str = "") -> Path:
    """Draw the training losses of several runs over each other, and below how far each is from the first.

    Args:
      paths: Run folders or metrics.jsonl files; the first is what the others are compared with.
      labels: One a path.
      out: The PNG.
      title: Above the picture.

    Returns:
      The PNG's path.

    Raises:
      ValueError: `paths` and `labels` differ in number, or there are none.
      FileNotFoundError: a file is missing.
    """
    if not paths or len(paths) != len(labels):
        raise ValueError(f"got {len(paths)} paths and {len(labels)} labels; give one label a path, at least one")
    files = [Path(path) / "metrics.jsonl" if Path(path).is_dir() else Path(path) for path in paths]
    curves = [series(read_metrics(file), "loss") for file in files]
    reference = dict(zip(*curves[0], strict=True))
    with _style():
        figure = _new_figure(7.2, 4.8)
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        for index, ((steps, losses), label) in enumerate(zip(curves, labels, strict=True)):
            colour = COLOURS[index % len(COLOURS)]
            width = max(1.0, 9.0 * 0.58**index)  # each on top of a wider one: equal curves all stay visible
            above.plot(steps, losses, label=label, color=colour, linewidth=width, solid_capstyle="butt")
            shared = [(step, abs(loss - reference[step]) / abs(reference[step]))
                      for step, loss in zip(steps, losses, strict=True) if reference.get(step)]
            if index and shared:
                below.plot(*zip(*shared, strict=True), color=colour, linewidth=1.2)
        above.set_title(title or "training loss")
        above.set_ylabel("loss, nats")
        above.legend()
        below.set_ylabel("relative\ndifference")
        below.set_xlabel("step")
        below.set_yscale("symlog", linthresh=1e-8)
        below.set_ylim(bottom=0)
        return _save(figure, Path(out))


def metric_panel(title: str, *names: str) -> Panel:
    """A panel of training metrics by their names in metrics.jsonl."""
    return partial(_draw_metrics, title=title, names=names)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read metrics.jsonl; a last line that is still being written is left out.

    Raises:
      FileNotFoundError: the file is missing.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}; give a run folder in which training has begun")
    records = []
    for line in path.read_text(encoding="utf-8").split("\n"):
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return [record for record in records if isinstance(record, dict) and "step" in record]


def series(records: Sequence[dict[str, Any]], name: str) -> Series:
    """Return the steps and values of one training metric, without those that are null (non-finite)."""
    points = [(record["step"], record[name]) for record in records
              if "task" not in record and record.get(name) is not None]
    return [float(step) for step, _ in points], [float(value) for _, value in points]


def _draw_loss(axes: "Axes", records: Sequence[dict[str, Any]]) -> None:
    axes.set_title("loss, nats")
    steps, losses = series(records, "loss")
    _plot_smooth(axes, steps, losses, COLOURS[0])
    validation = [(one["step"], one["value"]) for one in records if one.get("metric") == "loss"]
    if validation:
        axes.plot(*zip(*validation, strict=True), marker="o", markersize=3, color=COLOURS[1], label="validation")
    gaps = series(records, "loss_minus_log_batch")[1]
    if losses and len(gaps) == len(losses):
        chance = losses[-1] - gaps[-1]
        axes.axhline(chance, color="#555555", linestyle=":", linewidth=1)
        axes.annotate("guessing: log(global batch)", (1, chance), xycoords=("axes fraction", "data"), ha="right",
                      va="bottom", fontsize=8, color="#555555")


def _draw_metrics(axes: "Axes", records: Sequence[dict[str, Any]], *, title: str, names: Sequence[str]) -> None:
    axes.set_title(title)
    for index, name in enumerate(names):
        _plot_smooth(axes, *series(records, name), COLOURS[index % len(COLOURS)], name if len(names) > 1 else None)
    _from_zero(axes)


def _draw_in_batch_accuracy(axes: "Axes", records: Sequence[dict[str, Any]]) -> None:
    axes.set_title("in-batch accuracy")
    names = sorted({name for record in records for name in record if name.startswith("in_batch_accuracy")})
    for index, name in enumerate(names):
        label = name.removeprefix("in_batch_accuracy").strip("_").replace("_", " ") or None
        _plot_smooth(axes, *series(records, name), COLOURS[index % len(COLOURS)], label)
    _from_zero(axes)


def _draw_evaluation(axes: "Axes", records: Sequence[dict[str, Any]]) -> None:
    axes.set_title("evaluation")
    measured = [record for record in records if "task" in record and record.get("value") is not None
                and record["metric"] != "loss"]
    names = list(dict.fromkeys(map(_measure, measured)))
    for index, name in enumerate(names[: len(COLOURS)]):
        points = sorted((one["step"], one["value"], one.get("ci_low"), one.get("ci_high"))
                        for one in measured if _measure(one) == name)
        steps, values, low, high = (list(column) for column in zip(*points, strict=True))
        axes.plot(steps, values, marker="o", markersize=3, color=COLOURS[index], label=name)
        if None not in low and None not in high:
            axes.fill_between(steps, low, high, color=COLOURS[index], alpha=0.12, linewidth=0)
    _from_zero(axes)


def _measure(record: dict[str, Any]) -> str:
    prompts = f", {record['prompts']}" if record.get("prompts") else ""
    return f"{record['task']} {record['metric']}{prompts}"


def _draw_learning_rate(axes: "Axes", records: Sequence[dict[str, Any]]) -> None:
    axes.set_title("learning rate")
    axes.plot(*series(records, "lr"), color=COLOURS[2])
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    _from_zero(axes)


def _draw_logit_scale(axes: "Axes", records: Sequence[dict[str, Any]]) -> None:
    axes.set_title("logit scale (1 / temperature)")
    axes.plot(*series(records, "logit_scale"), color=COLOURS[3])


def _draw_throughput(axes: "Axes", records: Sequence[dict[str, Any]]) -> None:
    axes.set_title("samples per second")
    axes.plot(*series(records, "samples_per_second"), color=COLOURS[7])
    _from_zero(axes)


def _plot_smooth(axes: "Axes", steps: list[float], values: list[float], colour: str, label: str | None = None) -> None:
    """The values pale, and over them their mean over a window of a fiftieth of the points."""
    half = len(values) // 100
    smooth = [math.fsum(window) / len(window) for index in range(len(values))
              if (window := values[max(0, index - half): index + half + 1])]
    axes.plot(steps, values, color=colour, alpha=0.3 if half else 1.0, linewidth=0.8 if half else 1.4,
              label=None if half else label)
    if half:
        axes.plot(steps, smooth, color=colour, label=label)


def _from_zero(axes: "Axes") -> None:
    highest = axes.dataLim.y1 if axes.has_data() else 0.0
    axes.set_ylim(0, 1.08 * highest if 0 < highest < math.inf else 1.0)


def _finish(axes: "Axes") -> None:
    axes.set_xlabel("step")
    if not axes.has_data():
        axes.text(0.5, 0.5, "nothing logged yet", transform=axes.transAxes, ha="center", color="#777777")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="best")
    axes.margins(x=0.02)


def _new_figure(width: float, height: float) -> "Figure":
    """A figure of its own, not pyplot's: nothing global, no display. Saved as PNG, it is drawn by Agg."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _style() -> Any:
    import matplotlib

    return matplotlib.rc_context(STYLE)  # pyright: ignore[reportArgumentType]


def _save(figure: "Figure", path: Path) -> Path:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    write_bytes_atomically(path, buffer.getvalue())
    return path
