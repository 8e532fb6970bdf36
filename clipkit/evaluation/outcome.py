"""What a measurement of one task leaves: numbers, the answer to each question, and what the reader has to know."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from clipkit.evaluation.results import Result

if TYPE_CHECKING:
    from pandas import DataFrame


class Outcome(NamedTuple):
    """What was measured on one task in one way."""

    results: list[Result]
    predictions: "DataFrame | None"  # one row a question: task, kind, prompts, direction, key, ..., rank; None = not kept
    notes: tuple[str, ...] = ()  # what was left out or used otherwise than one expects


def join(outcomes: Sequence[Outcome]) -> Outcome:
    """Put outcomes one after the other; equal notes once."""
    from pandas import concat

    kept = [outcome.predictions for outcome in outcomes if outcome.predictions is not None]
    notes = dict.fromkeys(note for outcome in outcomes for note in outcome.notes)
    return Outcome([result for outcome in outcomes for result in outcome.results],
                   concat(kept, ignore_index=True) if kept else None, tuple(notes))
