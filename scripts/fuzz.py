"""Fuzz what clipkit reads of data: tars, pictures, captions. `python -m scripts.fuzz --minutes 10`

Needs hypothesis >= 6.100 (in the [dev] extra: pip install "clipkit-vl[dev]"). Valid shards, pictures and captions are
changed as damage and malice change them (bits, cuts, splices, header fields) and read as training reads them. Each input has
to end as a sample or as a bad sample with its cause. Ends with a table, and with code 1 after a crash, an input that took over
5 s, or a file outside the run's folder; such inputs are kept below --keep.

Expected in 10 minutes: about 20,000 inputs on a busy core, no failure (docs/security.md, docs/benchmarks/fuzz.json).
"""

import argparse
import io
import json
import random
import resource
import struct
import sys
import tarfile
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from clipkit.data.check import sample_captions
from clipkit.data.decode import DecodeError, decode_image
from clipkit.data.samples import SampleError, choose_caption, group_id, parse_json
from clipkit.data.tars import BadSample, RawSample, read_shard

HANG_SECONDS = 5.0
MAX_PIXELS = 50_000_000  # as conf/ has it
PICTURES: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("JPEG", "RGB", {}), ("JPEG", "RGB", {"progressive": True}), ("JPEG", "CMYK", {}), ("JPEG", "L", {}), ("PNG", "RGBA", {}),
    ("PNG", "P", {}), ("PNG", "I;16", {}), ("PNG", "RGB", {"optimize": True}), ("WEBP", "RGBA", {"lossless": True}),
    ("WEBP", "RGB", {}), ("GIF", "P", {}), ("BMP", "RGB", {}), ("BMP", "P", {}), ("TIFF", "RGB", {"compression": "tiff_lzw"}),
    ("TIFF", "L", {"compression": "tiff_adobe_deflate"}), ("TIFF", "I;16", {}), ("PPM", "RGB", {}), ("PPM", "L", {}))
RSS_UNITS_A_MB = 2**20 if sys.platform == "darwin" else 2**10
NUMBERS = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF)


@dataclass
class Tally:
    """What became of the inputs."""

    inputs: Counter[str] = field(default_factory=Counter)  # by kind
    outcomes: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    slowest: tuple[float, str] = (0.0, "")
    failures: list[str] = field(default_factory=list)


def pictures(seed: int) -> list[bytes]:
    """Small valid pictures of every format and mode."""
    rng = np.random.default_rng(seed)
    found = []
    for name, mode, options in PICTURES:
        pixels = rng.integers(0, 256, (24, 40, 3), dtype=np.uint8)  # (H, W, 3)
        grey = Image.fromarray(pixels[..., 0].astype(np.uint16) * 256)
        image = grey if mode == "I;16" else Image.fromarray(pixels).convert(mode)
        buffer = io.BytesIO()
        image.save(buffer, name, **options)
        found.append(buffer.getvalue())
    for name in ("GIF", "WEBP"):
        frames = [Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8)) for _ in range(3)]
        buffer = io.BytesIO()
        frames[0].save(buffer, name, save_all=True, append_images=frames[1:])
        found.append(buffer.getvalue())
    return found


def shards(images: list[bytes]) -> list[bytes]:
    """Small valid shards: of each format of tar, with long names, plain and compressed."""
    found = []
    for mode, kind in (("w", tarfile.USTAR_FORMAT), ("w", tarfile.GNU_FORMAT), ("w", tarfile.PAX_FORMAT),
                       ("w:gz", tarfile.PAX_FORMAT), ("w:bz2", tarfile.GNU_FORMAT), ("w:xz", tarfile.USTAR_FORMAT)):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode=mode, format=kind) as archive:  # pyright: ignore
            for number in range(3):
                key = f"é{number}" * (60 if kind != tarfile.USTAR_FORMAT and number == 1 else 1)
                for suffix, data in (("jpg", images[number]), ("txt", b"a cat"), ("json", b'{"captions": ["a dog"], "n": 1}')):
                    header = tarfile.TarInfo(f"{key}.{suffix}")
                    header.size = len(data)
                    archive.addfile(header, io.BytesIO(data))
        found.append(buffer.getvalue())
    return found


def texts() -> list[bytes]:
    values = [{"captions": ["a cat", "猫"], "label": 3}, {"captions": "a dog", "deep": [[[{"a": None}]]]},
              {"captions": [1, None, "\ud800"]}]
    plain = ["\ufeffa photo of a 🐈".encode(), "été".encode("latin-1"), b"a\x00b\x1b[2J"]
    return [json.dumps(value).encode() for value in values] + plain


