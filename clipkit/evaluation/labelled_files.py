"""Labelled or captioned pictures in files: folders of class folders, pictures with a .txt beside each, and tables."""

import csv
import difflib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipkit.data.tables import Record, Source, open_source, sniff_separator
from clipkit.evaluation.image_sets import CLASSIFICATION, MULTI_LABEL, RETRIEVAL, FileImages, OpenedSet, Picture

SPLITS = ("test", "train", "val", "validation")  # names that say split and not class
LABEL_COLUMNS = ("label", "labels", "class", "class_name", "classname", "category", "target", "concept")
CAPTION_COLUMNS = ("caption", "captions", "title", "text", "description", "alt_text", "alt", "sentence", "prompt")


def open_folder(folder: Path, split: str | None, kind: str | None = None) -> OpenedSet:
    """Open a folder of class folders, a folder <split>/<class folders>, or a folder of captioned pictures.

    The classes are the names of the sub-folders, of all splits, sorted, "_" read as a space; where the folder has a
    classnames.txt, its lines are their names, in the same order.

    Args:
      folder: the set, or one of its splits.
      split: of a folder that has splits; None = test.
      kind: None = by what the folder holds.

    Raises:
      FileNotFoundError: the folder has splits, and not this one.
      ValueError: it holds no such pictures, has no splits though one is asked for, or classnames.txt does not fit.
    """
    folder = Path(os.path.abspath(folder))
    if split is None and folder.name in SPLITS and _split_folders(folder.parent):
        folder, split = folder.parent, folder.name
    splits = _split_folders(folder)
    if splits:
        split = split or "test"
        if split not in splits:
            raise FileNotFoundError(f"split {split!r} is not in {folder}: it has {', '.join(splits)}; name one, as in "
                                    f"task={folder}/{next(iter(splits))}")
    elif split is not None:
        raise ValueError(f"split is {split!r}, but {folder} has no splits (sub-folders named {', '.join(SPLITS)}); leave "
                         "it out")
    place = splits[split] if splits and split else folder
    try:
        source = open_source(place)
    except ValueError as error:
        raise ValueError(f"{error}; for pictures without labels give images={place} classes=[...] in place of task") from error
    if not source.classnames:
        return _captioned_folder(place, source, split or "all", kind)
    if kind not in (None, CLASSIFICATION):
        raise ValueError(f"kind is {kind!r}, but {place} holds class folders; give kind={CLASSIFICATION}, or leave it out")
    names = sorted({path.name for parent in (splits.values() if splits else [folder]) for path in _sub_folders(parent)})
    classes, origin = tuple(name.replace("_", " ") for name in names), f"the sub-folders of {folder}"
    given = _lines(folder / "classnames.txt")
    if given:
        origin = f"{folder}/classnames.txt"
        if len(given) != len(names):
            raise ValueError(f"{origin} has {len(given)} names, but there are {len(names)} class folders "
                             f"({', '.join(names[:5])}, ...); give each folder one line, in sorted order")
        classes = given
    train = None
    if "train" in splits and split != "train":
        train = _class_images(open_source(splits["train"]), names)
    return OpenedSet(CLASSIFICATION, split or "all", _class_images(source, names), classes, train=train,
                     source_of_classes=origin)


def open_table(path: Path, kind: str | None = None) -> OpenedSet:
    """Open a table of pictures with labels or captions.

    Rows with the same picture are one picture with several captions, or with several labels in a multi-label task.
    Labels are names; or numbers, of the lines of a classnames.txt beside the table, or of the names that a Hugging Face
    Parquet file carries. Without either the classes are the names that occur, sorted.

    Args:
      path: a .csv, .tsv or .parquet file with a header; its paths start from its folder.
      kind: None = classification where there is a column of labels, retrieval where there is one of captions.

    Raises:
      FileNotFoundError: there is no such table.
      ValueError: its columns or its labels cannot be told, or a picture has several labels and kind is None.
    """
    column, kind = _target_column(path, kind)
    source = open_source(path, caption_column=column)
    if kind == RETRIEVAL:
        return OpenedSet(kind, "all", _table_images(TablePictures(path, column, kind, {}), source, ""))
    classes, numbers, origin = _table_classes(path, column, source)
    images = _table_images(TablePictures(path, column, kind, numbers), source, json.dumps(classes))
    return OpenedSet(kind, "all", images, classes, source_of_classes=origin)


