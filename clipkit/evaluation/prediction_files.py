"""predictions.parquet: the answers of a model, a row a question. The numbers: results.py; two models: paired.py."""

import io
from pathlib import Path
from typing import TYPE_CHECKING

from clipkit.evaluation.comparison import PREDICTIONS, read_predictions
from clipkit.evaluation.paired import TASK_COLUMNS
from clipkit.evaluation.results import Provenance
from clipkit.training.atomic_files import write_bytes_atomically

if TYPE_CHECKING:
    from pandas import DataFrame

ABOUT = ["task", "kind", "prompts"]  # rows that are equal in these are measured together


def write_predictions_file(folder: Path, predictions: "DataFrame", provenance: Provenance) -> Path:
    """Write predictions, with the model's name and the hash of its weights before them.

    What the same weights have in the file on other tasks, kinds and prompts stays; answers of other weights go.

    Args:
      folder: made if missing.
      predictions: rows as `Outcome` has them.
      provenance: whose answers they are.

    Raises:
      OSError: the file cannot be written (the older one stays).
    """
    from pandas import concat

    table = predictions.copy()
    table.insert(0, "name", provenance.name)
    table.insert(1, "weights_sha256", provenance.weights_sha256)
    others = _others(folder, table, provenance)
    content = io.BytesIO()
    (table if others is None else concat([others, table], ignore_index=True)).to_parquet(content, index=False)
    folder.mkdir(parents=True, exist_ok=True)
    write_bytes_atomically(folder / PREDICTIONS, content.getvalue())
    return folder / PREDICTIONS


def on_shared_questions(a: "DataFrame", b: "DataFrame") -> tuple["DataFrame", "DataFrame", list[str]]:
    """Leave out what only one of two tables was asked.

    Returns:
      The two tables with the tasks, kinds and prompts that both have (as they are where they share none), and for each of
      the others a line that names it.
    """
    if not set(TASK_COLUMNS) <= set(a.columns) & set(b.columns):
        return a, b, []
    asked = [dict.fromkeys(table[TASK_COLUMNS].itertuples(index=False, name=None)) for table in (a, b)]
    both = asked[0].keys() & asked[1].keys()
    if not both:
        return a, b, []
    notes = [f"only {which} was asked: {' '.join(filter(None, group))}"
             for which, groups in zip("ab", asked, strict=True) for group in groups if group not in both]
    kept = [table.loc[[group in both for group in table[TASK_COLUMNS].itertuples(index=False, name=None)]]
            for table in (a, b)]
    return kept[0], kept[1], notes


def _others(folder: Path, table: "DataFrame", provenance: Provenance) -> "DataFrame | None":
    """Those of the older rows that are of the same weights and about something else; None where there are none."""
    if provenance.weights_sha256 is None:
        return None
    try:
        before = read_predictions(folder / PREDICTIONS)
    except (FileNotFoundError, ValueError):  # a damaged file holds nothing to keep
        return None
    if "weights_sha256" not in before:
        return None
    asked = set(table[ABOUT].itertuples(index=False, name=None))
    kept = before.loc[[model == (provenance.name, provenance.weights_sha256) and about not in asked for model, about in
                       zip(before[["name", "weights_sha256"]].itertuples(index=False, name=None),
                           before[ABOUT].itertuples(index=False, name=None), strict=True)]]
    return kept if len(kept) else None