def mutate(draw: Callable[[Any], Any], seeds: list[bytes], words: list[bytes]) -> bytes:
    """Change a valid input in one to six places."""
    from hypothesis import strategies as st

    data = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(1, 6))):
        how = draw(st.sampled_from(("flip", "number", "word", "cut", "repeat", "splice", "zero")))
        at = draw(st.integers(0, max(0, len(data) - 1)))
        length = draw(st.sampled_from((1, 2, 4, 12, 64, 512, 4096)))
        if how == "flip" and data:
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif how == "number":
            order = draw(st.sampled_from((">", "<")))
            packed = struct.pack(f"{order}I", draw(st.sampled_from(NUMBERS)))
            data[at:at + 4] = packed
        elif how == "word":
            word = draw(st.sampled_from(words))
            data[at:at + len(word)] = word
        elif how == "cut":
            del data[at:at + length if draw(st.booleans()) else len(data)]
        elif how == "repeat":
            data[at:at] = data[at:at + length] * draw(st.integers(1, 50))
        elif how == "splice":
            other = draw(st.sampled_from(seeds))
            start = draw(st.integers(0, max(0, len(other) - 1)))
            data[at:at] = other[start:start + length]
        else:
            data[at:at + length] = bytes(len(data[at:at + length]))
    return bytes(data)


def right_checksums(data: bytes) -> bytes:
    """Give every tar header in some bytes the checksum of what it says: else most changes would end at that."""
    blocks = bytearray(data)
    for at in range(0, len(blocks) - 511, 512):
        if blocks[at + 257:at + 262] == b"ustar":
            blocks[at + 148:at + 156] = b" " * 8
            blocks[at + 148:at + 156] = b"%06o\0 " % (sum(blocks[at:at + 512]) & 0o777777)
    return bytes(blocks)


def read_tar(data: bytes, tokenize: Callable[[list[str]], Any]) -> Iterator[str]:
    Path("0.tar").write_bytes(data)
    for item in read_shard("0.tar"):
        if isinstance(item, BadSample):
            yield item.cause
        else:
            yield from read_captions(item, tokenize)
            yield from () if item.image is None else read_picture(item.image, tokenize)


def read_picture(data: bytes, tokenize: Callable[[list[str]], Any]) -> Iterator[str]:
    try:
        pixels = decode_image(data, max_pixels=MAX_PIXELS, fast_size=16)
        assert pixels.ndim == 3 and pixels.shape[2] == 3 and pixels.dtype == np.uint8
        yield "picture"
    except DecodeError as error:
        yield error.cause


def read_text(data: bytes, tokenize: Callable[[list[str]], Any]) -> Iterator[str]:
    yield from read_captions(RawSample("a", "0.tar", None, "", data, None, None), tokenize)
    yield from read_captions(RawSample("a", "0.tar", None, "", None, data, data), tokenize)


def read_captions(raw: RawSample, tokenize: Callable[[list[str]], Any]) -> Iterator[str]:
    for fields in (None, ["label", "captions", "a {deep}", "txt"]):
        try:
            found = parse_json(raw.json)
            caption = choose_caption(raw.text, found, fields, None, random.Random(0))
            group_id("caption", caption, found)
            assert tokenize([caption]).shape == (1, 77)
            assert all(map(str.strip, sample_captions(raw)))
            yield "caption"
        except SampleError as error:
            yield error.cause


WORDS = {
    "tar": [b"\xff" * 12, b"x", b"g", b"L", b"S", b"2", b"ustar\0", b"../../x.jpg\0", b"/x.jpg\0", b"77777777777\0",
            b"13 size=-512\n", b"22 GNU.sparse.major=1\n", b"\x80" + bytes(3) + b"\x7f" * 8],
    "picture": [b"\xff\xda", b"\xff\xc2", b"\xff\xd8\xff", b"IDAT", b"iCCP", b"zTXt", b"acTL", b"fdAT", b"VP8X", b"ANMF",
                b"GIF89a", b"\x2c", b"BM", b"II*\0", b"MM\0*", b"%!PS-Adobe", b"<svg", b"%PDF", b"P6 99999 99999 255\n"],
    "text": [b'"captions"', b"[" * 2000, b"{", b"NaN", b"1e999", b"\\ud800", b"\\u0000", b"\x1b]0;x\a", b"\xff",
             "\u202e".encode(), b"9" * 5000, b"&amp;" * 400, b"a" * 3000],
}
READERS = {"tar": read_tar, "picture": read_picture, "text": read_text}


