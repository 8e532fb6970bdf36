"""Stored predictions in, a table for people out. The statistics between the two: paired.py."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from clipkit.evaluation.paired import PairedResult
from clipkit.evaluation.results import align

if TYPE_CHECKING:
    from pandas import DataFrame

PREDICTIONS = "predictions.parquet"


def read_predictions(source: Path) -> "DataFrame":
    """Read what `clipkit zero-shot` wrote.

    Args:
      source: a run, a folder of results, or a predictions.parquet.

    Raises:
      FileNotFoundError: there is none.
      ValueError: the file cannot be read as one.
    """
    from pandas import read_parquet

    source = source.expanduser()
    places = [source, source / PREDICTIONS, source / "zero_shot" / PREDICTIONS]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        raise FileNotFoundError(f"{source} has no {PREDICTIONS}; write it with: clipkit zero-shot model={source}")
    try:
        return read_parquet(path)
    except Exception as error:  # pyarrow raises several kinds
        raise ValueError(f"{path} cannot be read as predictions ({error}); write it again with: clipkit zero-shot") from error


def comparison_table(results: Sequence[PairedResult]) -> str:
    """Write comparisons as plain text: the two values, their difference with its 95 % interval, and p (Holm)."""
    cells = [["task", "prompts", "metric", "n", "a", "b", "b - a", "95 %", "only a", "only b", "p", "p (Holm)"]]
    cells += [[result.task, result.prompts, result.metric, f"{result.n:,}", f"{result.value_a:.1%}", f"{result.value_b:.1%}",
               f"{result.difference * 100:+.1f}", f"{result.ci_low * 100:+.1f} to {result.ci_high * 100:+.1f}",
               f"{result.only_a:,}", f"{result.only_b:,}", f"{result.p_value:.2g}", f"{result.p_holm:.2g}"]
              for result in results]
    return align(cells)
