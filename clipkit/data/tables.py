"""Pictures that are not in shards yet: captioned folders, labelled folders, and CSV, TSV and Parquet tables.

Only finds and reads them; write.py makes the shards.
"""

import csv
import difflib
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from clipkit.data.tars import IMAGE_SUFFIXES, MAX_MEMBER_BYTES

SEPARATORS = {",": "comma", "\t": "tab", ";": "semicolon", "|": "bar"}
IMAGE_COLUMNS = ("filepath", "file_path", "path", "image_path", "img_path", "image_file", "file_name", "filename", "file",
                 "image", "img", "image_url", "url")
CAPTION_COLUMNS = ("caption", "captions", "title", "text", "description", "alt_text", "alt", "sentence", "prompt", "label")
TEXT_TABLE_SUFFIXES = (".csv", ".tsv")
SNIFFED_BYTES = 65536
NAMES_SHOWN = 5  # in messages
EXPECTED = ("expected: images with a .txt caption of the same name beside each, or one sub-folder of images for each "
            "class, or a .csv, .tsv or .parquet table")


class SourceError(ValueError):
    """Why one picture of a source cannot be used: `cause` to count by, `detail` for a message."""

    def __init__(self, cause: str, detail: str = "") -> None:
        super().__init__(cause, detail)
        self.cause = cause
        self.detail = detail


class Record(NamedTuple):
    """One picture of a source, not read yet."""

    name: str  # for messages: path, URL or row
    image: Path | str | bytes | None  # file, URL, or the bytes themselves
    caption: Path | str | Sequence[str] | None  # file, text, or several texts
    label: int | None = None  # class number, of a labelled folder
    fields: Mapping[str, Any] = {}  # the other columns of a table
    problem: str = ""  # a cause for which the row itself cannot be used


class Source(NamedTuple):
    """What was found at a path."""

    summary: str  # one line for the user
    records: Iterable[Record]
    num_records: int
    classnames: tuple[str, ...] = ()  # of a labelled folder, else empty


def open_source(path: Path, *, image_column: str | None = None, caption_column: str | None = None,
                image_root: Path | None = None, shuffle_seed: int | None = None) -> Source:
    """Recognise what a path holds and list its pictures.

    Args:
      path: a folder of images with .txt captions (searched recursively), a folder of class folders, or a table.
      image_column, caption_column: columns of a table. None = the first usual name that it has.
      image_root: folder that a table's relative paths start from. None = the table's own.
      shuffle_seed: seed of the order, so that neighbours of a sorted source are spread. None = as they stand. A
        labelled folder, and a table that holds the pictures themselves, keep their order.

    Raises:
      FileNotFoundError: nothing is there.
      ValueError: it is none of these, a column is not there, or the table cannot be read.
    """
    if not path.exists():
        raise FileNotFoundError(f"source {str(path)!r} does not exist (that is {path.absolute()}); {EXPECTED}")
    if path.is_dir():
        source = _open_folder(path)
    elif path.suffix.lower() == ".parquet":
        source = _open_parquet(path, image_column, caption_column, image_root or path.parent)
    elif path.suffix.lower() in TEXT_TABLE_SUFFIXES:
        source = _open_csv(path, image_column, caption_column, image_root or path.parent)
    else:
        raise ValueError(f"source {str(path)!r} is a file of unknown kind {path.suffix!r}; {EXPECTED}")
    if shuffle_seed is None or source.classnames or not isinstance(source.records, list):
        return source
    random.Random(f"{shuffle_seed}/source").shuffle(source.records)
    return source


def read_picture(record: Record) -> bytes:
    """Read the bytes of a record's picture.

    Raises:
      SourceError: "no image", "missing file", "unreadable file" or "huge file".
    """
    image = record.image
    if record.problem:
        raise SourceError(record.problem, record.name)
    if not image:
        raise SourceError("no image", "the image column is empty")
    if isinstance(image, bytes):
        return image
    try:
        if isinstance(image, str):
            import fsspec

            with fsspec.open(image, "rb") as file:
                data = file.read(MAX_MEMBER_BYTES + 1)  # pyright: ignore[reportAttributeAccessIssue]
        else:
            with image.open("rb") as file:
                data = file.read(MAX_MEMBER_BYTES + 1)
    except FileNotFoundError as error:
        raise SourceError("missing file", str(image)) from error
    except Exception as error:  # fsspec's backends raise classes of their own
        raise SourceError("unreadable file", f"{image}: {type(error).__name__}: {error}") from error
    if len(data) > MAX_MEMBER_BYTES:
        raise SourceError("huge file", f"{image} has more than {MAX_MEMBER_BYTES} bytes")
    return data


