"""Tables of pictures with true and false captions, as compositional benchmarks have them. How they are judged: choices.py."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from clipkit.data.tables import Record, SourceError, open_source, read_captions
from clipkit.evaluation.image_sets import CHOICE, FileImages, OpenedSet, Picture, Question
from clipkit.evaluation.labelled_files import picture_key, table_columns

PAIR_COLUMNS = {"image_0": "caption_0", "image_1": "caption_1"}  # Winoground's
TRUE_COLUMNS = ("caption", "true_caption", "positive_caption")
FALSE_COLUMN = re.compile(r"(negative|false)_captions?(_\d+)?")
LAYOUTS = (f"an image, {' or '.join(TRUE_COLUMNS[:2])}, and negative_caption or false_caption (of several _1, _2, ... after "
           "it); or image_0, caption_0, image_1 and caption_1")


def has_choices(path: Path) -> bool:
    """Whether the columns of a table are those of choices."""
    names = [column.strip().lower() for column in table_columns(path)]
    return PAIR_COLUMNS.keys() | PAIR_COLUMNS.values() <= set(names) or any(map(FALSE_COLUMN.fullmatch, names))


def open_choices(path: Path) -> OpenedSet:
    """Open a table with a question in each row.

    Either an image, its caption and false ones: columns of negative_caption or false_caption, any number of them, or lists
    in Parquet; blank cells are none. Or two images with their captions: image_0, caption_0, image_1, caption_1.

    Args:
      path: a .csv, .tsv or .parquet file with a header; its paths start from its folder. A picture may be in many rows.

    Raises:
      FileNotFoundError: there is no such table.
      ValueError: its columns are not those of choices.
    """
    readers = _readers(path)
    is_pair = readers[0][0] is not None
    sources = [open_source(path, image_column=image, caption_column=caption) for image, caption in readers]
    questions: list[Question] = []
    pictures: dict[str, Picture] = {}
    for row in zip(*(source.records for source in sources), strict=True):
        shown = [Picture(_key(record, path, image), record._replace(caption=None, problem=""))
                 for record, (image, _) in zip(row if is_pair else row[:1], readers, strict=False)]
        questions.append(_question(row, [picture.key for picture in shown]))
        pictures.update({picture.key: picture for picture in shown if isinstance(picture.record.image, Path | str)})
    summary = f"table: {len(questions)} rows of choices, {2 if is_pair else 1} pictures each"
    if not isinstance(sources[0].records, list):  # the pictures are in the table, and too large to hold
        columns = readers if is_pair else readers[:1]
        images = FileImages(TablePictures(path, columns), len(questions) * len(columns), [path], "choices", summary)
    else:
        files = [picture.record.image for picture in pictures.values() if isinstance(picture.record.image, Path)]
        images = FileImages(tuple(pictures.values()), len(pictures), [path, *files], "choices", summary)
    return OpenedSet(CHOICE, "all", images, questions=tuple(questions))


@dataclass(frozen=True)
class TablePictures:
    """The pictures inside a table; each iteration reads it anew."""

    path: Path
    columns: Sequence[tuple[str | None, str]]  # (image, caption)

    def __iter__(self) -> Iterator[Picture]:
        for image, caption in self.columns:
            for record in open_source(self.path, image_column=image, caption_column=caption).records:
                yield Picture(_key(record, self.path, image), record._replace(caption=None, problem=""))


def _readers(path: Path) -> list[tuple[str | None, str]]:
    """The (image, caption) columns to read; image is None where it is the usual one, for all captions."""
    columns = table_columns(path)
    by_name = {column.strip().lower(): column for column in reversed(columns)}
    if PAIR_COLUMNS.keys() | PAIR_COLUMNS.values() <= by_name.keys():
        return [(by_name[image], by_name[caption]) for image, caption in PAIR_COLUMNS.items()]
    true = next((by_name[name] for name in TRUE_COLUMNS if name in by_name), None)
    false = [column for column in columns if FALSE_COLUMN.fullmatch(column.strip().lower())]
    if true is None or not false:
        raise ValueError(f"{path} has the columns {', '.join(map(repr, columns))}; {CHOICE} needs {LAYOUTS}; rename the "
                         "columns")
    return [(None, column) for column in (true, *false)]


def _question(row: Sequence[Record], keys: Sequence[str]) -> Question:
    captions = [_captions(record) for record in row]
    flat = tuple(caption for of_column in captions for caption in of_column)
    true = captions[:len(keys)]
    problem = next((record.problem for record in row if record.problem), "")
    if any(record.image is None for record in row):
        problem = problem or "no image"
    elif any(len(of_image) != 1 for of_image in true):
        problem = problem or ("several true captions" if all(true) else "no caption")
    elif len(flat) < 2:
        problem = problem or "no false caption"
    return Question(tuple(keys), flat, row[0].fields, problem)


def _captions(record: Record) -> list[str]:
    try:
        return read_captions(record)
    except SourceError:  # blank
        return []


def _key(record: Record, path: Path, column: str | None) -> str:
    key = picture_key(record, path.parent)
    return f"{key}, {column}" if column and isinstance(record.image, bytes) else key
