"""A measured line between two models as text for people and as a picture."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from clipkit.evaluation.interpolation import Point
from clipkit.evaluation.results import Result, align
from clipkit.training.atomic_files import write_bytes_atomically
from clipkit.training.curves import COLOURS, STYLE

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def points_text(points: Mapping[str, Point], chosen: str) -> str:
    """Write points as a table, a line a model; the chosen one has a mark."""
    first = next(iter(points.values()))
    header = ["", "model", *(f"{result.task} {result.metric}" for result in (*first.target, *first.against))]
    lines = [["*" if name == chosen else "", name, *map(_shown, (*point.target, *point.against))]
             for name, point in points.items()]
    return align([header, *lines])


def draw_line(points: Mapping[float, Point], chosen: float, path: Path, *, title: str) -> None:
    """Draw accuracy over alpha with intervals, and what was won over what was forgotten.

    Args:
      points: by alpha, rising, both ends included.
      chosen: the alpha that is marked.
      path: the PNG; replaced as a whole.
      title: above the picture.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):  # pyright: ignore[reportArgumentType]
        has_against = bool(points[chosen].against)
        figure = Figure(figsize=(9, 3.6) if has_against else (5, 3.6), layout="constrained")
        axes = figure.subplots(1, 2 if has_against else 1, squeeze=False)[0]
        _draw_accuracies(axes[0], points, chosen)
        if has_against:
            _draw_won_and_forgotten(axes[1], points, chosen)
        figure.suptitle(title, x=0.012, ha="left", fontweight="bold", fontsize=12)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
    write_bytes_atomically(path, buffer.getvalue())


def _draw_accuracies(axes: "Axes", points: Mapping[float, Point], chosen: float) -> None:
    """A line a task: solid for those tuned for, dashed for the others."""
    at = list(points)
    targets = len(points[chosen].target)
    for number in range(targets + len(points[chosen].against)):
        results = [(*point.target, *point.against)[number] for point in points.values()]
        colour = COLOURS[number % len(COLOURS)]
        axes.plot(at, [100 * result.value for result in results], "-o" if number < targets else "--o", color=colour,
                  markersize=3, label=results[0].task)
        low = [100 * result.ci_low for result in results if result.ci_low is not None]
        high = [100 * result.ci_high for result in results if result.ci_high is not None]
        if len(low) == len(high) == len(at):
            axes.fill_between(at, low, high, color=colour, alpha=0.12, linewidth=0)
    axes.axvline(chosen, color="#555555", linestyle=":", linewidth=1)
    axes.set_title("accuracy, %")
    axes.set_xlabel("alpha (0 = before, 1 = fine-tuned)")
    axes.legend()


def _draw_won_and_forgotten(axes: "Axes", points: Mapping[float, Point], chosen: float) -> None:
    """Points of accuracy since alpha 0: those on the target tasks over those on the others."""
    start = points[min(points)]
    kept = {alpha: 100 * (point.against_mean - start.against_mean) for alpha, point in points.items()}
    won = {alpha: 100 * (point.target_mean - start.target_mean) for alpha, point in points.items()}
    axes.plot(list(kept.values()), list(won.values()), "-o", color=COLOURS[0], markersize=3)
    axes.plot(kept[chosen], won[chosen], "o", color=COLOURS[1], markersize=9, fillstyle="none", markeredgewidth=1.6)
    for alpha in sorted({min(points), chosen, max(points)}):
        axes.annotate(f"{alpha:g}", (kept[alpha], won[alpha]), textcoords="offset points", xytext=(7, -9), fontsize=8)
    axes.axvline(0, color="#555555", linestyle=":", linewidth=1)
    axes.set_title("won, points")
    axes.set_xlabel("on tasks not tuned for, points (left of 0: forgotten)")


def _shown(result: Result) -> str:
    value = f"{result.value:.1%}"
    if result.ci_low is None or result.ci_high is None:
        return value
    return f"{value} ({100 * result.ci_low:.1f}-{100 * result.ci_high:.1f})"
