"""Shards made to run code, to write where they should not, to fill the memory or to go on for ever."""

import bz2
import gzip
import io
import json
import lzma
import pickle
import random
import struct
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from clipkit.data.archive import MAX_EXPANSION, SAFE_EXPANSION_BYTES
from clipkit.data.check import BadCount, SetReport, check_sample
from clipkit.data.samples import SampleError, choose_caption, parse_json
from clipkit.data.shards import expand_shards
from clipkit.data.tars import MAX_TEXT_BYTES, BadSample, RawSample, read_numbered, read_shard
from tests.security.conftest import Evil
from tests.test_shards import write_tar

PAIR = [("a.jpg", b"picture"), ("a.txt", b"caption")]
BLOCK = tarfile.BLOCKSIZE


def header(name: str, size: int | bytes = 0, kind: bytes = tarfile.REGTYPE) -> bytes:
    """A tar header with a right checksum, whatever its size field says."""
    field = size if isinstance(size, bytes) else b"%011o\0" % size
    block = bytearray(name.encode()[:100].ljust(100, b"\0") + b"0000644\0" + b"0000000\0" * 2 + field.ljust(12, b"\0")
                      + b"00000000000\0" + b" " * 8 + kind + bytes(100) + b"ustar\00000" + bytes(247))
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % BLOCK)


def pax(*fields: tuple[str, str], kind: bytes = tarfile.XHDTYPE) -> bytes:
    data = b""
    for name, value in fields:
        body = f" {name}={value}\n".encode()
        length = next(n for n in range(len(body), len(body) + 9) if n == len(body) + len(str(n)))
        data += str(length).encode() + body
    return header("pax", len(data), kind) + padded(data)


def first_good(place: Path, hostile: bytes, *, end: bytes = bytes(2 * BLOCK)) -> list[RawSample | BadSample]:
    """What a shard gives that has a good sample before what is hostile."""
    path = place / "0.tar"
    good = b"".join(header(name, len(data)) + padded(data) for name, data in PAIR)
    path.write_bytes(good + hostile + end)
    first, *others = read_shard(str(path))
    assert isinstance(first, RawSample) and (first.key, first.image, first.text) == ("a", b"picture", b"caption")
    return others


def causes(items: list[RawSample | BadSample]) -> list[str]:
    return [item.cause if isinstance(item, BadSample) else item.key for item in items]


def test_pickles_arrays_and_programs_among_the_members_are_never_looked_at(place):
    buffer = io.BytesIO()
    np.save(buffer, np.array([Evil()], dtype=object), allow_pickle=True)
    members = [(f"a.{suffix}", pickle.dumps(Evil())) for suffix in ("pkl", "pickle", "pyd", "pth", "pt", "ckpt", "py", "so")]
    items = list(read_shard(write_tar(place / "0.tar", [*PAIR, *members, ("a.npy", buffer.getvalue())])))
    assert [(item.key, item.text) for item in items] == [("a", b"caption")]
    (_, sample), = read_numbered(str(place / "0.tar"), with_npy=True)
    from clipkit.evaluation.benchmark_layout import _multi_hot

    with pytest.raises(SampleError, match=r"the \.npy cannot be read"):
        _multi_hot(sample, num_classes=1)


@pytest.mark.parametrize("name", ["../evil.jpg", "/evil.jpg", "a/../../evil.jpg", "./../evil.jpg", "..\\evil.jpg",
                                  "C:\\evil.jpg", "evil\0.jpg", "\x1b[2Jevil.jpg", "evil" * 2500 + ".jpg", ".jpg", "..jpg",
                                  "évil\u202e.jpg"])
@pytest.mark.parametrize("tar_format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_no_name_of_a_member_writes_or_reads_a_file(place, name, tar_format):
    items = list(read_shard(write_tar(place / "0.tar", [*PAIR, (name, b"x")], tar_format=tar_format)))
    assert causes(items)[0] == "a" and len(items) <= 2  # a key at most: "evil", or nothing
    assert [path.name for path in place.iterdir()] == ["0.tar"]


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE,
                                  tarfile.DIRTYPE, tarfile.CONTTYPE, b"Z"])
