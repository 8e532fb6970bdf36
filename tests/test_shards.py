"""Shards: patterns to files, and the reading of one tar, whole or damaged, local or served over HTTP."""

import gzip
import io
import json
import os
import pickle
import tarfile
from pathlib import Path

import pytest
from webdataset.tariterators import group_by_keys, tar_file_expander

from clipkit.data import tars
from clipkit.data.shards import BadSample, RawSample, count_samples, expand_shards, read_shard
from clipkit.data.tars import read_numbered


def write_tar(path: Path, members: list[tuple[str, bytes]], mode: str = "w", tar_format: int = tarfile.GNU_FORMAT) -> str:
    with tarfile.open(path, mode, format=tar_format) as archive:  # pyright: ignore
        for name, data in members:
            header = tarfile.TarInfo(name)
            header.size = len(data)
            archive.addfile(header, io.BytesIO(data))
    return str(path)


def pairs(count: int, start: int = 0) -> list[tuple[str, bytes]]:
    """Members of `count` samples; sizes differ, and some fill whole tar blocks."""
    return [member for i in range(start, start + count)
            for member in ((f"{i:04}.jpg", bytes([i % 256]) * (i * 256)), (f"{i:04}.txt", f"caption {i}".encode()))]


def good(url: str, **options) -> list[RawSample]:
    samples = list(read_shard(url, **options))
    assert all(isinstance(sample, RawSample) for sample in samples), samples
    return samples  # pyright: ignore


# Patterns


def test_braces_globs_and_lists_give_their_files_in_order(tmp_path):
    for name in ("a-000", "a-001", "a-010", "b-x", "b-y"):
        (tmp_path / f"{name}.tar").touch()
    root = str(tmp_path)
    assert expand_shards([f"{root}/a-{{000..001}}.tar"]) == [f"{root}/a-000.tar", f"{root}/a-001.tar"]
    assert expand_shards([f"{root}/b-*.tar", f"{root}/a-0[01]0.tar"]) == [
        f"{root}/{name}.tar" for name in ("b-x", "b-y", "a-000", "a-010")]
    assert expand_shards([f"{root}/{{b,a}}-*.tar"]) == [
        f"{root}/{name}.tar" for name in ("b-x", "b-y", "a-000", "a-001", "a-010")]
    assert expand_shards([f"file://{root}/b-x.tar"] * 2) == [f"{root}/b-x.tar"] * 2


def test_a_file_whose_own_name_holds_braces_or_brackets_is_found(tmp_path):
    for name in ("{000..003}.tar", "x[1].tar", "it's, a=b.tar"):
        (tmp_path / name).touch()
        assert expand_shards([f"{tmp_path}/{name}"]) == [f"{tmp_path}/{name}"]


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "x.tar").touch()
    assert expand_shards(["~/x.tar"]) == [f"{tmp_path}/x.tar"]


@pytest.mark.parametrize(("name", "error", "message"), [
    ("none-*.tar", FileNotFoundError, "no shard matches"),
    ("{000..001}.tar", FileNotFoundError, "000.tar"),
    ("{000..", ValueError, "do not close"),
    ("folder", ValueError, "clipkit shards write source="),
    ("tars", ValueError, "/tars/*.tar'"),
    ("table.csv", ValueError, "clipkit shards write source="),
    ("table.PARQUET", ValueError, "clipkit shards write source="),
])
def test_what_is_no_shard_is_answered_in_one_line_with_what_to_do(tmp_path, name, error, message):
    (tmp_path / "folder").mkdir()
    (tmp_path / "tars").mkdir()
    (tmp_path / "tars/x.tar").touch()
    for table in ("table.csv", "table.PARQUET"):
        (tmp_path / table).touch()
    with pytest.raises(error) as caught:
        expand_shards([f"{tmp_path}/{name}"])
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_pipes_unknown_protocols_and_empty_lists_are_refused():
    with pytest.raises(ValueError, match=r"data\.allow_pipe=true"):
        expand_shards(["pipe:touch /tmp/never"])
    with pytest.raises(ValueError, match="nosuch"):
        expand_shards(["nosuch://bucket/{000..003}.tar"])
    for empty in ([], [""], "x.tar"):
        with pytest.raises(ValueError, match="give a list of tar files"):
            expand_shards(empty)