def read_captions(record: Record) -> list[str]:
    """Read a record's captions: at least one, none of them blank.

    Raises:
      SourceError: "no caption", or "bad text" where a caption file is not UTF-8.
    """
    caption = record.caption
    if isinstance(caption, Path):
        try:
            caption = caption.read_text(encoding="utf-8-sig")  # -sig: Windows editors write a byte-order mark
        except FileNotFoundError as error:
            raise SourceError("no caption", f"{caption.name} is not there") from error
        except UnicodeDecodeError as error:
            raise SourceError("bad text", f"{caption.name} is not UTF-8") from error
    texts = [caption] if isinstance(caption, str) else caption or []
    captions = [text.strip() for text in texts if isinstance(text, str) and text.strip()]
    if not captions:
        raise SourceError("no caption", "it is empty")
    return captions


def _open_folder(folder: Path) -> Source:
    files = sorted(file for file in folder.rglob("*") if file.is_file()
                   and not any(part.startswith(".") for part in file.relative_to(folder).parts))
    images = [file for file in files if file.suffix.lower().lstrip(".") in IMAGE_SUFFIXES]
    if not images:
        kinds = ", ".join(f"{count} {kind or 'without suffix'}" for kind, count in
                          Counter(file.suffix.lower() for file in files).most_common(4))
        raise ValueError(f"source {str(folder)!r} holds no images (found: {kinds or 'nothing'}); {EXPECTED}")
    names = {file.with_suffix("") for file in files if file.suffix == ".txt"}
    captioned = sum(image.with_suffix("") in names for image in images)
    if captioned:
        records = [Record(str(image.relative_to(folder)), image, image.with_suffix(".txt")) for image in images]
        return Source(f"captioned folder: {len(images)} images, {captioned} with a .txt beside them", records, len(images))
    depths = Counter(len(image.relative_to(folder).parts) - 1 for image in images)
    if set(depths) != {1}:
        found = ", ".join(f"{count} {depth} folders down" for depth, count in sorted(depths.items()))
        raise ValueError(f"source {str(folder)!r} holds {len(images)} images without .txt captions ({found}), so it is "
                         f"neither captioned nor labelled; {EXPECTED}")
    classes = sorted({image.parent.name for image in images})
    number = {name: index for index, name in enumerate(classes)}
    names = tuple(name.replace("_", " ") for name in classes)
    records = [Record(str(image.relative_to(folder)), image, None, number[image.parent.name]) for image in images]
    return Source(f"labelled folder: {len(images)} images in {len(classes)} classes", records, len(images), names)


def split_labelled(source: Source, *, test_fraction: float, seed: int | None) -> dict[str, list[Record]]:
    """Divide a labelled folder: of each class a share for the test split, at least one picture, the rest for training.

    Args:
      source: A labelled folder.
      test_fraction: The share.
      seed: Of the choice, and of the order of the train split; None = 0.

    Returns:
      {"train": records, shuffled; "test": records, in the source's order}.

    Raises:
      ValueError: it is no labelled folder, or a class has one picture.
    """
    if not source.classnames:
        raise ValueError(f"test_fraction is {test_fraction:g}, and the source is a {source.summary.split(':')[0]}; it divides "
                         "labelled folders: leave it out")
    of_class: dict[int, list[Record]] = {number: [] for number in range(len(source.classnames))}
    for record in source.records:
        of_class[record.label or 0].append(record)
    alone = [source.classnames[number] for number, records in of_class.items() if len(records) == 1]
    if alone:
        more = ", ..." if len(alone) > NAMES_SHOWN else ""
        raise ValueError(f"{len(alone)} of {len(of_class)} classes have one picture ({', '.join(alone[:NAMES_SHOWN])}{more}), "
                         "which cannot be in both train and test: add pictures, take these classes out, or leave "
                         "test_fraction out")
    rng, chosen = random.Random(f"{seed or 0}/test split"), set()
    for records in of_class.values():
        num = min(len(records) - 1, max(1, round(test_fraction * len(records))))
        chosen.update(record.name for record in rng.sample(records, num))
    train = [record for record in source.records if record.name not in chosen]
    rng.shuffle(train)
    return {"train": train, "test": [record for record in source.records if record.name in chosen]}


