"""Pictures that declare more than they hold, take minutes to decode, or are programs."""

import io
import struct
import subprocess
import time
import zlib

import pytest
from PIL import Image

from clipkit.data.decode import MAX_SCANS, DecodeError, decode_image
from tests.test_decode import cause_of, encode, png

MAX_PIXELS = 1_000_000


def tiled_tiff(side: int, tile: int, data: bytes) -> bytes:
    """A grey TIFF of one deflated tile."""
    entries = [(256, side), (257, side), (258, 8), (259, 8), (262, 1), (277, 1), (322, tile), (323, tile), (324, 0),
               (325, len(data))]
    start = 14 + 12 * len(entries)
    table = b"".join(struct.pack("<HHII", tag, 4, 1, start if tag == 324 else value) for tag, value in entries)
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + table + bytes(4) + data


def bombs() -> dict[str, bytes]:
    side = 60_000
    jpeg = bytearray(encode(Image.new("L", (8, 8)), "JPEG"))
    at = jpeg.index(b"\xff\xc0") + 5
    jpeg[at:at + 4] = struct.pack(">HH", side, side)
    return {"png": png(side, side), "gif": b"GIF89a" + struct.pack("<HH", side, side) + bytes(30), "jpeg": bytes(jpeg),
            "webp": (b"RIFF" + struct.pack("<I", 100) + b"WEBPVP8X" + struct.pack("<II", 10, 0) + b"\x5f\xea\0" * 2
                     + bytes(70)),
            "ppm": b"P6 60000 60000 255\n" + bytes(30), "tiff": tiled_tiff(side, 64, zlib.compress(bytes(4096))),
            "tile": tiled_tiff(16, side // 4, zlib.compress(bytes(4096))),
            "bmp": b"BM" + struct.pack("<IIIIiiHHIIIIII", 99, 0, 54, 40, side, side, 1, 24, 0, 0, 0, 0, 0, 0) + bytes(30)}


@pytest.mark.parametrize("kind", bombs())
def test_a_size_that_is_declared_and_too_large_is_refused_before_any_pixel_is_there(kind, peak_megabytes):
    def refuse() -> str:
        with pytest.raises(DecodeError) as caught:
            decode_image(bombs()[kind], max_pixels=MAX_PIXELS)
        return caught.value.cause

    cause, peak = peak_megabytes(refuse)
    assert cause == "huge image" and peak < 5


def test_a_jpeg_of_scans_without_end_is_refused_at_once_and_usual_ones_are_not():
    image = Image.effect_noise((256, 256), 50)
    progressive = encode(image, "JPEG", progressive=True)
    last = progressive[progressive.rindex(b"\xff\xda"):-2]
    before = time.process_time()
    bomb, frame = progressive[:-2] + last * 500 + b"\xff\xd9", progressive.index(b"\xff\xc2")
    for data in (bomb, bomb[:frame] + bytes(4) + bomb[frame:]):  # bytes that libjpeg passes over
        with pytest.raises(DecodeError, match=f"more than {MAX_SCANS} are not decoded"):
            decode_image(data, max_pixels=MAX_PIXELS)
    assert time.process_time() - before < 1
    thumbnail = encode(image, "JPEG", exif=b"Exif\0\0" + encode(image.resize((16, 16)), "JPEG"))
    for data in (progressive, thumbnail, encode(image.convert("RGB"), "JPEG", progressive=True, quality=95)):
        assert decode_image(data, max_pixels=MAX_PIXELS).shape == (256, 256, 3)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_of_an_animation_of_many_frames_one_is_decoded(kind):
    frames = [Image.new("RGB", (16, 16), (i % 256, 0, 0)) for i in range(300)]
    data = encode(frames[0], kind, save_all=True, append_images=frames[1:])
    before = time.process_time()
    assert decode_image(data, max_pixels=MAX_PIXELS).shape == (16, 16, 3)
    assert time.process_time() - before < 1


@pytest.mark.parametrize("data", [
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(evil) (w) file\n", b"%PDF-1.4\n1 0 obj\n",
    b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    b"\xc5\xd0\xd3\xc6" + bytes(40), b"#!/bin/sh\ntouch ../evil\n", b"\x80\x04cos\nsystem\n", b"\0" * 10**6,
    b"PK\3\4" + bytes(99),
    b"\0\0\0\x20ftypavif" + bytes(99), b"\x8aMNG\r\n\x1a\n" + bytes(40), b"8BPS" + bytes(99), b"ustar" * 200,
])
def test_what_is_no_picture_starts_no_program(data):
    assert cause_of(data) == "not an image"
    assert cause_of(b"GIF89a" + data) in ("not an image", "corrupt image", "truncated image", "huge image", "zero-size image")
    assert subprocess.Popen.__name__ == "refuse"  # Ghostscript, had it been looked for


def test_metadata_that_expands_and_text_behind_the_picture_do_no_harm(peak_megabytes):
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    bomb = zlib.compress(bytes(10**8))
    plain = encode(Image.new("RGB", (8, 8)), "PNG")
    for kind, body in ((b"zTXt", b"a\0\0" + bomb), (b"iCCP", b"a\0\0" + bomb), (b"iTXt", b"a\0\1\0\0\0" + bomb)):
        data = plain[:33] + chunk(kind, body) * 5 + plain[33:] + b"%PDF-1.4 <svg>" * 100

        def read(data: bytes = data) -> str:
            try:
                return str(decode_image(data, max_pixels=MAX_PIXELS).shape)
            except DecodeError as error:
                return error.cause

        outcome, peak = peak_megabytes(read)
        assert outcome in ("(8, 8, 3)", "corrupt image") and peak < 20
    for junk in (b"Exif\0\0" + b"MM\0*" + b"\xff" * 400, b"Exif\0\0" + b"II*\0\x08\0\0\0" + b"\xff" * 60_000):
        assert decode_image(encode(Image.new("RGB", (8, 8)), "JPEG", exif=junk), max_pixels=MAX_PIXELS).shape == (8, 8, 3)


def test_numbers_that_overrun_a_palette_are_a_picture_or_a_bad_sample():
    buffer = io.BytesIO()
    image = Image.new("P", (8, 8), 255)
    image.putpalette([1, 2, 3])
    image.save(buffer, "PNG", bits=8)
    assert decode_image(buffer.getvalue(), max_pixels=MAX_PIXELS).shape == (8, 8, 3)
    assert cause_of(png(8, 8, bits=16, colour=0, rows=b"\0" * 9)) == "truncated image"