def test_a_pipe_runs_only_when_allowed(tmp_path):
    path = write_tar(tmp_path / "x.tar", pairs(3))
    mark = tmp_path / "ran"
    url = f"pipe:touch {mark}; cat {path}"
    [refused] = read_shard(url)
    assert isinstance(refused, BadSample) and not mark.exists()
    assert expand_shards([url], allow_pipe=True) == [url]
    assert [sample.key for sample in good(url, allow_pipe=True)] == ["0000", "0001", "0002"]
    assert mark.exists()


# Reading


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_samples_are_those_that_webdataset_reads(tmp_path, mode, tar_format):
    long_name = "folder/" + "n" * 90
    members = [*pairs(4), (f"{long_name}.PNG", b"png"), (f"{long_name}.json", b"{}"), ("z.cls", b"3")]
    path = write_tar(tmp_path / "x.tar", members, mode, tar_format)
    samples = good(path)
    with open(path, "rb") as stream:
        groups = list(group_by_keys(tar_file_expander([{"url": path, "stream": stream}], eof_value=None)))
    for sample, expected in zip(samples, groups, strict=True):
        fields = {sample.suffix: sample.image, "txt": sample.text, "json": sample.json, "cls": sample.label}
        assert sample.key == expected["__key__"] and sample.url == path
        assert {k: v for k, v in fields.items() if v is not None} == {
            k: v for k, v in expected.items() if not k.startswith("__")}
    assert len(samples) == 6


class Payload:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_pickles_links_and_names_that_lead_out_are_passed_over(tmp_path):
    owned = tmp_path / "owned"
    path = tmp_path / "x.tar"
    write_tar(path, [("0000.jpg", b"j"), ("0000.pkl", pickle.dumps(Payload(owned))), ("0000.txt", b"t"),
                     ("evil.pkl", pickle.dumps(Payload(owned))), ("../x.txt", b"out"), ("a/../../x.jpg", b"out"),
                     ("/abs.txt", b"out"), ("noextension", b"-")])
    with tarfile.open(path, "a") as archive:
        link = tarfile.TarInfo("0001.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    before = sorted(tmp_path.parent.rglob("*"))
    assert good(str(path)) == [RawSample("0000", str(path), b"j", "jpg", b"t", None, None)]
    assert count_samples([str(path)]) == 1
    assert not owned.exists() and sorted(tmp_path.parent.rglob("*")) == before


def test_npy_members_are_read_only_where_asked_for(tmp_path):
    path = write_tar(tmp_path / "x.tar", [("0.jpg", b"j"), ("0.npy", b"n"), ("1.npy", b"alone"), ("2.jpg", b"k")])
    assert [(sample.key, sample.multi_hot) for sample in good(path)] == [("0", None), ("2", None)]
    asked = [sample for _, sample in read_numbered(path, with_npy=True) if isinstance(sample, RawSample)]
    assert [(sample.key, sample.multi_hot) for sample in asked] == [("0", b"n"), ("1", b"alone"), ("2", None)]


def test_a_tar_cut_anywhere_gives_the_samples_before_the_cut_and_one_bad_sample(tmp_path):
    members = pairs(4)
    whole = Path(write_tar(tmp_path / "whole.tar", members)).read_bytes()
    with tarfile.open(tmp_path / "whole.tar") as archive:
        starts = [member.offset for member in archive] + [archive.offset]  # where each header begins, then the end mark
    expected = good(str(tmp_path / "whole.tar"))
    cut_path = tmp_path / "cut.tar"
    for cut in [*range(1, starts[-1] + 512, 127), *starts[1:], *(start + 512 for start in starts)]:
        cut_path.write_bytes(whole[:cut])
        *samples, last = read_shard(str(cut_path))
        # Sample i is whole when the data of its second member is, which ends before the padding of the next header.
        ends = [starts[2 * i + 1] + 512 + len(members[2 * i + 1][1]) for i in range(4)]
        num_whole = sum(cut >= end for end in ends)
        if cut >= starts[-1] + 512:  # an end mark of one block does for tarfile
            assert len(samples) + 1 == num_whole == 4 and isinstance(last, RawSample)
            continue
        assert isinstance(last, BadSample) and last.key is None and last.detail
        assert last.cause == ("truncated shard" if cut >= 512 else "unreadable shard")
        # A picture comes without its text where the cut took the text's header too, and with it all knowledge of it.
        num_alone = sum(starts[2 * i] + 512 + len(members[2 * i][1]) <= cut < starts[2 * i + 1] + 512 for i in range(4))
        alone = expected[num_whole:num_whole + num_alone]
        assert [s._replace(url=expected[0].url) for s in samples if isinstance(s, RawSample)] == [
            *expected[:num_whole], *(sample._replace(text=None) for sample in alone)], cut


def test_a_compressed_tar_cut_in_half_is_a_truncated_shard(tmp_path):
    path = tmp_path / "x.tar.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(Path(write_tar(tmp_path / "x.tar", [("0.txt", b"a"), ("1.jpg", os.urandom(200_000)),
                                                       ("2.jpg", os.urandom(200_000))])).read_bytes())
    path.write_bytes(path.read_bytes()[:250_000])
    *samples, last = read_shard(str(path))
    assert [sample.key for sample in samples] == ["0", "1"]
    assert isinstance(last, BadSample) and last.cause == "truncated shard"


