"""The table of a campaign, in docs/benchmarks/faults.json and in docs/reliability.md."""

import json
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clipkit.training.atomic_files import write_text_atomically

RAW = Path("docs/benchmarks/faults.json")
PAGE = Path("docs/reliability.md")
BEGIN, END = "<!-- faults: written by python -m scripts.faults -->\n", "<!-- end of faults -->\n"


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: a line a kind, and one for all."""
    lines = ["| fault | number | ended equal | ended with a clear error | failed | seconds to the end, median | longest |",
             "|---|---|---|---|---|---|---|"]
    kinds = sorted({row["kind"] for row in rows})
    lines += [_line(kind, [row for row in rows if row["kind"] == kind]) for kind in kinds]
    return "\n".join([*lines, _line("**all**", rows)])


def _line(name: str, rows: Sequence[dict[str, Any]]) -> str:
    outcomes = [row["outcome"] for row in rows]
    seconds = [row["seconds"] for row in rows] or [0.0]
    counts = " | ".join(str(outcomes.count(outcome)) for outcome in ("equal", "clear error", "failed"))
    return f"| {name} | {len(rows)} | {counts} | {statistics.median(seconds):.1f} | {max(seconds):.1f} |"


def saved_rows() -> list[dict[str, Any]]:
    return json.loads(RAW.read_text(encoding="utf-8")) if RAW.exists() else []


def save_rows(rows: Sequence[dict[str, Any]]) -> None:
    """Write the rows, and the table into the page."""
    text = "[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n"
    write_text_atomically(RAW, re.sub(r"/[^\s\"]*/(site-packages|clipkit)/", r"\1/", text))  # folders of one machine
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    write_text_atomically(PAGE, f"{before}{BEGIN}\n{table(rows)}\n\n{END}{rest.partition(END)[2]}")