def test_links_devices_pipes_and_folders_named_as_pictures_are_passed_over(place, kind):
    others = first_good(place, header("b.jpg", 0, kind))
    assert causes(others) in ([], ["b"])  # of an unknown kind: a plain file, as tar takes it
    assert not others or others[0].image == b""


@pytest.mark.parametrize(("hostile", "expected"), [
    (header("b.jpg", b"\xff" * 12), "truncated shard"),  # -1 in base 256: tarfile goes back, for ever
    (header("b.jpg", b"\xff" + (-4096).to_bytes(11, "big", signed=True)), "truncated shard"),
    (header("b.jpg", b"\x80" + (2**63).to_bytes(11, "big")), "truncated shard"),
    (header("b.jpg", b"\x80" + (2**62).to_bytes(11, "big")), "truncated shard"),
    (header("b", b"\xff" * 12, tarfile.XHDTYPE), "truncated shard"),
    (header("b", 2**30, tarfile.XHDTYPE), "truncated shard"),
    (header("b", 2**30, tarfile.GNUTYPE_LONGNAME), "truncated shard"),
    (pax(("size", "-1024")) + header("b.jpg"), "truncated shard"),
    (pax(("size", "9" * 5000)) + header("b.jpg"), "truncated shard"),
    (pax(("size", "1e9")) + header("b.jpg"), "truncated shard"),
    (header("pax", 20, tarfile.XHDTYPE) + padded(b"99999999 path=evil\n") + header("b.jpg"), "truncated shard"),
    (header("pax", 20, tarfile.XHDTYPE) + padded(b"0 path=evil.jpg\n") + header("b.jpg"), "truncated shard"),
    (header("pax", 2**20, tarfile.XHDTYPE) + b"1" * 2**20 + header("b.jpg"), "truncated shard"),  # tarfile: 2^39 steps
    ((header("x", BLOCK, tarfile.GNUTYPE_LONGNAME) + b"n" * BLOCK) * 5000, "truncated shard"),
    (pax(("path", "x")) * 5000, "truncated shard"),
    (header("b", 0, tarfile.GNUTYPE_SPARSE)[:482] + b"\1" + bytes(29), "truncated shard"),
    (b"\xff" * 4096, "truncated shard"),
])
def test_headers_that_lie_end_the_shard_after_its_good_samples(place, hostile, expected):
    before = time.perf_counter()
    assert causes(first_good(place, hostile))[-1:] == [expected]
    assert time.perf_counter() - before < 5


def test_pax_fields_of_no_use_are_passed_over(place):
    hostile = (pax(("path", "b.jpg"), ("size", "3"), ("comment", "\udc80".encode("utf-8", "replace").decode()),
                   ("hdrcharset", "BINARY")) + header("x") + padded(b"jpg")
               + pax(("path", "evil.jpg"), ("size", "9"), kind=tarfile.XGLTYPE) + header("c.jpg", 1) + padded(b"c")
               + pax(("GNU.sparse.major", "1"), ("GNU.sparse.realsize", "9" * 15)) + header("d.jpg", 5) + padded(b"9\n9\n9")
               + header("pax", 15, tarfile.XHDTYPE) + padded(b"15 path=\xff\xfe.jpg\n") + header("x", 1) + padded(b"e"))
    others = first_good(place, hostile)
    assert [(item.key, item.image) for item in others] == [("b", b"jpg"), ("c", b"c"), ("\udcff\udcfe", b"e")]


def test_a_million_fields_for_all_members_do_not_slow_each_of_them(place):
    shared = pax(*((f"a{i}", "") for i in range(60_000)), kind=tarfile.XGLTYPE)
    before = time.perf_counter()
    others = first_good(place, shared + b"".join(header(f"{i}.jpg", 1, tarfile.AREGTYPE) + padded(b"x") for i in range(2000)))
    assert len(others) == 2000 and time.perf_counter() - before < 5  # tarfile: 8 ms each


