"""Prompts as a person gives them: texts, and files of texts."""

import csv
from collections.abc import Sequence
from pathlib import Path

from clipkit.data.tables import CAPTION_COLUMNS

COLUMNS = ("prompt", "prompts", *CAPTION_COLUMNS)
SEPARATORS = {".csv": ",", ".tsv": "\t"}


def read_prompts(given: Sequence[str]) -> list[str]:
    """Collect prompts.

    Args:
      given: texts, .txt files (one prompt a line; empty lines are none) and .csv or .tsv files (the first of COLUMNS).

    Returns:
      All of them in order, without white space around them.

    Raises:
      FileNotFoundError: a file is not there.
      ValueError: a text or a file is empty, or a table has no such column.
    """
    prompts: list[str] = []
    for text in given:
        suffix = Path(text).suffix.lower() if "\n" not in text else ""
        is_file = suffix == ".txt" or suffix in SEPARATORS
        found = _read_file(Path(text).expanduser(), suffix) if is_file else [text.strip()]
        if not all(found) or not found:
            raise ValueError(f"prompts has {text!r}, which holds no text; give a text in words, as in prompts='a red heart', "
                             "or a file of them")
        prompts += found
    return prompts


def _read_file(path: Path, suffix: str) -> list[str]:
    """The prompts of one file, empty lines left out."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError as error:
        raise FileNotFoundError(f"prompts is {str(path)!r}, which does not exist (that is {path.absolute()}); give a text, or "
                                "a file with one prompt a line") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"prompts file {path} is not UTF-8 ({error}); convert it first") from error
    if suffix in SEPARATORS:
        rows = csv.DictReader(lines, delimiter=SEPARATORS[suffix])
        columns = rows.fieldnames or []
        column = next((name for wanted in COLUMNS for name in columns if name.strip().lower() == wanted), None)
        if column is None and columns:
            raise ValueError(f"prompts file {path} has the columns {', '.join(columns)}; call that with the prompts 'prompt'")
        lines = [row[column] or "" for row in rows] if column else []
    return [line.strip() for line in lines if line.strip()]
