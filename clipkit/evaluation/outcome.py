"""What a measurement of one task leaves: numbers, the answer to each question, and what the reader has to know."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

from clipkit.evaluation.results import Result
from clipkit.training.atomic_files import write_text_atomically

if TYPE_CHECKING:
    from pandas import DataFrame

TABLES = ("templates", "classes", "lambdas", "neighbours", "draws", "suite")  # the names that tables go by


class Outcome(NamedTuple):
    """What was measured on one task in one way."""

    results: list[Result]
    predictions: "DataFrame | None"  # one row a question: task, kind, prompts, direction, key, ..., rank; None = not kept
    notes: tuple[str, ...] = ()  # what was left out or used otherwise than one expects
    # What one number cannot say, by one of TABLES; columns: task, kind, prompts, ...
    tables: "Mapping[str, DataFrame]" = MappingProxyType({})


def join(outcomes: Sequence[Outcome]) -> Outcome:
    """Put outcomes one after the other; equal notes once."""
    from pandas import concat

    kept = [outcome.predictions for outcome in outcomes if outcome.predictions is not None]
    notes = dict.fromkeys(note for outcome in outcomes for note in outcome.notes)
    tables: dict[str, list[DataFrame]] = {}
    for outcome in outcomes:
        for name, table in outcome.tables.items():
            tables.setdefault(name, []).append(table)
    return Outcome([result for outcome in outcomes for result in outcome.results],
                   concat(kept, ignore_index=True) if kept else None, tuple(notes),
                   {name: concat(parts, ignore_index=True) for name, parts in tables.items()})


def named_table(table: "DataFrame", *, task: str, kind: str, prompts: str) -> "DataFrame":
    """Say in the first columns what a table is of."""
    for place, (name, value) in enumerate({"task": task, "kind": kind, "prompts": prompts}.items()):
        table.insert(place, name, value)
    return table


def write_tables(folder: Path, tables: "Mapping[str, DataFrame]") -> list[Path]:
    """Write each table as <name>.csv into a folder that is there, in the place of all that are there; return the files."""
    for name in TABLES:
        (folder / f"{name}.csv").unlink(missing_ok=True)
    paths = [folder / f"{name}.csv" for name in tables]
    for path, table in zip(paths, tables.values(), strict=True):
        write_text_atomically(path, table.to_csv(index=False, lineterminator="\n"))
    return paths