def write_many(path: Path, count: int) -> str:
    """A shard of `count` members of which one in a hundred is a picture."""
    nothing, body = header("x.pkl", 1) + padded(b"x"), padded(b"x")
    with path.open("wb") as file:
        for i in range(count // 100):
            file.write(header(f"{i}.jpg", 1) + body + nothing * 99)
        file.write(bytes(2 * BLOCK))
    return str(path)


def test_thousands_of_members_take_the_memory_of_a_few(place, peak_megabytes):
    path = write_many(place / "0.tar", 3000)
    count, peak = peak_megabytes(lambda: sum(1 for _ in read_shard(path)))
    assert count == 30 and peak < 1


@pytest.mark.slow
def test_a_million_members_are_read_in_the_time_of_their_headers(place):
    assert sum(1 for _ in read_shard(write_many(place / "0.tar", 10**6))) == 10_000


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress])
def test_zeros_that_expand_without_end_are_cut_off_in_bounded_memory(place, compress, peak_megabytes):
    """10 GB in the file's own words: each stream of a compressed file may be followed by a further one."""
    piece = compress(bytes(2**25))
    bomb = compress(header("b.jpg", b"\x80" + (10 * 2**30).to_bytes(11, "big"))) + piece * 320
    assert len(bomb) < 12e6
    (place / "0.tar.x").write_bytes(compress(b"".join(header(n, len(d)) + padded(d) for n, d in PAIR)) + bomb)
    items, peak = peak_megabytes(lambda: list(read_shard(str(place / "0.tar.x"))))
    assert peak < 16
    assert causes(items) == ["a", "huge member", "truncated shard"] and "a decompression bomb" in items[2].detail
    assert SAFE_EXPANSION_BYTES + MAX_EXPANSION * len(bomb) < 2 * 2**30


def test_many_small_members_that_make_one_huge_sample_are_one_bad_sample(place, peak_megabytes):
    kinds = ("jpg", "png", "webp", "gif", "bmp", "tif", "ppm")
    path = write_tar(place / "0.tar", [*((f"a.{kind}", bytes(600_000)) for kind in kinds), ("b.txt", b"b")])
    items, peak = peak_megabytes(lambda: list(read_shard(path, max_member_bytes=10**6)))
    assert causes(items) == ["huge member", "b"] and peak < 3


@pytest.mark.parametrize("suffix", ["txt", "json", "cls"])
def test_a_text_that_is_larger_than_any_caption_is_not_read(place, suffix):
    path = write_tar(place / "0.tar", [("a.jpg", b"x"), (f"a.{suffix}", b" " * (MAX_TEXT_BYTES + 1)), ("b.txt", b"b")])
    assert causes(list(read_shard(path))) == ["huge member", "b"]


@pytest.mark.parametrize("data", [b"[" * 10**6, b'{"captions":' * 10**5, b'{"a": 1' + b"0" * 10**5 + b"}", b"NaN", b"[]", b"",
                                  b'"x"', b'{"a": 1', b"\xff\xfe\xfd", b"\x1b[2J", b'{"a": "\xff"}'])
def test_a_json_that_is_no_object_is_a_bad_sample(data):
    with pytest.raises(SampleError) as caught:
        parse_json(data)
    assert caught.value.cause == "bad json"


