"""Every kind of picture that design.md and the issue name, decoded or refused with its cause."""

import contextlib
import io
import struct
import tracemalloc
import zlib
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as transforms

from clipkit.data.decode import DecodeError, crop_and_resize, decode_image

MAX_PIXELS = 10_000_000
JPEG_TOLERANCE = 6  # grey levels: two builds of libjpeg-turbo differ in chroma upsampling and DCT rounding


def smooth_picture(height: int = 60, width: int = 90, channels: int = 3) -> np.ndarray:
    """A picture (H, W, C) of slow waves, which survives JPEG well."""
    y, x = np.mgrid[:height, :width]
    waves = [127 + 120 * np.sin(x / (11 + 3 * c) + c) * np.cos(y / (9 + 2 * c)) for c in range(channels)]
    return np.stack(waves, axis=-1).astype(np.uint8)


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def encode_array(pixels: np.ndarray, kind: str, **options: Any) -> bytes:
    return encode(Image.fromarray(pixels), kind, **options)


def decode(data: bytes, **options: Any) -> np.ndarray:
    return decode_image(data, max_pixels=MAX_PIXELS, **options)


def pillow_rgb(data: bytes) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(data)).convert("RGB"))


def over_white(rgba: np.ndarray) -> np.ndarray:
    """The slow reference: each pixel mixed with white by its alpha (H, W, 4) -> (H, W, 3), float."""
    colour, alpha = rgba[..., :3].astype(float), rgba[..., 3:].astype(float) / 255
    return colour * alpha + 255 * (1 - alpha)


def cause_of(data: bytes, **options: Any) -> str:
    with pytest.raises(DecodeError) as caught:
        decode_image(data, **({"max_pixels": MAX_PIXELS} | options))
    return caught.value.cause


def png(width: int, height: int, *, bits: int = 8, colour: int = 2, rows: bytes = b"", extra: bytes = b"") -> bytes:
    """A PNG by hand: any header, any (compressed) rows, chunks between the two."""
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    transparency = chunk(b"tRNS", extra) if extra else b""
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + transparency + chunk(b"IDAT", zlib.compress(rows))
            + chunk(b"IEND", b""))


@pytest.mark.parametrize("options", [{"quality": 90}, {"quality": 90, "progressive": True},
                                     {"quality": 95, "subsampling": 0}], ids=["baseline", "progressive", "4:4:4"])
def test_a_jpeg_equals_pillows_within_a_few_grey_levels(options: dict[str, Any]) -> None:
    data = encode_array(smooth_picture(), "JPEG", **options)
    decoded = decode(data)
    assert decoded.shape == (60, 90, 3)
    assert decoded.dtype == np.uint8
    assert decoded.flags.c_contiguous
    assert decoded.flags.writeable
    assert np.abs(decoded.astype(int) - pillow_rgb(data)).max() <= JPEG_TOLERANCE


def test_a_grey_jpeg_has_three_equal_channels() -> None:
    data = encode_array(smooth_picture()[..., 0], "JPEG", quality=90)
    decoded = decode(data)
    assert (decoded == decoded[..., :1]).all()
    assert np.abs(decoded.astype(int) - pillow_rgb(data)).max() <= JPEG_TOLERANCE


def test_a_cmyk_jpeg_equals_pillows_exactly() -> None:
    data = encode(Image.fromarray(smooth_picture()).convert("CMYK"), "JPEG", quality=95)
    decoded = decode(data)
    assert (decoded == pillow_rgb(data)).all()
    assert np.abs(decoded.astype(int) - smooth_picture()).mean() < 4  # not inverted


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_the_exif_orientation_is_not_applied(kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    plain = decode(encode_array(smooth_picture(), kind))
    turned = decode(encode_array(smooth_picture(), kind, exif=exif))
    assert turned.shape == (60, 90, 3)
    assert (plain == turned).all()


def test_bytes_after_a_jpeg_do_no_harm() -> None:
    data = encode_array(smooth_picture(), "JPEG", quality=90)
    assert (decode(data + b"\0" * 100) == decode(data)).all()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_a_png_of_every_mode_equals_the_reference(mode: str) -> None:
    image = Image.fromarray(smooth_picture(channels=4), "RGBA").convert(mode)
    decoded = decode(encode(image, "PNG"))
    if image.has_transparency_data:
        assert np.abs(decoded - over_white(np.array(image.convert("RGBA")))).max() <= 0.51  # half a level of rounding
    else:
        assert (decoded == np.array(image.convert("RGB"))).all()


@pytest.mark.parametrize(("kind", "options"), [("WEBP", {"lossless": True}), ("WEBP", {"quality": 80}), ("BMP", {}),
                                               ("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"}), ("PPM", {}),
                                               ("GIF", {})])
