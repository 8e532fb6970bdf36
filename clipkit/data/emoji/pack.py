"""The embedded emoji pack: the rows of emoji.csv, each with its drawing cut from a sprite sheet (see README.md)."""

import csv
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

PACK_FOLDER = Path(__file__).parent
CELL_SIZE = 64  # pixels, height and width of a drawing
CELLS_PER_ROW = 40
SPLITS = ("train", "val", "test_style", "test_concept")


@dataclass(frozen=True)
class EmojiRow:
    """One drawing of one emoji; the fields are columns of emoji.csv."""

    style: str
    index: int  # cell in the sheet of this style, row-major
    emoji: str
    concept: str  # code points, the same in every style
    label: str
    tags: tuple[str, ...]
    group: str
    subgroup: str
    split: str
    license: str  # SPDX id of the drawing


def read_emoji_rows() -> list[EmojiRow]:
    """Read all rows of the pack, in the order of emoji.csv (by style, then index)."""
    with (PACK_FOLDER / "emoji.csv").open(encoding="utf-8", newline="") as file:
        return [
            EmojiRow(
                style=row["style"],
                index=int(row["index"]),
                emoji=row["emoji"],
                concept=row["concept"],
                label=row["label"],
                tags=tuple(row["tags"].split(";")),
                group=row["group"],
                subgroup=row["subgroup"],
                split=row["split"],
                license=row["license"],
            )
            for row in csv.DictReader(file)
        ]


def emoji_pictures(rows: list[EmojiRow]) -> Iterator[tuple[EmojiRow, "Image.Image"]]:
    """Yield each row with its picture, 64x64 RGB, sheet by sheet so that one sheet at a time is decoded."""
    from PIL import Image

    for style in dict.fromkeys(row.style for row in rows):
        with Image.open(PACK_FOLDER / f"{style}.webp") as file:
            sheet = file.convert("RGB")
        for row in rows:
            if row.style == style:
                top, left = (cell * CELL_SIZE for cell in divmod(row.index, CELLS_PER_ROW))
                yield row, sheet.crop((left, top, left + CELL_SIZE, top + CELL_SIZE))


def pack_fingerprint() -> str:
    """Hash the table and the sheets: 16 hex digits that change with any byte of the pack."""
    digest = hashlib.sha256()
    for path in [PACK_FOLDER / "emoji.csv", *sorted(PACK_FOLDER.glob("*.webp"))]:
        digest.update(path.name.encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