def test_a_json_at_the_limit_takes_a_bounded_memory(peak_megabytes):
    worst = b'{"captions":[' + b"[],{}," * (MAX_TEXT_BYTES // 6 - 4) + b"0]}"
    fields, peak = peak_megabytes(lambda: parse_json(worst))
    assert peak < 40 * MAX_TEXT_BYTES / 1e6
    with pytest.raises(SampleError):
        choose_caption(None, fields, None, None, random.Random(0))


@pytest.mark.parametrize(("data", "cause"), [
    (b'{"captions": ["\\ud800"]}', "bad text"), (b'{"captions": {"a": 1}}', "no caption"),
    (b'{"captions": [NaN, 1e999, null]}', "no caption"),
])
def test_captions_that_are_no_text_are_bad_samples(data, cause):
    with pytest.raises(SampleError) as caught:
        choose_caption(None, parse_json(data), None, None, random.Random(0))
    assert caught.value.cause == cause


@pytest.mark.parametrize("text", ["caption".encode("utf-16"), b"\xe9t\xe9", b"\x80\x04pickle"])
def test_a_text_of_another_encoding_is_a_bad_sample(text):
    with pytest.raises(SampleError, match="bad text"):
        choose_caption(text, {}, None, None, random.Random(0))


def test_repeated_keys_and_a_long_caption_do_no_harm():
    assert parse_json(b'{"captions": "a", "captions": "b"}') == {"captions": "b"}
    from clipkit.data.tokenize import make_tokenizer

    tokenizer = make_tokenizer({"context_length": 77})
    letters = random.Random(0)
    word = "".join(letters.choice("etaoinshrdlu") for _ in range(10**6))
    before = time.perf_counter()
    hostile = [word, word[:2400] + "é" * 10**5, "\x1b]0;evil\a", "&" * 10**5, "\0" * 10**5, "\u0301" * 10**5, "猫" * 10**5,
               " " * 10**6 + "a cat"]
    tokens = tokenizer(hostile)  # (8, 77)
    assert tokenizer.count_cut(hostile[:1]) == 1
    assert time.perf_counter() - before < 20  # open_clip's own: an hour
    assert torch.equal(tokens[-1], tokenizer(["a cat"])[0])
    ordinary = " ".join(word[i:i + 5] for i in range(0, 4000, 5))
    expected = tokenizer.tokenizer(ordinary)[0]  # open_clip's own, of the whole text
    assert torch.equal(tokenizer([ordinary])[0], expected.int())


def test_control_characters_reach_no_terminal(capsys, place):
    import sys

    from clipkit.config.launch import one_line_errors
    from clipkit.training.live_line import LiveLine

    name = "\x1b]0;evil\a\u202e\udcff"
    report = SetReport()
    check_sample(RawSample(name, "0.tar", b"x", "jpg", b"t", None, None), report, count_tokens=len, max_pixels=9)
    bad = BadCount()
    bad.add("corrupt image", f"{name}: x")
    with pytest.raises(SystemExit), one_line_errors():
        raise ValueError(f"sample {name} is bad")
    LiveLine(sys.stdout).say(f"warning: {name}")
    shown = "\n".join([*report.bad.lines(), *bad.lines(), *capsys.readouterr()])
    assert "\\x1b]0;evil\\x07\\u202e\\udcff" in shown and "".join(shown.split()).isprintable()


@pytest.mark.parametrize("place_of_url", ["train", "shard", "side file", "task", "table"])
def test_pipe_urls_start_nothing_wherever_a_url_can_come(place, place_of_url):
    url = "pipe:touch ../evil"
    if place_of_url == "train":
        with pytest.raises(ValueError, match="pipe: is refused"):
            expand_shards([url])
    elif place_of_url == "shard":
        assert causes(list(read_shard(url))) == ["unreadable shard"]
    elif place_of_url == "side file":
        from clipkit.data.shards import _read_json

        assert _read_json(url) is None
    elif place_of_url == "task":
        from clipkit.evaluation.benchmark_layout import find_benchmark_set

        assert find_benchmark_set(url) is None
    else:
        from clipkit.data.tables import Record, SourceError, read_picture

        for one in (url, "pipe::" + url, f"simplecache::{url}"):
            with pytest.raises(SourceError):
                read_picture(Record("row 1", one, "x"))


@pytest.mark.parametrize("number", ["-1", "7", "1" * 400, "1_0", "\uff19", "", "x"])
def test_a_class_number_that_is_none_is_told(number):
    from clipkit.evaluation.benchmark_layout import _class_number

    raw = RawSample("a", "0.tar", b"x", "jpg", None, None, number.encode())
    with pytest.raises(ValueError, match=r"outside the 3 classes|bad label"):
        _class_number(raw, num_classes=3)


def test_a_shard_beside_a_lying_count_is_read_whole(place):
    from clipkit.data.shards import count_samples

    path = write_tar(place / "0.tar", PAIR)
    for text in ("[" * 10**5, json.dumps({"successes": "x"}), json.dumps([]), struct.pack(">Q", 2**63).hex()):
        (place / "0_stats.json").write_text(text)
        assert count_samples([path]) == 1