@dataclass(frozen=True)
class TablePictures:
    """The pictures of a table, a picture a row; each iteration reads the table anew."""

    path: Path
    column: str  # of captions or labels
    kind: str
    numbers: Mapping[str, int]  # class of each label

    def __iter__(self) -> Iterator[Picture]:
        return map(self._picture, open_source(self.path, caption_column=self.column).records)

    def _picture(self, record: Record) -> Picture:
        key = picture_key(record, self.path.parent)
        if self.kind == RETRIEVAL:
            return Picture(key, record._replace(problem=record.problem or ("" if record.caption else "no caption")))
        labels = tuple(self.numbers[text] for text in label_texts(record))
        problem = "" if record.problem == "caption is not text" else record.problem  # numbers: label_texts takes them
        if not labels and self.kind == CLASSIFICATION:
            problem = problem or "no label"
        return self.labelled(key, record._replace(caption=None, problem=problem), labels)

    def labelled(self, key: str, record: Record, labels: tuple[int, ...]) -> Picture:
        """Make a picture with its classes, of which a classification has one."""
        if len(labels) > 1 and self.kind == CLASSIFICATION:
            names = {number: text for text, number in self.numbers.items()}
            raise ValueError(f"{self.path}: {key} has {len(labels)} labels ({', '.join(names[n] for n in labels)}); leave "
                             f"it one, or give kind={MULTI_LABEL}")
        return Picture(key, record, labels[0] if len(labels) == 1 else -1, labels)


def picture_key(record: Record, folder: Path) -> str:
    """The key of a table's picture: its path below the folder, its URL, or the number of its row."""
    if isinstance(record.image, Path):
        return os.path.relpath(record.image, folder)
    return record.image if isinstance(record.image, str) else record.name


def label_texts(record: Record) -> list[str]:
    """The labels of a row as texts; numbers, which are no captions, come as their digits."""
    given: object = record.caption
    values = given if isinstance(given, list | tuple) else [given]
    return [text for value in values if isinstance(value, str | int) and (text := str(value).strip())]


def _table_images(rows: TablePictures, source: Source, meaning: str) -> FileImages:
    meaning = f"{rows.kind} {rows.column} {meaning}"
    if not isinstance(source.records, list):  # the pictures are in the table, and too large to hold
        return FileImages(rows, source.num_records, [rows.path], meaning, source.summary)
    pictures = _merge_rows(rows)
    files = [picture.record.image for picture in pictures if isinstance(picture.record.image, Path)]
    return FileImages(pictures, len(pictures), [rows.path, *files], meaning, source.summary)


def _merge_rows(rows: TablePictures) -> tuple[Picture, ...]:
    """Make one picture of all the rows that name it; rows that cannot be used stay by themselves."""
    merged: dict[str, Picture] = {}
    for row in rows:
        usable = row.record.image is not None and not row.record.problem
        key = row.key if usable else f"{row.record.name}: {row.record.problem or 'no image'}"
        old = merged.get(key)
        if old is None:
            merged[key] = row._replace(key=key)
            continue
        record = old.record
        if record.caption is not None:
            record = record._replace(caption=[*_texts(record.caption), *_texts(row.record.caption)])
        merged[key] = rows.labelled(key, record, tuple(dict.fromkeys((*old.labels, *row.labels))))
    return tuple(merged.values())


def _texts(caption: Path | str | Sequence[str] | None) -> list[str]:
    return [caption] if isinstance(caption, str) else [] if isinstance(caption, Path) else list(caption or [])


