"""Folders and tables of every layout: what is recognised, what is read, and what each mistake is answered with."""

import csv
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from clipkit.data.tables import SourceError, choose_columns, open_source, read_captions, read_picture, sniff_separator

CAPTION = 'a "quoted", caption;\nover two lines | with é and 日本\tand a tab'


def png(colour: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((4, 6, 3), colour, dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def write_files(folder: Path, files: dict[str, bytes | str]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def write_table(path: Path, rows: list[list[str]], separator: str = ",") -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter=separator).writerows(rows)
    return path


def pairs(source: Any) -> list[tuple[bytes, list[str]]]:
    return [(read_picture(record), read_captions(record)) for record in source.records]


def test_a_captioned_folder_is_read_recursively(tmp_path: Path) -> None:
    write_files(tmp_path, {"a/1.png": png(1), "a/1.txt": CAPTION, "2.JPG": png(2), "2.txt": "\ufeff  two \n",
                           "b/c/3.webp": png(3), "notes.md": "x", ".hidden/4.png": png(4)})
    source = open_source(tmp_path)
    assert source.summary == "captioned folder: 3 images, 2 with a .txt beside them"
    assert source.classnames == ()
    records = {record.name: record for record in source.records}
    assert set(records) == {"a/1.png", "2.JPG", "b/c/3.webp"}
    assert read_captions(records["a/1.png"]) == [CAPTION]
    assert read_captions(records["2.JPG"]) == ["two"]
    assert read_picture(records["2.JPG"]) == png(2)
    with pytest.raises(SourceError, match="no caption"):
        read_captions(records["b/c/3.webp"])


def test_a_labelled_folder_has_its_classes_in_alphabetical_order(tmp_path: Path) -> None:
    write_files(tmp_path, {"red_fox/1.png": png(), "cat/2.png": png(), "cat/1.png": png()})
    source = open_source(tmp_path, shuffle_seed=0)
    assert source.classnames == ("cat", "red fox")
    assert [(record.name, record.label) for record in source.records] == [("cat/1.png", 0), ("cat/2.png", 0),
                                                                          ("red_fox/1.png", 1)]


@pytest.mark.parametrize(("files", "message"), [
    ({"1.png": png()}, "holds 1 images without .txt captions (1 0 folders down)"),
    ({"a/1.png": png(), "2.png": png()}, "neither captioned nor labelled"),
    ({"train/cat/1.png": png()}, "(1 2 folders down)"),
    ({"x.heic": b"", "y.heic": b"", "z": b""}, "holds no images (found: 2 .heic, 1 without suffix)"),
    ({}, "holds no images (found: nothing)")])
def test_a_folder_of_no_known_layout_says_what_was_found_and_expected(tmp_path: Path, files: dict[str, bytes],
                                                                      message: str) -> None:
    write_files(tmp_path, dict(files))
    with pytest.raises(ValueError, match=r"expected: images with a \.txt caption") as caught:
        open_source(tmp_path)
    assert message in str(caught.value)


def test_a_missing_source_and_an_unknown_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        open_source(tmp_path / "no.csv")
    write_files(tmp_path, {"a.xlsx": b""})
    with pytest.raises(ValueError, match=r"unknown kind '\.xlsx'"):
        open_source(tmp_path / "a.xlsx")


@pytest.mark.parametrize("separator", [",", "\t", ";", "|"])
@pytest.mark.parametrize("suffix", ["csv", "tsv"])
def test_the_separator_is_sniffed_and_captions_keep_every_character(tmp_path: Path, separator: str,
                                                                   suffix: str) -> None:
    write_files(tmp_path, {"pics/1.png": png(1), "pics/2.png": png(2)})
    table = write_table(tmp_path / f"t.{suffix}", [["id", "filepath", "title"], ["7", "pics/1.png", CAPTION],
                                                   ["8", str(tmp_path / "pics/2.png"), "plain; with, | commas"]],
                        separator)
    assert sniff_separator(table) == separator
    source = open_source(table)
    assert pairs(source) == [(png(1), [CAPTION]), (png(2), ["plain; with, | commas"])]
    assert source.num_records == 2
    assert [dict(record.fields) for record in source.records] == [{"id": "7"}, {"id": "8"}]


def test_a_byte_order_mark_and_an_image_root_are_understood(tmp_path: Path) -> None:
    write_files(tmp_path, {"elsewhere/1.png": png(1), "t.csv": "\ufeffimage,caption\r\n1.png,one\r\n\r\n"})
    assert pairs(open_source(tmp_path / "t.csv", image_root=tmp_path / "elsewhere")) == [(png(1), ["one"])]


def test_usual_column_names_are_found_in_any_case_and_given_ones_win() -> None:
    path = Path("t.csv")
    assert choose_columns(path, ["Title", "FilePath", "other"], None, None) == ("FilePath", "Title")
    assert choose_columns(path, ["text", "caption", "url", "path"], None, None) == ("path", "caption")
    assert choose_columns(path, ["text", "caption", "url", "path"], "url", "text") == ("url", "text")


def test_a_wrong_column_name_is_answered_with_the_columns_there_are(tmp_path: Path) -> None:
    table = write_table(tmp_path / "t.csv", [["foto", "title"], ["1.png", "one"]])
    with pytest.raises(ValueError, match=r"has the columns 'foto', 'title', none of which .*give image_column="):
        open_source(table)
    with pytest.raises(ValueError, match=r"image_column is 'fotos', but .*'foto', 'title'; did you mean 'foto'\?"):
        open_source(table, image_column="fotos")
    with pytest.raises(ValueError, match=r"caption_column is 'x', but .* has the columns 'foto', 'title'$"):
        open_source(table, image_column="foto", caption_column="x")


@pytest.mark.parametrize(("content", "message"), [
    ("", "is empty"), ("filepath\n1.png\n", "has one column"),
    (b"image,caption\n1.png,caf\xe9\n", "is not UTF-8"),
    ("image,caption\n1.png,\"open" + "x" * 200_000, "is a quote not closed?")])
def test_a_table_that_cannot_be_read_says_why(tmp_path: Path, content: bytes | str, message: str) -> None:
    write_files(tmp_path, {"t.csv": content})
    with pytest.raises(ValueError, match="table") as caught:
        open_source(tmp_path / "t.csv")
    assert message in str(caught.value)


def test_bad_rows_are_kept_with_their_cause(tmp_path: Path) -> None:
    write_files(tmp_path, {"t.csv": "image,caption\na.png,one\nb.png,two,three\n,four\na.png,\n", "a.png": png()})
    causes = []
    for record in open_source(tmp_path / "t.csv").records:
        try:
            causes.append((read_picture(record), read_captions(record))[1])
        except SourceError as error:
            causes.append(error.cause)
    assert causes == [["one"], "wrong number of columns", "no image", "no caption"]
    with pytest.raises(SourceError, match="missing file"):
        read_picture(open_source(write_table(tmp_path / "u.csv", [["image", "caption"], ["no.png", "x"]])).records[0])


def test_a_picture_can_be_given_as_a_url(tmp_path: Path) -> None:
    write_files(tmp_path, {"1.png": png(1)})
    table = write_table(tmp_path / "t.tsv", [["url", "caption"], [f"file://{tmp_path}/1.png", "one"],
                                             ["nonsense://x", "two"]], "\t")
    first, second = open_source(table).records
    assert read_picture(first) == png(1)
    with pytest.raises(SourceError, match="unreadable file"):
        read_picture(second)


def test_parquet_gives_paths_bytes_and_hugging_face_images(tmp_path: Path) -> None:
    import pyarrow as arrow
    from pyarrow import parquet

    write_files(tmp_path, {"1.png": png(1)})
    images = {"path": ["1.png", "1.png"], "bytes": [png(1), png(1)],
              "both": [{"bytes": png(1), "path": None}, {"bytes": None, "path": "1.png"}]}
    for name, column in images.items():
        table = arrow.table({"image": column, "caption": [CAPTION, "two"], "concept": [3, 4]})
        parquet.write_table(table, tmp_path / f"{name}.parquet")
        source = open_source(tmp_path / f"{name}.parquet")
        records = list(source.records)
        assert source.num_records == 2
        assert [(read_picture(record), read_captions(record)) for record in records] == [(png(1), [CAPTION]),
                                                                                       (png(1), ["two"])]
        assert [dict(record.fields) for record in records] == [{"concept": 3}, {"concept": 4}]


def test_a_list_of_captions_keeps_them_all_and_numbers_are_no_captions(tmp_path: Path) -> None:
    import pyarrow as arrow
    from pyarrow import parquet

    table = arrow.table({"image": [png(1)], "captions": [["one", " ", "two "]], "label": [3]})
    parquet.write_table(table, tmp_path / "t.parquet")
    assert pairs(open_source(tmp_path / "t.parquet")) == [(png(1), ["one", "two"])]
    (record,) = open_source(tmp_path / "t.parquet", caption_column="label").records
    with pytest.raises(SourceError, match="caption is not text"):
        read_picture(record)


def test_a_damaged_parquet_file_is_one_clear_error(tmp_path: Path) -> None:
    write_files(tmp_path, {"t.parquet": b"PAR1 not really"})
    with pytest.raises(ValueError, match="cannot be read as Parquet"):
        open_source(tmp_path / "t.parquet")


def test_a_seed_gives_one_order(tmp_path: Path) -> None:
    table = write_table(tmp_path / "t.csv", [["image", "caption"], *([f"{i}.png", str(i)] for i in range(50))])

    def order(seed: int | None) -> list[Any]:
        return [record.caption for record in open_source(table, shuffle_seed=seed).records]

    assert order(None) == [str(i) for i in range(50)]
    assert order(0) == order(0)
    assert sorted(order(0)) == sorted(order(None))
    assert len({tuple(order(seed)) for seed in (None, 0, 1)}) == 3