def try_one(kind: str, data: bytes, tally: Tally, keep: Path, tokenize: Callable[[list[str]], Any]) -> None:
    """Read one input as training would; what should not be is kept."""
    (keep / "last").write_bytes(data)  # what a crash of the process itself leaves
    tally.inputs[kind] += 1
    start, fault = time.process_time(), ""
    try:
        tally.outcomes[kind].update(READERS[kind](data, tokenize))
    except Exception as error:  # any is a find
        fault = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    seconds = time.process_time() - start
    if seconds > HANG_SECONDS:
        fault = fault or f"took {seconds:.1f} s"
    if seconds > tally.slowest[0]:
        tally.slowest = (seconds, kind)
    if fault:
        name = f"{kind}-{len(tally.failures)}"
        (keep / name).write_bytes(data)
        tally.failures.append(f"{name}: {fault}")


def fuzz(minutes: float, seed: int, keep: Path) -> Tally:
    """Try inputs until the time is over, in a folder of their own; the current one is put back afterwards."""
    import faulthandler

    import hypothesis
    from hypothesis import strategies as st

    from clipkit.data.tokenize import make_tokenizer

    tokenize, tally, images = make_tokenizer({"context_length": 77}), Tally(), pictures(seed)
    seeds = {"tar": shards(images), "picture": images, "text": texts()}
    tokenize(["a cat"])
    checks: Any = list(hypothesis.HealthCheck)
    end, number = time.monotonic() + 60 * minutes, seed
    while time.monotonic() < end:
        number += 1

        @hypothesis.seed(number)
        @hypothesis.settings(max_examples=200, deadline=None, database=None, suppress_health_check=checks,
                             phases=[hypothesis.Phase.generate])
        @hypothesis.given(st.data())
        def one_round(data: Any) -> None:
            kind = data.draw(st.sampled_from(tuple(READERS)))
            changed = mutate(data.draw, seeds[kind], WORDS[kind])
            if kind == "tar" and data.draw(st.booleans()):
                changed = right_checksums(changed)
            if time.monotonic() < end:
                faulthandler.dump_traceback_later(60, exit=True, file=sys.__stderr__ or sys.stderr)  # a loop inside a library
                try_one(kind, changed, tally, keep, tokenize)

        one_round()
    faulthandler.cancel_dump_traceback_later()
    return tally


def summary(tally: Tally, strays: list[str], minutes: float, seed: int) -> dict[str, Any]:
    return {"minutes": minutes, "seed": seed, "inputs": dict(tally.inputs),
            "outcomes": {kind: dict(found.most_common()) for kind, found in tally.outcomes.items()},
            "slowest_cpu_seconds": round(tally.slowest[0], 3), "slowest_kind": tally.slowest[1],
            "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // RSS_UNITS_A_MB,
            "failures": tally.failures, "files_outside": strays}


def main() -> int:
    import os

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, default=Path("fuzz-failures"), help="folder for inputs that fail")
    parser.add_argument("--json", type=Path, help="also write the table here")
    arguments = parser.parse_args()
    try:
        import hypothesis  # noqa: F401
    except ImportError:
        parser.error('hypothesis is not installed; run: pip install "clipkit-vl[dev]"')
    keep, table = arguments.keep.resolve(), arguments.json and arguments.json.resolve()
    keep.mkdir(parents=True, exist_ok=True)
    home = Path.cwd()
    with tempfile.TemporaryDirectory() as place:
        inside = Path(place) / "inside"
        inside.mkdir()
        os.chdir(inside)
        tally = fuzz(arguments.minutes, arguments.seed, keep)
        os.chdir(home)
        strays = sorted(str(path.relative_to(place)) for path in Path(place).rglob("*")
                        if path != inside and path.relative_to(place).parts[1:] not in (("0.tar",), (".hypothesis",))
                        and ".hypothesis" not in path.parts)
    found = summary(tally, strays, arguments.minutes, arguments.seed)
    text = json.dumps(found, indent=1) + "\n"
    print(text, end="")
    if table:
        table.write_text(text, encoding="utf-8")
    (keep / "last").unlink(missing_ok=True)
    if not any(keep.iterdir()):
        keep.rmdir()
    return 1 if tally.failures or strays else 0


if __name__ == "__main__":
    sys.exit(main())
