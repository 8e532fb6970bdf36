"""`clipkit shards write` and `clipkit shards check`, from source to report."""

import errno
import io
import json
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from clipkit.commands.shards import check_shards, main, write_shards
from clipkit.config.shards import ShardsCheckConfig, ShardsWriteConfig
from clipkit.data.check import SetReport, check_sample, report_lines
from clipkit.data.shards import BadSample, RawSample, count_samples, expand_shards, read_shard
from clipkit.data.write import ShardWriter
from clipkit.evaluation.tasks import load_task

CAPTION = 'number {}: "quoted",\nsecond line, é 日本'


def picture(seed: int, height: int = 20, width: int = 30, kind: str = "PNG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """25 captioned pictures in two folders, of which equal file names repeat."""
    folder = tmp_path / "my photos"
    for number in range(25):
        place = folder / f"part{number % 2}" / f"{number // 2}"
        place.parent.mkdir(parents=True, exist_ok=True)
        kind = ("png", "jpg", "webp")[number % 3]
        place.with_suffix(f".{kind}").write_bytes(picture(number, kind="JPEG" if kind == "jpg" else kind.upper()))
        place.with_suffix(".txt").write_text(CAPTION.format(number), encoding="utf-8")
    return folder


def write(source: Path, out: Path, **changes: Any) -> None:
    settings: dict[str, Any] = {
        "source": str(source), "out": str(out), "image_column": None, "caption_column": None, "image_root": None,
        "samples_per_shard": 10, "shuffle_seed": 0, "image_size": None, "max_pixels": 10_000, "max_bad_fraction": 0.2,
        "overwrite": False, "test_fraction": None}
    write_shards(ShardsWriteConfig(**(settings | changes)))


def check(*data: str, **changes: Any) -> int:
    settings: dict[str, Any] = {"data": data, "context_length": 77, "max_pixels": 10_000, "allow_pipe": False}
    return check_shards(ShardsCheckConfig(**(settings | changes)))


def samples(folder: Path) -> list[RawSample]:
    found = [item for url in expand_shards([f"{folder}/*.tar"]) for item in read_shard(url)]
    assert all(isinstance(item, RawSample) for item in found)
    return [item for item in found if isinstance(item, RawSample)]


def test_a_captioned_folder_becomes_shards_with_every_picture_and_caption(photos: Path, tmp_path: Path) -> None:
    write(photos, tmp_path / "out")
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["shard-000000.tar", "shard-000001.tar", "shard-000002.tar", "sizes.json"]
    found = samples(tmp_path / "out")
    assert [item.key for item in found] == [f"{number:09d}" for number in range(25)]
    written = {(item.image, item.text) for item in found}
    expected = {(path.read_bytes(), path.with_suffix(".txt").read_bytes()) for path in photos.rglob("*")
                if path.suffix in (".png", ".jpg", ".webp")}
    assert written == expected
    assert {item.suffix for item in found} == {"png", "jpg", "webp"}
    assert count_samples(expand_shards([f"{tmp_path}/out/*.tar"])) == 25
    assert json.loads((tmp_path / "out/sizes.json").read_text())["shard-000002.tar"] == 5


def test_the_same_source_gives_the_same_bytes(photos: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        write(photos, tmp_path / name)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()
    with tarfile.open(tmp_path / "one/shard-000000.tar") as tar:
        assert {(member.mtime, member.uid, member.uname, member.mode) for member in tar} == {(0, 0, "", 0o644)}


def test_the_summary_ends_with_commands_that_find_the_shards(photos: Path, tmp_path: Path,
                                                            capsys: pytest.CaptureFixture[str]) -> None:
    write(photos, tmp_path / "out")
    printed = capsys.readouterr().out
    pattern = f"{tmp_path}/out/shard-{{000000..000002}}.tar"
    assert f"clipkit pretrain data.train='{pattern}' name=out" in printed
    assert f"clipkit shards check data='{pattern}'" in printed
    assert len(expand_shards([pattern])) == 3
    write(photos, tmp_path / "single", samples_per_shard=25)
    assert f"data.train={tmp_path}/single/shard-000000.tar name=single" in capsys.readouterr().out


def test_a_table_becomes_shards_with_its_other_columns_as_json(photos: Path, tmp_path: Path) -> None:
    table = photos / "list.csv"
    table.write_text('filepath;title;concept\npart0/0.png;"a ""b"", c";fox\npart1/0.jpg;two;hen\n')
    write(table, tmp_path / "out", shuffle_seed=None)
    first, second = samples(tmp_path / "out")
    assert first.text == b'a "b", c'
    assert json.loads(first.json or b"") == {"concept": "fox"}
    assert (second.text, second.suffix) == (b"two", "jpg")


def test_several_captions_of_one_picture_go_into_the_json(tmp_path: Path) -> None:
    import pyarrow as arrow
    from pyarrow import parquet

    parquet.write_table(arrow.table({"image": [picture(0)], "captions": [["one", "two"]]}), tmp_path / "t.parquet")
    write(tmp_path / "t.parquet", tmp_path / "out")
    (item,) = samples(tmp_path / "out")
    assert item.text == b"one"
    assert json.loads(item.json or b"") == {"captions": ["one", "two"]}


def test_pictures_that_clip_benchmark_does_not_read_become_png_in_a_labelled_set(tmp_path: Path) -> None:
    for name, kind in (("cat", "BMP"), ("dog", "GIF")):
        (tmp_path / "animals" / name).mkdir(parents=True)
        (tmp_path / "animals" / name / f"0.{kind.lower()}").write_bytes(picture(0, kind=kind))
    write(tmp_path / "animals", tmp_path / "set")
    with tarfile.open(tmp_path / "set/test/0.tar") as archive:
        assert {Path(name).suffix for name in archive.getnames()} == {".png", ".cls", ".json"}
    bmp = next(item for item in read_shard(str(tmp_path / "set/test/0.tar")) if isinstance(item, RawSample))
    with Image.open(io.BytesIO(bmp.image or b"")) as found, Image.open(io.BytesIO(picture(0))) as wanted:
        assert np.array_equal(np.array(found), np.array(wanted))


def test_a_labelled_folder_becomes_a_clip_benchmark_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, name in enumerate(("red_fox", "cat", "cat")):
        (tmp_path / "animals" / name).mkdir(parents=True, exist_ok=True)
        (tmp_path / "animals" / name / f"{number}.png").write_bytes(picture(number))
    out = tmp_path / "set"
    write(tmp_path / "animals", out)
    assert (out / "classnames.txt").read_text() == "cat\nred fox\n"
    assert all("{c}" in line for line in (out / "zeroshot_classification_templates.txt").read_text().splitlines())
    assert (out / "dataset_type.txt").read_text() == "classification\n"
    assert (out / "test/nshards.txt").read_text() == "1\n"
    assert [(item.label, item.image) for item in read_shard(str(out / "test/0.tar")) if isinstance(item, RawSample)] == [
        (b"0", picture(1)), (b"0", picture(2)), (b"1", picture(0))]
    assert f"clipkit shards check data='{out}/test/*.tar'" in capsys.readouterr().out
    assert check(str(out / "test/0.tar")) == 0
    assert "classes             2, 1 to 2 samples each" in capsys.readouterr().out


def labelled_folder(folder: Path, **sizes: int) -> Path:
    for name, number in sizes.items():
        (folder / name).mkdir(parents=True)
        for index in range(number):
            (folder / name / f"{index}.png").write_bytes(picture(index))
    return folder


def test_a_labelled_folder_is_divided_class_by_class(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, folder = tmp_path / "set", labelled_folder(tmp_path / "pets", cat=10, big_dog=5, newt=2)
    write(folder, out, test_fraction=0.2, samples_per_shard=20)
    found = {split: [item for item in read_shard(str(out / split / "0.tar")) if isinstance(item, RawSample)]
             for split in ("train", "test")}
    counts = {split: Counter(json.loads(item.json or b"{}")["label"] for item in items) for split, items in found.items()}
    assert counts == {"train": {"cat": 8, "big dog": 4, "newt": 1}, "test": {"cat": 2, "big dog": 1, "newt": 1}}
    names = (out / "classnames.txt").read_text().splitlines()
    assert all(names[int(item.label or b"")] == json.loads(item.json or b"{}")["label"] for item in found["train"])
    assert [item.label for item in found["train"]] != sorted(item.label or b"" for item in found["train"])  # mixed
    shown = capsys.readouterr().out
    assert "experiment=finetune_labels" in shown and f"data.train='{out}/train/*.tar'" in shown
    task = load_task(str(out))
    assert task.classes == ("big dog", "cat", "newt") and task.train is not None

    first = (out / "train/0.tar").read_bytes()
    write(folder, out, test_fraction=0.2, samples_per_shard=20, overwrite=True)
    assert (out / "train/0.tar").read_bytes() == first  # by seed
    with pytest.raises(ValueError, match="holds 1 shards already"):
        write(folder, out, test_fraction=0.2, samples_per_shard=20)


@pytest.mark.parametrize(("sizes", "message"), [
    ({"cat": 3, "dog": 1}, r"1 of 2 classes have one picture \(dog\), which cannot be in both train and test: add pictures"),
    ({}, "test_fraction is 0.5, and the source is a captioned folder; it divides labelled folders: leave it out"),
])
def test_a_folder_that_cannot_be_divided_is_answered_in_one_line(tmp_path: Path, sizes: dict, message: str) -> None:
    folder = labelled_folder(tmp_path / "pets", **sizes)
    if not sizes:
        folder.mkdir()
        (folder / "a.png").write_bytes(picture(0))
        (folder / "a.txt").write_text("a")
    with pytest.raises(ValueError, match=message) as caught:
        write(folder, tmp_path / "set", test_fraction=0.5)
    assert "\n" not in str(caught.value) and not (tmp_path / "set").exists()


def test_image_size_shrinks_larger_pictures_and_keeps_the_others(tmp_path: Path) -> None:
    sizes = {"wide.png": (20, 40), "tall.jpg": (50, 24), "small.png": (8, 30)}
    for name, (height, width) in sizes.items():
        kind = "JPEG" if name.endswith("jpg") else "PNG"
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / name).write_bytes(picture(0, height, width, kind))
        (tmp_path / "in" / name).with_suffix(".txt").write_text(name)
    write(tmp_path / "in", tmp_path / "out", image_size=10)
    found = {(item.text or b"").decode(): item for item in samples(tmp_path / "out")}
    shapes = {name: Image.open(io.BytesIO(item.image or b"")).size for name, item in found.items()}
    assert shapes == {"wide.png": (20, 10), "tall.jpg": (10, 21), "small.png": (30, 8)}
    assert {name: item.suffix for name, item in found.items()} == {"wide.png": "png", "tall.jpg": "jpg",
                                                                   "small.png": "png"}
    assert found["small.png"].image == (tmp_path / "in/small.png").read_bytes()


def test_a_picture_gets_the_suffix_of_what_it_is(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/1.jpg").write_bytes(picture(0, kind="PNG"))
    (tmp_path / "in/1.txt").write_text("a png named jpg")
    write(tmp_path / "in", tmp_path / "out")
    assert [item.suffix for item in samples(tmp_path / "out")] == ["png"]


def test_bad_pictures_are_left_out_counted_and_named(photos: Path, tmp_path: Path,
                                                    capsys: pytest.CaptureFixture[str]) -> None:
    (photos / "part0/0.png").write_bytes(b"<html>")
    (photos / "part0/1.webp").write_bytes(picture(0, 200, 200))
    (photos / "part1/0.txt").unlink()
    write(photos, tmp_path / "out")
    printed = capsys.readouterr().out
    assert "left out as bad: 3" in printed
    for line in ("part0/0.png: 6 bytes that begin with b'<html>'", "part0/1.webp: 200x200 is more than",
                 "part1/0.jpg: 0.txt is not there"):
        assert line in printed
    assert len(samples(tmp_path / "out")) == 22


def test_too_many_bad_pictures_stop_the_command_and_leave_nothing(photos: Path, tmp_path: Path) -> None:
    for path in list(photos.rglob("*.webp")):
        path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"8 of 25 samples are bad, more than max_bad_fraction = 0\.2: not an image 8"):
        write(photos, tmp_path / "out", samples_per_shard=2)
    assert list((tmp_path / "out").iterdir()) == []
    write(photos, tmp_path / "out", samples_per_shard=2, max_bad_fraction=0.5)
    assert len(samples(tmp_path / "out")) == 17


def test_a_source_without_one_good_picture_is_an_error(photos: Path, tmp_path: Path) -> None:
    for path in photos.rglob("*.*"):
        if path.suffix != ".txt":
            path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"gave no sample that can be used: empty image 25"):
        write(photos, tmp_path / "out", max_bad_fraction=1.0)


def test_shards_are_replaced_only_when_asked_and_only_by_a_whole_set(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(photos, out)
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds 3 shards already; give another out=\.\.\., or overwrite=true"):
        write(photos, out)
    for path in photos.rglob("*.webp"):
        path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="are bad"):
        write(photos, out, overwrite=True)
    assert len(samples(out)) == 25
    write(photos, out, overwrite=True, max_bad_fraction=0.5, samples_per_shard=100)
    assert sorted(path.name for path in out.iterdir()) == ["notes.txt", "shard-000000.tar", "sizes.json"]
    assert len(samples(out)) == 17


def test_a_full_disk_is_one_clear_line_and_leaves_nothing(photos: Path, tmp_path: Path,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    def full(tar: tarfile.TarFile, *_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tarfile.TarFile, "addfile", full)
    with pytest.raises(OSError, match=r"cannot write .*: the disk is full"):
        write(photos, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_killed_writers_remains_are_cleared_by_the_next(tmp_path: Path) -> None:
    (tmp_path / ".unfinished").mkdir()
    (tmp_path / ".unfinished/7.tar").write_bytes(b"half a shard")
    with ShardWriter(tmp_path, samples_per_shard=2, name="{}.tar") as second:
        second.write({"txt": b"y"})
    assert [path.name for path in tmp_path.iterdir()] == ["0.tar"]
    assert second.sizes == {"0.tar": 1}


def test_check_reports_counts_sizes_lengths_duplicates_and_causes(tmp_path: Path,
                                                                 capsys: pytest.CaptureFixture[str]) -> None:
    with ShardWriter(tmp_path, samples_per_shard=100, name="shard-{:06d}.tar") as writer:
        for number in range(6):
            writer.write({"png": picture(number, 10 + number, 30), "txt": b"a photo of a cat"})
        writer.write({"png": picture(0, 10, 30), "txt": b"word " * 100})
        writer.write({"jpg": picture(9, 40, 50, "JPEG"), "json": b'{"captions": ["two", "of them"]}'})
        writer.write({"png": picture(0)[:200], "txt": b"cut"})
        writer.write({"png": picture(0)})
        writer.write({"txt": b"alone"})
        writer.write({"png": picture(0), "json": b"[]"})
    assert check(f"{tmp_path}/*.tar") == 1
    lines = {" ".join(line.split()) for line in capsys.readouterr().out.splitlines()}
    assert any(line.startswith("samples 12 (shards 1), good 8, pictures of") for line in lines)
    assert lines >= {"formats png 7, jpg 1", "width, pixels 30 30 50 50", "height, pixels 10 12 40 40",
                     "captions a sample 1 1 2 2", "tokens a caption 3 7 102 102",
                     "long captions 11.1% have more than 77 tokens and are cut",
                     "equal pictures 1 of 8 repeat an earlier one (12.5%)",
                     "equal captions 5 of 9 repeat an earlier one (55.6%)", "6 times 'a photo of a cat'", "bad 4",
                     "truncated image 1", "no caption 1", "no image 1", "bad json 1"}


def test_check_names_damaged_shards_and_bounds_its_examples() -> None:
    report = SetReport()
    for number in range(10):
        check_sample(BadSample("huge member", "a.tar", f"{number}", "too big"), report, count_tokens=len, max_pixels=9)
    check_sample(BadSample("truncated shard", "a.tar", None, "cut"), report, count_tokens=len, max_pixels=9)
    lines = report_lines(report, 77)
    assert report.num_samples == 10
    assert "    a.tar 0: too big" in lines
    assert "    ... and 7 more" in lines
    assert "    a.tar: cut" in lines
    assert len(lines) == 9


def test_check_passes_a_good_set(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(photos, tmp_path / "out")
    assert check(f"{tmp_path}/out/shard-{{000000..000002}}.tar") == 0
    assert "bad                 0 (all can be used)" in capsys.readouterr().out


def test_the_command_line_writes_and_checks(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                            monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["clipkit"])
    main(["write", f"source={photos}", "out=it's, {here}", "samples_per_shard=20"])
    assert len(samples(tmp_path / "it's, {here}")) == 25
    main(["check", "data=it's, {here}/shard-000000.tar", "data=it's, {here}/shard-000001.tar"])
    printed = capsys.readouterr().out
    assert "samples             25 (shards 2), good 25" in printed
    for arguments, message in ((["write", "source=nowhere", "out=x"], "source 'nowhere' does not exist"),
                               (["write", f"source={photos}", "out=x", "sample_per_shard=3"],
                                "sample_per_shard is not a setting; did you mean samples_per_shard?"),
                               (["write", f"source={photos}", "out=x", "samples_per_shard=0"], "must be above 0"),
                               (["write", "out=x"], "source has no value"), (["burn"], "choose write or check"),
                               (["check", "data=none.tar"], "no shard at 'none.tar'"),
                               (["check", f"data={photos}"], "clipkit shards write source=")):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        error = capsys.readouterr().err
        assert ended.value.code == 2
        assert message in error
        assert error.count("\n") == 1
    main([])
    assert "clipkit shards write source=" in capsys.readouterr().out
