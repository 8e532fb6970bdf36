"""Figures of a report as inline SVG: interval bars, histograms, the reliability diagram. Colours are the page's CSS."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from clipkit.evaluation.calibration import ReliabilityBin
from clipkit.evaluation.report_page import escape

BAR_WIDTH, BAR_HEIGHT = 100, 6
TICK_STEPS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.25)  # of an axis of fractions
MAX_TICKS = 6


class Curve(NamedTuple):
    """A line of fractions."""

    name: str
    points: Sequence[tuple[float, float]]  # (x, fraction), rising in x
    intervals: Sequence[tuple[float, float]] = ()  # of each point
    single: Sequence[tuple[float, float]] = ()  # (x, fraction) of what a point is the mean of
    chosen: float | None = None  # x of the point that is emphasised


def interval_bar(value: float, low: float, high: float) -> str:
    """Draw a fraction and its interval on a line from 0 to 1."""
    left, right, here = (BAR_WIDTH * min(max(number, 0.0), 1.0) for number in (low, high, value))
    return (f'<svg class="interval" viewBox="0 0 {BAR_WIDTH} {BAR_HEIGHT}" preserveAspectRatio="none" aria-hidden="true">'
            f'<rect class="track" y="2.5" width="{BAR_WIDTH}" height="1"/>'
            f'<rect class="range" x="{left:.2f}" y="1" width="{max(right - left, 0.5):.2f}" height="4"/>'
            f'<rect class="mark" x="{min(max(here - 0.75, 0.0), BAR_WIDTH - 1.5):.2f}" width="1.5" height="{BAR_HEIGHT}"/>'
            "</svg>")


def difference_bar(value: float, low: float, high: float, limit: float) -> str:
    """Draw a difference and its interval around 0, on a line from -limit to limit."""
    left, right, here = (BAR_WIDTH * (0.5 + min(max(number / limit, -1.0), 1.0) / 2) for number in (low, high, value))
    clear = "" if low <= 0 <= high else " clear"
    return (f'<svg class="interval difference" viewBox="0 0 {BAR_WIDTH} {BAR_HEIGHT}" preserveAspectRatio="none" '
            'aria-hidden="true">'
            f'<rect class="track" y="2.5" width="{BAR_WIDTH}" height="1"/>'
            f'<rect class="track" x="{BAR_WIDTH / 2 - 0.4:.1f}" width="0.8" height="{BAR_HEIGHT}"/>'
            f'<rect class="range{clear}" x="{left:.2f}" y="1" width="{max(right - left, 0.5):.2f}" height="4"/>'
            f'<rect class="mark{clear}" x="{min(max(here - 0.75, 0.0), BAR_WIDTH - 1.5):.2f}" width="1.5" '
            f'height="{BAR_HEIGHT}"/></svg>')


def curves_figure(curves: Sequence[Curve], *, title: str, axis: str, ticks: Sequence[tuple[float, str]],
                  levels: Sequence[tuple[str, float]] = ()) -> str:
    """Draw fractions over a quantity.

    Args:
      curves: one or two, the first in the accent colour, the second grey.
      title: read to those who cannot see the figure.
      axis: what x is.
      ticks: (x, label) below the figure.
      levels: (name, fraction) of lines across all x.
    """
    legend_height = 24 if len(curves) > 1 else 0
    width, height, left, right, top, bottom = 440, 300 + legend_height, 44, 16, 12 + legend_height, 46
    xs = [x for curve in curves for x, _ in curve.points] + [x for x, _ in ticks]
    shown = [y for curve in curves for y in (*(y for _, y in (*curve.points, *curve.single)),
                                             *(end for interval in curve.intervals for end in interval))]
    marks = _fraction_ticks([*shown, *(value for _, value in levels)])
    low, high, first = marks[0], marks[-1], min(xs)
    inner, tall = width - left - right - 24, height - top - bottom

    def at(x: float, y: float) -> tuple[float, float]:
        return left + 12 + inner * (x - first) / ((max(xs) - first) or 1), top + tall * (high - y) / (high - low)

    parts = [f'<line class="grid" x1="{left}" x2="{width - right}" y1="{at(0, mark)[1]:.1f}" y2="{at(0, mark)[1]:.1f}"/>'
             f'<text class="end" x="{left - 6}" y="{at(0, mark)[1] + 4:.1f}">{mark:.0%}</text>' for mark in marks]
    parts += [f'<text x="{at(x, 0)[0]:.1f}" y="{height - bottom + 18}">{escape(label)}</text>' for x, label in ticks]
    for name, value in levels:
        y = at(0, value)[1]
        parts.append(f'<line class="diagonal" x1="{left}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}"/>'
                     f'<text class="start count" x="{left + 4}" y="{y - 5:.1f}">{escape(name)}</text>')
    for number, curve in reversed(list(enumerate(curves))):  # the first on top
        parts += [f'<circle class="draw" cx="{at(x, y)[0]:.1f}" cy="{at(x, y)[1]:.1f}" r="2"/>' for x, y in curve.single]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(*point) for point in curve.points))
        parts.append(f'<polyline class="curve c{number}" points="{path}"/>')
        parts += [f'<line class="whisker" x1="{at(x, 0)[0]:.1f}" x2="{at(x, 0)[0]:.1f}" y1="{at(x, ends[1])[1]:.1f}" '
                  f'y2="{at(x, ends[0])[1]:.1f}"/>' for (x, _), ends in zip(curve.points, curve.intervals, strict=False)]
        parts += [f'<circle class="dot c{number}" cx="{at(x, y)[0]:.1f}" cy="{at(x, y)[1]:.1f}" '
                  f'r="{5.5 if x == curve.chosen else 3}"/>' for x, y in curve.points]
    for number, curve in enumerate(curves if len(curves) > 1 else ()):
        parts.append(_legend_entry(curve.name, number, left + 6 + 170 * number, 16))
    parts.append(f'<text x="{left + (width - left - right) / 2}" y="{height - 8}">{escape(axis)}</text>')
    return _svg(width, height, title, "".join(parts))


def histogram(bars: Sequence[tuple[str, int]], *, title: str, axis: str, num_strong: int = 0) -> str:
    """Draw counts as upright bars.

    Args:
      bars: (label below, count) of each bar.
      title: read to those who cannot see the figure.
      axis: what the labels mean.
      num_strong: the first bars that are drawn in full colour; the others are paler.
    """
    width, height, left, top, bottom = 420, 190, 8, 22, 44
    step = (width - 2 * left) / len(bars)
    tallest = max((count for _, count in bars), default=0) or 1
    parts = []
    for number, (label, count) in enumerate(bars):
        tall = (height - top - bottom) * count / tallest
        x, y = left + number * step, height - bottom - tall
        strength = "bar strong" if number < num_strong else "bar"
        parts.append(f'<rect class="{strength}" x="{x + step * 0.09:.1f}" y="{y:.1f}" width="{step * 0.82:.1f}" '
                     f'height="{tall:.1f}" rx="1.5"/>'
                     f'<text class="count" x="{x + step / 2:.1f}" y="{y - 5:.1f}">{count or ""}</text>'
                     f'<text x="{x + step / 2:.1f}" y="{height - bottom + 15}">{escape(label)}</text>')
    parts.append(f'<line class="axis" x1="{left}" x2="{width - left}" y1="{height - bottom + 0.5}" '
                 f'y2="{height - bottom + 0.5}"/><text x="{width / 2}" y="{height - 8}">{escape(axis)}</text>')
    return _svg(width, height, title, "".join(parts))


def reliability_diagram(curves: Sequence[tuple[str, Sequence[ReliabilityBin]]]) -> str:
    """Draw accuracy over confidence, and below how many answers each bin holds.

    Args:
      curves: one or two of (name, bins with images); the first in the accent colour, the second grey. A dot's area grows
        with its bin; lines through those of the first are 95 % intervals.
    """
    side, left, top, gap, low_height = 300, 44, 12, 30, 44
    width, height = left + side + 16, top + side + gap + low_height + 34
    parts = [_grid(left, top, side)]
    most = max(one.n for _, bins in curves for one in bins)
    floor = top + side + gap + low_height
    for number, (_, bins) in reversed(list(enumerate(curves))):  # the first on top
        dots = [(left + side * one.confidence, top + side * (1 - one.accuracy), 2.2 + 5.8 * math.sqrt(one.n / most))
                for one in bins]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y, _ in dots)
        parts.append(f'<polyline class="curve c{number}" points="{path}"/>')
        if number == 0:
            parts += [f'<line class="whisker" x1="{x:.1f}" x2="{x:.1f}" y1="{top + side * (1 - one.ci_high):.1f}" '
                      f'y2="{top + side * (1 - one.ci_low):.1f}"/>' for (x, _, _), one in zip(dots, bins, strict=True)]
        parts += [f'<circle class="dot c{number}" cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}"/>' for x, y, radius in dots]
        share = 0.86 / len(curves)
        for one in bins:
            x = left + side * (one.low + (one.high - one.low) * (0.07 + number * share))
            tall = low_height * one.n / most
            parts.append(f'<rect class="bin c{number}" x="{x:.1f}" y="{floor - tall:.1f}" '
                         f'width="{side * (one.high - one.low) * share:.1f}" height="{max(tall, 0.7):.1f}"/>')
    parts.append(f'<line class="axis" x1="{left}" x2="{left + side}" y1="{floor + 0.5}" y2="{floor + 0.5}"/>'
                 f'<text class="end" x="{left - 6}" y="{floor - low_height + 9}">{most}</text>'
                 f'<text class="end" x="{left - 6}" y="{floor}">0</text>'
                 f'<text x="{left + side / 2}" y="{floor + 20}">probability of the guess</text>')
    for number, (name, _) in enumerate(curves):
        parts.append(_legend_entry(name, number, left + 16, top + 17 + 18 * number))
    return _svg(width, height, "Reliability diagram: share of right guesses over their probability", "".join(parts))


def _grid(left: int, top: int, side: int) -> str:
    """The square of the reliability diagram: its frame, ticks and diagonal."""
    parts = [f'<rect class="frame" x="{left}" y="{top}" width="{side}" height="{side}"/>'
             f'<line class="diagonal" x1="{left}" y1="{top + side}" x2="{left + side}" y2="{top}"/>'
             f'<text transform="translate(12 {top + side / 2}) rotate(-90)">share that is right</text>']
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        x, y = left + side * tick, top + side * (1 - tick)
        parts.append(f'<text class="end" x="{left - 6}" y="{y + 4:.1f}">{tick:g}</text>'
                     f'<text x="{x:.1f}" y="{top + side + 16}">{tick:g}</text>')
        if 0 < tick < 1:
            parts.append(f'<line class="grid" x1="{left}" x2="{left + side}" y1="{y:.1f}" y2="{y:.1f}"/>'
                         f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{top + side}"/>')
    return "".join(parts)


def _legend_entry(name: str, number: int, left: float, top: float) -> str:
    return (f'<circle class="dot c{number}" cx="{left}" cy="{top - 4}" r="5"/>'
            f'<text class="start" x="{left + 12}" y="{top}">{escape(name)}</text>')


def _fraction_ticks(values: Sequence[float]) -> list[float]:
    """Round fractions that hold all values between the first and the last, about MAX_TICKS."""
    def bounds(step: float) -> tuple[int, int]:
        low = min(math.floor(min(values) / step + 1e-9), round(1 / step) - 1)
        return low, max(math.ceil(max(values) / step - 1e-9), low + 1)

    step = next((step for step in TICK_STEPS if bounds(step)[1] - bounds(step)[0] < MAX_TICKS), TICK_STEPS[-1])
    return [number * step for number in range(bounds(step)[0], bounds(step)[1] + 1)]


def _svg(width: int, height: int, title: str, content: str) -> str:
    return (f'<svg class="figure" viewBox="0 0 {width} {height}" style="max-width:{width}px" role="img">'
            f"<title>{escape(title)}</title>{content}</svg>")