def test_damage_in_the_middle_ends_the_shard_and_is_told(tmp_path):
    path = Path(write_tar(tmp_path / "x.tar", pairs(4)))
    with tarfile.open(path) as archive:
        offset = archive.getmembers()[4].offset
    data = bytearray(path.read_bytes())
    data[offset:offset + 512] = b"\xff" * 512
    path.write_bytes(data)
    *samples, last = read_shard(str(path))
    assert [sample.key for sample in samples] == ["0000", "0001"]
    assert isinstance(last, BadSample) and last.cause == "truncated shard"


def test_missing_empty_and_foreign_files_are_one_bad_sample_each(tmp_path):
    (tmp_path / "zero.tar").touch()
    (tmp_path / "page.tar").write_text("<html>not found</html>" * 100)
    write_tar(tmp_path / "none.tar", [])
    write_tar(tmp_path / "other.tar", [("photo.1.jpg", b"j"), ("x.pkl", b"p")])
    for name, cause, detail in (("missing", "unreadable shard", "FileNotFoundError"), ("none", "empty shard", ""),
                                ("zero", "unreadable shard", "empty"), ("page", "unreadable shard", "not a tar"),
                                ("other", "empty shard", "photo.1.jpg")):
        [sample] = read_shard(f"{tmp_path}/{name}.tar")
        assert isinstance(sample, BadSample) and sample.key is None and sample.cause == cause, name
        assert detail in sample.detail


def test_huge_and_duplicate_members_spoil_their_own_sample_only(tmp_path):
    path = write_tar(tmp_path / "x.tar", [("0.jpg", b"1" * 10), ("0.txt", b"a"), ("1.jpg", b"2" * 2000), ("1.txt", b"b"),
                                          ("2.jpg", b"3"), ("2.jpg", b"4"), ("2.txt", b"c"), ("3.txt", b"d")])
    samples = list(read_shard(path, max_member_bytes=1000))
    assert [(s.key, s.cause if isinstance(s, BadSample) else "") for s in samples] == [
        ("0", ""), ("1", "huge member"), ("2", "duplicate member"), ("3", "")]


