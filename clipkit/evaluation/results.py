"""The numbers of an evaluation: one record each, written as CSV and JSON, and shown as a table."""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from clipkit.evaluation.image_sets import CHOICE
from clipkit.training.atomic_files import write_text_atomically

SCHEMA_VERSION = 1
MAX_TASK_LENGTH = 30  # characters, in the table for people
NO_FRACTIONS = ("nll", "nll_100", "lp_lambda", "knn_k", "knn_temperature", "image_retrieval_median_rank",
                "text_retrieval_median_rank")
SHORT = {"_retrieval_recall": " R", "_retrieval_median_rank": " median", "mean_per_class_recall": "class recall",
         "mean_average_precision": "mAP"}
ABOUT = ("task", "split", "kind", "prompts")  # rows that are equal in these are measured together
CURE = "move the results away, or give out=<another folder>"
# Not in the table: it has to fit a terminal.
ONLY_IN_FILES = ("ece_100", "nll", "nll_100", "tie_rate", "lp_lambda", "knn_k", "knn_temperature",
                 "mean_average_precision_11_points")
LEARNED = {"linear_probe": "lp_", "knn": "knn_"}  # what stands before the accuracies of kinds that learn from labels


@dataclass(frozen=True)
class Result:
    """One number of one task."""

    task: str
    split: str
    kind: str
    metric: str  # CLIP_benchmark's name
    value: float  # a fraction, but for nll (nats), median ranks (the first place is 1) and lambda
    n: int  # images or captions that were asked about
    ci_low: float | None  # 95 % interval; None for what has none
    ci_high: float | None
    num_classes: int | None  # None where there are no classes
    prompts: str  # the rule that wrote the texts; "" where none was needed
    n_bad: int  # samples that could not be used


@dataclass(frozen=True)
class Provenance:
    """What was measured, and with what."""

    name: str  # run or model
    pretrained: str | None
    precision: str
    weights_sha256: str | None
    step: int | None
    clipkit_version: str


def write_results(folder: Path, results: Sequence[Result], provenance: Provenance) -> None:
    """Write `results.csv` and `results.json` (the same rows), a row a number.

    What the same weights have there on other tasks, splits, kinds and prompts stays; results of other weights go.

    Args:
      folder: made if missing.
      results: at least one.
      provenance: what was measured.

    Raises:
      ValueError: there are no results, or those in the folder cannot be read (see `read_results`).
    """
    if not results:
        raise ValueError("there are no results to write; evaluate at least one task")
    rows = [{"schema_version": SCHEMA_VERSION, "name": provenance.name, "pretrained": provenance.pretrained,
             **asdict(result), "precision": provenance.precision, "weights_sha256": provenance.weights_sha256,
             "step": provenance.step, "clipkit_version": provenance.clipkit_version} for result in results]
    rows = _others(read_results(folder), rows) + rows
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    folder.mkdir(parents=True, exist_ok=True)
    write_text_atomically(folder / "results.csv", text.getvalue())
    write_text_atomically(folder / "results.json", json.dumps(rows, indent=1) + "\n")


def read_results(folder: Path) -> list[dict[str, Any]]:
    """Read the rows of `results.json`; none where nothing was written.

    Raises:
      ValueError: the results are of another schema version, or damaged.
    """
    readers = {"results.csv": lambda text: list(csv.DictReader(io.StringIO(text))), "results.json": json.loads}
    rows: list[dict[str, Any]] = []
    for name, read in readers.items():
        if not (folder / name).is_file():
            continue
        try:
            rows = read((folder / name).read_text(encoding="utf-8"))
            versions = {str(row["schema_version"]) for row in rows}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{folder / name} cannot be read as results ({type(error).__name__}: {error}); {CURE}") from error
        if versions - {str(SCHEMA_VERSION)}:
            raise ValueError(f"{folder / name} holds results of schema version {', '.join(sorted(versions))}, this clipkit "
                             f"writes {SCHEMA_VERSION}; {CURE}")
    return rows if (folder / "results.json").is_file() else []


def _others(before: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those of the older rows that are of the same weights and about something else."""
    of_weights = {(row["name"], row["weights_sha256"]) for row in rows if row["weights_sha256"]}
    about = {tuple(row[name] for name in ABOUT) for row in rows}
    return [row for row in before if (row["name"], row["weights_sha256"]) in of_weights
            and tuple(row[name] for name in ABOUT) not in about]


def hit_metric(kind: str, direction: str, k: int = 1) -> str:
    """Name the share of answers whose rank is below k. In choices rank 0 is right and 1 is wrong."""
    if kind == CHOICE:
        return f"{direction}_acc" if direction else "acc"
    return f"{direction}_recall@{k}" if direction else f"{LEARNED.get(kind, '')}acc{k}"


def is_of_group(metric: str) -> bool:
    """Whether a metric is that of one group: acc1[style=noto]. Only files and the report have these."""
    return metric.endswith("]")


def results_table(results: Sequence[Result]) -> str:
    """Write results as plain text for people: a table a kind, a line for each task and prompt rule, metrics as columns.

    Returns:
      The text without a final newline; fractions in percent, each value with its 95 % interval.
    """
    results = [result for result in results if result.metric not in ONLY_IN_FILES and not is_of_group(result.metric)]
    return "\n\n".join(
        align(_cells([result for result in results if result.kind == kind]))
        for kind in dict.fromkeys(result.kind for result in results)
    )


def _cells(results: Sequence[Result]) -> list[list[str]]:
    """The cells of one kind's table, header first."""
    metrics = list(dict.fromkeys(result.metric for result in results))
    cells = [["task", "n", "classes", "prompts", *(short_name(metric) for metric in metrics)]]
    for task, prompts in dict.fromkeys((result.task, result.prompts) for result in results):
        line = {result.metric: result for result in results if (result.task, result.prompts) == (task, prompts)}
        sizes = " / ".join(dict.fromkeys(str(result.n) for result in line.values()))  # captions / images in retrieval
        classes = next(str(result.num_classes or "") for result in line.values())
        values = [_shown(line[metric]) if metric in line else "" for metric in metrics]
        cells.append([_shorten(task), sizes, classes, prompts, *values])
    return cells


def _shorten(task: str) -> str:
    """The end of a long path."""
    return task if len(task) <= MAX_TASK_LENGTH else "..." + task[-MAX_TASK_LENGTH + 3:]


def short_name(metric: str) -> str:
    """The name of a metric as a table's column: CLIP_benchmark's, the long ones in short."""
    for long, short in SHORT.items():
        metric = metric.replace(long, short)
    return metric


def _shown(result: Result) -> str:
    scale, digits, unit = (1, 1, "") if result.metric in NO_FRACTIONS else (100, 1, "%")
    value = f"{result.value * scale:.{digits}f}{unit}"
    if result.ci_low is None or result.ci_high is None:
        return value
    return f"{value} ({result.ci_low * scale:.{digits}f}-{result.ci_high * scale:.{digits}f})"


def align(cells: list[list[str]]) -> str:
    """Pad the cells of a table to columns; a rule below the header."""
    keep = [column for column in range(len(cells[0])) if any(line[column] for line in cells[1:])]
    widths = {column: max(len(line[column]) for line in cells) for column in keep}
    lines = ["  ".join(line[column].ljust(widths[column]) for column in keep).rstrip() for line in cells]
    return "\n".join([lines[0], "  ".join("-" * widths[column] for column in keep), *lines[1:]])