def test_other_formats_equal_pillow_exactly(kind: str, options: dict[str, Any]) -> None:
    data = encode_array(smooth_picture(), kind, **options)
    assert (decode(data) == pillow_rgb(data)).all()


def test_a_webp_with_alpha_goes_over_white() -> None:
    pixels = smooth_picture(channels=4)
    assert np.abs(decode(encode_array(pixels, "WEBP", lossless=True, exact=True)) - over_white(pixels)).max() <= 0.51


def test_sixteen_bits_are_scaled_to_eight() -> None:
    values = np.linspace(0, 65535, 60 * 90).astype(np.uint16).reshape(60, 90)
    expected = np.repeat((values // 256).astype(np.uint8)[..., None], 3, axis=2)
    for kind in ("PNG", "TIFF"):
        assert (decode(encode_array(values, kind)) == expected).all()
    assert expected.min() == 0
    assert expected.max() == 255
    colour = np.stack([values, values[::-1], 65535 - values], axis=-1)  # (H, W, 3)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in colour)
    assert (decode(png(90, 60, bits=16, rows=rows)) == colour // 256).all()
    portable = b"P5 90 60 65535\n" + values.astype(">u2").tobytes()
    assert np.abs(decode(portable).astype(int) - expected).max() <= 1


def test_floating_point_pixels_are_refused_since_their_range_is_unknown() -> None:
    assert cause_of(encode_array(np.ones((4, 4), dtype=np.float32), "TIFF")) == "unsupported image"
    assert cause_of(encode_array(np.full((4, 4), 70_000, dtype=np.int32), "TIFF")) == "unsupported image"


def test_a_transparent_palette_colour_becomes_white() -> None:
    image = Image.new("P", (4, 2))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putdata([0, 1, 0, 1, 1, 1, 0, 0])
    for kind in ("PNG", "GIF"):
        decoded = decode(encode(image, kind, transparency=1))
        assert decoded[0].tolist() == [[10, 20, 30], [255, 255, 255]] * 2
    partly = decode(encode(image, "PNG", transparency=bytes([255, 51])))  # alpha 51 of 255 = 0.2
    assert partly[0, 1].tolist() == [244, 224, 214]


@pytest.mark.parametrize(("bits", "colour", "pixels", "extra"), [
    (8, 0, bytes([7, 9]), b"\0\7"), (16, 0, b"\7\1\7\2", b"\7\1"), (8, 2, bytes([7, 7, 7, 9, 9, 9]), b"\0\7\0\7\0\7")],
    ids=["grey", "16-bit grey", "colour"])
def test_a_transparent_colour_without_palette_becomes_white(bits: int, colour: int, pixels: bytes,
                                                                      extra: bytes) -> None:
    decoded = decode(png(2, 1, bits=bits, colour=colour, rows=b"\0" + pixels, extra=extra))
    assert decoded[0, 0].tolist() == [255] * 3
    assert decoded[0, 1].tolist() in ([9] * 3, [7] * 3)


@pytest.mark.parametrize(("kind", "options"), [("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {})])
def test_an_animation_gives_its_first_frame(kind: str, options: dict[str, Any]) -> None:
    frames = [Image.new("RGB", (20, 10), colour) for colour in ("red", "blue", "lime")]
    data = encode(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert getattr(Image.open(io.BytesIO(data)), "n_frames", 1) == 3
    assert (decode(data) == [255, 0, 0]).all()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
@pytest.mark.parametrize("kept", [0.5, 0.9])
def test_a_truncated_picture_is_refused(kind: str, kept: float) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = encode_array(noise, kind)
    cause = cause_of(data[: int(kept * len(data))])
    assert cause == "truncated image"


def test_zero_bytes_are_an_empty_image() -> None:
    assert cause_of(b"") == "empty image"


def test_a_picture_of_zero_size_is_refused() -> None:
    assert cause_of(png(0, 5)) == "zero-size image"
    jpeg = bytearray(encode_array(smooth_picture(), "JPEG"))
    frame = jpeg.index(b"\xff\xc0")
    jpeg[frame + 5 : frame + 9] = bytes(4)  # height and width
    assert cause_of(bytes(jpeg)) == "zero-size image"


def test_something_else_is_not_an_image() -> None:
    for data in (b"<html>404</html>", b"\x80\x04evil pickle", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"):
        assert cause_of(data) == "not an image"


def test_damaged_pixels_are_a_corrupt_image() -> None:
    data = bytearray(encode_array(smooth_picture(), "PNG"))
    data[len(data) // 2] ^= 0xFF
    assert cause_of(bytes(data)) == "corrupt image"
    assert cause_of(b"\xff\xd8\xff" + bytes(50)) in ("corrupt image", "not an image")


def test_random_damage_never_raises_anything_else() -> None:
    rng = np.random.default_rng(0)
    for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"):
        whole = encode_array(smooth_picture(), kind)
        for _ in range(30):
            data = bytearray(whole)
            for place in rng.integers(0, len(data), 5):
                data[place] = rng.integers(0, 256)
            with contextlib.suppress(DecodeError):
                assert decode(bytes(data)).ndim == 3


def webp_header(kind: bytes, body: bytes) -> bytes:
    chunk = kind + struct.pack("<I", len(body)) + body
    return b"RIFF" + struct.pack("<I", 4 + len(chunk)) + b"WEBP" + chunk


@pytest.mark.parametrize("data", [
    png(60_000, 60_000), png(9000, 9000, bits=1, colour=0),
    webp_header(b"VP8X", bytes(4) + b"\xff\x3f\0\xff\x3f\0"),
    webp_header(b"VP8L", b"\x2f" + (16382 | 16382 << 14).to_bytes(4, "little") + bytes(20)),
    webp_header(b"VP8 ", b"\x10\0\0\x9d\x01\x2a" + struct.pack("<HH", 16383, 16383) + bytes(20)),
    b"GIF89a" + struct.pack("<HH", 60_000, 60_000) + bytes(20),
    b"P6 50000 50000 255\n" + bytes(100)],
    ids=["png", "png 1 bit", "webp extended", "webp lossless", "webp lossy", "gif", "ppm"])
def test_a_decompression_bomb_is_refused_before_its_pixels_are_allocated(data: bytes) -> None:
    tracemalloc.start()
    try:
        assert cause_of(data) == "huge image"
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


def test_a_jpeg_bomb_is_refused_by_its_header() -> None:
    jpeg = bytearray(encode_array(smooth_picture(), "JPEG"))
    frame = jpeg.index(b"\xff\xc0")
    for side in (40_000, 65_535):
        jpeg[frame + 5 : frame + 9] = struct.pack(">HH", side, side)
        assert cause_of(bytes(jpeg)) == "huge image"


def test_the_bound_on_pixels_is_the_last_allowed_number() -> None:
    for kind in ("JPEG", "PNG"):
        data = encode_array(smooth_picture(), kind)
        assert decode_image(data, max_pixels=60 * 90).shape == (60, 90, 3)
        assert cause_of(data, max_pixels=60 * 90 - 1) == "huge image"
        with pytest.raises(DecodeError, match=r"huge image: 90x60 is more than data\.max_pixels = 100"):
            decode_image(data, max_pixels=100)


def test_fast_decoding_halves_a_jpeg_while_its_shorter_side_suffices() -> None:
    data = encode_array(smooth_picture(256, 400), "JPEG", quality=95)
    sides = {size: decode(data, fast_size=size).shape[:2] for size in (32, 33, 64, 100, 128, 129, 500)}
    assert sides == {32: (32, 50), 33: (64, 100), 64: (64, 100), 100: (128, 200), 128: (128, 200), 129: (256, 400),
                     500: (256, 400)}
    half = decode(data, fast_size=128).astype(float)
    means = decode(data).reshape(128, 2, 200, 2, 3).mean((1, 3))
    assert np.abs(half - means).mean() < 2  # a smooth picture: nearly the mean of each 2x2
    assert decode(encode_array(smooth_picture(), "PNG"), fast_size=8).shape == (60, 90, 3)


@pytest.mark.parametrize("size", [16, 48, 224])
def test_crop_and_resize_is_torchvisions_bit_for_bit(size: int) -> None:
    image = np.random.default_rng(0).integers(0, 256, (100, 130, 3), dtype=np.uint8)
    ours = crop_and_resize(image, (3, 5, 90, 70), size)
    theirs = transforms.resized_crop(torch.from_numpy(image).permute(2, 0, 1), 3, 5, 90, 70, [size, size],
                                     interpolation=InterpolationMode.BICUBIC, antialias=True)
    assert ours.shape == (3, size, size)
    assert torch.equal(ours, theirs)


def test_a_crop_is_resized_to_channels_last_without_a_planar_detour() -> None:
    ours = crop_and_resize(smooth_picture(), (3, 5, 40, 70), 32)
    assert ours.permute(1, 2, 0).is_contiguous()


def test_a_crop_of_the_right_size_keeps_its_pixels() -> None:
    image = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    assert (crop_and_resize(image, (4, 6, 16, 16), 16).permute(1, 2, 0).numpy() == image[4:20, 6:22]).all()