def _open_csv(path: Path, image_column: str | None, caption_column: str | None, root: Path) -> Source:
    separator = sniff_separator(path)
    rows = _csv_rows(path, separator)
    header = next(rows)
    image, caption = choose_columns(path, header, image_column, caption_column)
    records = []
    for number, row in enumerate(rows, start=2):
        if row:
            values = dict(zip(header, row, strict=False))
            problem = "" if len(row) == len(header) else "wrong number of columns"
            records.append(_table_record(f"row {number}", values, image, caption, root, problem))
    return Source(f"table: {len(records)} rows, separated by {SEPARATORS[separator]}; images from column {image!r}, "
                  f"captions from {caption!r}", records, len(records))


def _open_parquet(path: Path, image_column: str | None, caption_column: str | None, root: Path) -> Source:
    import pyarrow as arrow
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
    except arrow.ArrowInvalid as error:
        raise ValueError(f"{path} cannot be read as Parquet: {error}") from error
    schema, num_rows = file.schema_arrow, file.metadata.num_rows
    image, caption = choose_columns(path, schema.names, image_column, caption_column)
    kind = schema.field(image).type
    embedded = not (arrow.types.is_string(kind) or arrow.types.is_large_string(kind))

    def records() -> Iterator[Record]:
        number = 0
        for batch in file.iter_batches(batch_size=256):
            for values in batch.to_pylist():
                number += 1
                yield _table_record(f"row {number}", values, image, caption, root)

    where = "inside the table, in its order, " if embedded else ""
    return Source(f"table: {num_rows} rows; images {where}from column {image!r}, captions from {caption!r}",
                  records() if embedded else list(records()), num_rows)


def _table_record(row: str, values: Mapping[str, Any], image_column: str, caption_column: str, root: Path,
                  problem: str = "") -> Record:
    image, caption = values.get(image_column), values.get(caption_column)
    if isinstance(image, Mapping):  # a Hugging Face image: {"bytes": ..., "path": ...}
        image = image.get("bytes") or image.get("path")
    if isinstance(image, str):
        name = image.strip()
        image = None if not name else name if "://" in name else root / name
        row = f"{row} ({name})"
    if caption is not None and not isinstance(caption, str | list):
        problem = "caption is not text"
    # A json field `captions` would take the place of the column that was chosen.
    fields = {name: value for name, value in values.items() if name not in (image_column, caption_column, "captions")
              and isinstance(value, str | int | float | bool)}
    return Record(row, image if isinstance(image, Path | str | bytes) else None, caption, None, fields, problem)


def sniff_separator(path: Path) -> str:
    """Find what separates the columns of a text table: the candidate under which most rows are as wide as the header.

    Raises:
      ValueError: the table is empty, or has one column under every candidate.
    """
    best, fits = "", 0.0
    for separator in SEPARATORS:
        size = 0
        widths = []
        for row in _csv_rows(path, separator):
            widths.append(len(row))
            size += sum(map(len, row))
            if size > SNIFFED_BYTES:
                break
        if not widths:
            raise ValueError(f"table {str(path)!r} is empty; its first line must name the columns")
        fit = sum(width == widths[0] for width in widths) / len(widths)
        if widths[0] > 1 and fit > fits:
            best, fits = separator, fit
    if not best:
        raise ValueError(f"table {str(path)!r} has one column; the first line must name at least an image and a caption "
                         f"column, separated by {', '.join(SEPARATORS.values())}")
    return best


def choose_columns(path: Path, columns: Sequence[str], image_column: str | None,
                   caption_column: str | None) -> tuple[str, str]:
    """Name a table's image and caption column, as given or by their usual names.

    Raises:
      ValueError: a given column is not there, or none of the usual names is.
    """
    chosen = []
    for setting, given, usual in (("image_column", image_column, IMAGE_COLUMNS),
                                  ("caption_column", caption_column, CAPTION_COLUMNS)):
        there = f"{path} has the columns {', '.join(map(repr, columns))}"
        if given is not None and given not in columns:
            close = difflib.get_close_matches(given, columns, n=1)
            raise ValueError(f"{setting} is {given!r}, but {there}{f'; did you mean {close[0]!r}?' if close else ''}")
        by_name = {column.strip().lower(): column for column in reversed(columns)}
        column = given if given is not None else next((by_name[name] for name in usual if name in by_name), None)
        if column is None:
            raise ValueError(f"{there}, none of which is a usual name ({', '.join(usual)}); give {setting}=...")
        chosen.append(column)
    return chosen[0], chosen[1]


def _csv_rows(path: Path, separator: str) -> Iterator[list[str]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.reader(file, delimiter=separator)
        try:
            yield from rows
        except csv.Error as error:
            raise ValueError(f"table {str(path)!r}, line {rows.line_num}: {error}; is a quote not closed?") from error
        except UnicodeDecodeError as error:
            raise ValueError(f"table {str(path)!r} is not UTF-8 ({error}); convert it first") from error