def test_a_header_that_claims_gigabytes_is_not_read(tmp_path):
    header = tarfile.TarInfo("./PaxHeaders/x")
    header.type, header.size = tarfile.XHDTYPE, 2**32
    (tmp_path / "x.tar").write_bytes(Path(write_tar(tmp_path / "y.tar", pairs(1))).read_bytes()[:1536]
                                     + header.tobuf(tarfile.USTAR_FORMAT) + b"\0" * 4096)
    last = list(read_shard(str(tmp_path / "x.tar")))[-1]
    assert isinstance(last, BadSample) and last.cause == "truncated shard"


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_keep_gives_the_same_samples_as_reading_all_and_choosing(tmp_path, mode):
    path = write_tar(tmp_path / "x.tar", pairs(13), mode)
    everything = good(path)
    for keep in (lambda i: i % 3 == 1, lambda i: i >= 9, lambda i: False, lambda i: i in (0, 12)):
        assert good(path, keep=keep) == [sample for i, sample in enumerate(everything) if keep(i)]


def test_samples_not_kept_are_skipped_without_reading_them(tmp_path, monkeypatch):
    path = write_tar(tmp_path / "x.tar", [(f"{i}.jpg", bytes(10**6)) for i in range(10)])
    num_read = 0

    class Counting(io.FileIO):
        def readinto(self, buffer):
            nonlocal num_read
            count = super().readinto(buffer)
            num_read += count or 0
            return count

    monkeypatch.setattr(tars, "open_shard", lambda url, **_: io.BufferedReader(Counting(url), 4096))
    assert [sample.key for sample in good(path, keep=lambda i: i == 7)] == ["7"]
    assert num_read < 1.2 * 10**6  # one picture and the headers, of ten


# Remote


def test_shards_are_read_from_a_server(tmp_path, server):
    for name, mode in (("000.tar", "w"), ("001.tar", "w:gz")):
        write_tar(tmp_path / name, pairs(5), mode)
    shards = expand_shards([f"{server}/{{000..001}}.tar"])
    assert shards == [f"{server}/000.tar", f"{server}/001.tar"] == expand_shards([f"{server}/*.tar"])
    for shard in shards:
        local = good(str(tmp_path / shard.rpartition("/")[2]))
        assert [sample[2:] for sample in good(shard)] == [sample[2:] for sample in local]
        assert [sample.key for sample in good(shard, keep=lambda i: i == 3)] == ["0003"]
    with pytest.raises(FileNotFoundError, match=r"999\.tar"):
        expand_shards([f"{server}/999.tar"])
    [missing] = read_shard(f"{server}/999.tar")
    assert isinstance(missing, BadSample) and missing.cause == "unreadable shard"


# Counting


def test_samples_are_counted_from_headers_and_remembered(tmp_path):
    shards = [write_tar(tmp_path / f"{i}.tar", pairs(3 + i), "w:gz" if i else "w") for i in range(3)]
    assert count_samples(shards) == 3 + 4 + 5
    assert count_samples([*shards, shards[0]], tmp_path / "cache") == 15
    os.utime(write_tar(tmp_path / "0.tar", pairs(9)), ns=(1, 1))
    assert count_samples(shards, tmp_path / "cache") == 9 + 4 + 5
    remembered = json.loads((tmp_path / "cache/shard_counts.json").read_text())
    (tmp_path / "cache/shard_counts.json").write_text(json.dumps(dict.fromkeys(remembered, 100)))
    assert count_samples(shards, tmp_path / "cache") == 300  # the memory is what answers
    (tmp_path / "cache/shard_counts.json").write_text("{")
    assert count_samples(shards, tmp_path / "cache") == 18  # a damaged one is not


def test_files_beside_the_shards_tell_their_numbers(tmp_path, server):
    for i in range(3):
        write_tar(tmp_path / f"{i}.tar", pairs(1))
    urls = [[f"{root}/{i}.tar" for i in range(3)] for root in (tmp_path, server)]
    assert count_samples(urls[0]) == 3 and count_samples(urls[1]) is None
    (tmp_path / "sizes.json").write_text(json.dumps({f"{i}.tar": 10 for i in range(3)}))
    assert [count_samples(each) for each in urls] == [30, 30]
    (tmp_path / "0_stats.json").write_text(json.dumps({"count": 9, "successes": 5}))
    assert [count_samples(each) for each in urls] == [25, 25]