def _table_classes(path: Path, column: str, source: Source) -> tuple[tuple[str, ...], dict[str, int], str]:
    """(class names, class of each label that occurs, where the names come from)."""
    rows = {text: record.name for record in source.records for text in label_texts(record)}
    if not rows:
        raise ValueError(f"{path} has no label in column {column!r}; fill it, or give it another name")
    are_numbers = all(text.isdecimal() for text in rows)
    for names, origin in ((_lines(path.parent / "classnames.txt"), f"{path.parent}/classnames.txt"),
                          (_names_in_parquet(path, column), f"the metadata of {path}")):
        if names and all(text in names for text in rows):
            return names, {text: names.index(text) for text in rows}, origin
        if not names:
            continue
        outside = next((text for text in rows if (int(text) >= len(names) if are_numbers else text not in names)), None)
        if outside is None:
            return names, {text: int(text) for text in rows}, origin
        close = difflib.get_close_matches(outside, names, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else f" ({', '.join(names[:5])}, ...)"
        raise ValueError(f"label {outside!r} ({path.name}, {rows[outside]}) is outside the {len(names)} classes of "
                         f"{origin}{hint}")
    if are_numbers:
        raise ValueError(f"the labels in column {column!r} of {path} are numbers, which say nothing to a text encoder; put "
                         "a classnames.txt beside the table, a name a line in the order of the numbers")
    names = tuple(sorted(rows))
    return names, {text: number for number, text in enumerate(names)}, f"column {column!r} of {path}"


def _target_column(path: Path, kind: str | None) -> tuple[str, str]:
    """The column of labels or of captions, and the kind of task that it makes."""
    columns = table_columns(path)
    by_name = {column.strip().lower(): column for column in reversed(columns)}
    label = next((by_name[name] for name in LABEL_COLUMNS if name in by_name), None)
    caption = next((by_name[name] for name in CAPTION_COLUMNS if name in by_name), None)
    there = f"{path} has the columns {', '.join(map(repr, columns))}"
    if kind is None and label and caption:
        raise ValueError(f"{there}: {label!r} makes it {CLASSIFICATION}, {caption!r} {RETRIEVAL}; give kind=... to choose")
    kind = kind or (RETRIEVAL if caption else CLASSIFICATION)
    column, usual = (caption, CAPTION_COLUMNS) if kind == RETRIEVAL else (label, LABEL_COLUMNS)
    if column is None:
        raise ValueError(f"{there}; {kind} needs one named {', '.join(usual)}; rename the column")
    return column, kind


def table_columns(path: Path) -> list[str]:
    """Read the names of a table's columns.

    Raises:
      FileNotFoundError: there is no such table.
      ValueError: it cannot be read.
    """
    if not path.exists():
        raise FileNotFoundError(f"no table at {path} (that is {path.absolute()})")
    if path.suffix.lower() == ".parquet":
        return list(_parquet_schema(path).names)
    separator = sniff_separator(path)
    with path.open(encoding="utf-8-sig", newline="") as file:
        return next(csv.reader(file, delimiter=separator))


def _parquet_schema(path: Path) -> Any:
    import pyarrow as arrow
    from pyarrow import parquet

    try:
        return parquet.read_schema(path)
    except arrow.ArrowInvalid as error:
        raise ValueError(f"{path} cannot be read as Parquet: {error}") from error


def _names_in_parquet(path: Path, column: str) -> tuple[str, ...]:
    """The class names that a Hugging Face data set keeps in its files; () without."""
    if path.suffix.lower() != ".parquet":
        return ()
    try:
        described = json.loads((_parquet_schema(path).metadata or {})[b"huggingface"])
        return tuple(map(str, described["info"]["features"][column]["names"]))
    except (KeyError, TypeError, ValueError):
        return ()


def _captioned_folder(place: Path, source: Source, split: str, kind: str | None) -> OpenedSet:
    if kind not in (None, RETRIEVAL):
        raise ValueError(f"kind is {kind!r}, but {place} holds pictures with captions; give kind={RETRIEVAL}, or leave it out")
    pictures = tuple(Picture(record.name, record) for record in source.records)
    files = [file for picture in pictures for file in (picture.record.image, picture.record.caption) if isinstance(file, Path)]
    return OpenedSet(RETRIEVAL, split, FileImages(pictures, len(pictures), files, "captions beside", source.summary))


def _class_images(source: Source, names: Sequence[str]) -> FileImages:
    """The pictures of class folders, numbered by the names of all class folders."""
    number_of = {name: number for number, name in enumerate(names)}
    pictures, files = [], []
    for record in source.records:
        assert isinstance(record.image, Path)
        number = number_of[record.image.parent.name]
        pictures.append(Picture(record.name, record, number, (number,)))
        files.append(record.image)
    return FileImages(tuple(pictures), len(pictures), files, f"class folders {json.dumps(list(names))}", source.summary)


def _split_folders(folder: Path) -> dict[str, Path]:
    """The splits of a folder: it has no other sub-folders, and these have sub-folders of their own. {} without."""
    below = _sub_folders(folder)
    if not all(path.name in SPLITS for path in below):
        return {}
    return {path.name: path for path in below if _sub_folders(path)}


def _sub_folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _lines(path: Path) -> tuple[str, ...]:
    """The lines of a text without the blank ones at its end; () where there is none."""
    try:
        return tuple(line.strip() for line in path.read_text(encoding="utf-8-sig").rstrip().splitlines())
    except FileNotFoundError:
        return ()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}") from error
