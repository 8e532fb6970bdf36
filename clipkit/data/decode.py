"""Picture bytes to pixels: JPEG through simplejpeg, everything else through Pillow.

Nothing here is random (see augment.py) and nothing reads archives (see shards.py).
"""

import io
import struct
import warnings

import numpy as np
import simplejpeg
import torch
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile
from torch import Tensor

# Formats that Pillow may try. A closed list: some of its other readers start programs (EPS) or read other files.
PILLOW_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
JPEG_MAGIC = b"\xff\xd8\xff"
MAX_SCANS = 32  # of a JPEG; each takes as long as decoding a plain one. Encoders write about 10
TIFF_TILE_SIDES = (322, 323)  # tags TileWidth and TileLength
DCT_SCALES = (8, 4, 2)  # libjpeg-turbo decodes at 1/8, 1/4 and 1/2 with SIMD; its other fractions are slower than 1/1


class DecodeError(ValueError):
    """A picture that cannot be used.

    Attributes:
      cause: a short name to count by: "corrupt image", "empty image", "huge image", "not an image",
        "truncated image", "unsupported image" or "zero-size image".
      detail: what was found, for a message.
    """

    def __init__(self, cause: str, detail: str = "") -> None:
        super().__init__(cause, detail)
        self.cause = cause
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.cause}: {self.detail}" if self.detail else self.cause


def decode_image(data: bytes, *, max_pixels: int, fast_size: int | None = None) -> np.ndarray:
    """Decode a picture to 8-bit RGB.

    16 bits are scaled to 8 (the high byte), alpha and transparent colours go over white, the EXIF orientation is not
    applied, and an animation gives its first frame.

    Args:
      data: the bytes of a JPEG, PNG, WebP, GIF, BMP, TIFF or PPM file; the name of the file plays no part.
      max_pixels: bound on width * height, checked from the header before any pixel is allocated.
      fast_size: let a JPEG be decoded at 1/2, 1/4 or 1/8 of its size as long as both sides keep at least this many
        pixels. Inexact (about 40 dB when the side is used at fast_size, 59 dB at half of it). None = exact.

    Returns:
      (H, W, 3) uint8, C-contiguous, writable.

    Raises:
      DecodeError: the picture is empty, damaged, cut off, too large, of zero size, or none at all.
    """
    if not data:
        raise DecodeError("empty image", "0 bytes")
    if data[:3] == JPEG_MAGIC:
        _check_scans(data)
        pixels = _decode_jpeg(data, max_pixels, fast_size)
        if pixels is not None:
            return pixels
    size = _declared_size(data)
    if size is not None:
        _check_size(*size, max_pixels)
    try:
        # Pillow warns of odd metadata and of large pictures; the bound that counts here is max_pixels.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=PILLOW_FORMATS) as image:
                _check_size(*image.size, max_pixels)
                if isinstance(image, TiffImageFile):  # a whole tile is decoded, however little of it is picture
                    width, height = (int(image.tag_v2.get(tag, 1)) for tag in TIFF_TILE_SIDES)
                    _check_size(width, height, max_pixels)
                image.load()
                return _to_rgb(image)
    except DecodeError:
        raise
    except Image.DecompressionBombError as error:
        raise DecodeError("huge image", str(error)) from error
    except UnidentifiedImageError as error:
        cause = "truncated image" if _webp_is_cut(data) else "not an image"
        raise DecodeError(cause, f"{len(data)} bytes that begin with {data[:12]!r}") from error
    except Exception as error:  # a damaged file can make a reader raise anything
        raise DecodeError(_cause(data, error), f"{type(error).__name__}: {error}") from error


def crop_and_resize(image: np.ndarray, box: tuple[int, int, int, int], size: int) -> Tensor:
    """Cut a box out of a picture and resize it to a square: antialiased bicubic in uint8.

    Equal to torchvision's `transforms.v2.functional.resized_crop` on a uint8 tensor, which makes the same call.

    Args:
      image: (H, W, 3) uint8.
      box: (top, left, height, width) in pixels, inside the picture.
      size: side of the result, pixels.

    Returns:
      (3, size, size) uint8 with channels last in memory; where the box has this size already, a view of `image`.
    """
    top, left, height, width = box
    crop = torch.from_numpy(image[top : top + height, left : left + width])[None]  # (1, h, w, 3)
    pixels = crop.permute(0, 3, 1, 2)  # not permuted first: then the stride of the one row would hide the layout from torch
    if (height, width) != (size, size):
        pixels = F.interpolate(pixels, size=(size, size), mode="bicubic", antialias=True)
    return pixels[0]


def _decode_jpeg(data: bytes, max_pixels: int, fast_size: int | None) -> np.ndarray | None:
    """Pixels of a JPEG (H, W, 3), or None where simplejpeg refuses it and Pillow shall judge (CMYK, any warning)."""
    try:
        header_height, header_width, colour_space, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    height, width = int(header_height), int(header_width)
    _check_size(width, height, max_pixels)
    if colour_space in ("CMYK", "YCCK"):
        return None
    minimum = (0, 0)
    if fast_size is not None:
        scale = next((s for s in DCT_SCALES if -(-min(height, width) // s) >= fast_size), 1)
        minimum = (-(-height // scale), -(-width // scale))
    try:
        return simplejpeg.decode_jpeg(data, "RGB", min_height=minimum[0], min_width=minimum[1])
    except ValueError:
        return None


def _to_rgb(image: Image.Image) -> np.ndarray:
    """Pixels (H, W, 3) of a loaded picture of any mode."""
    if image.mode == "F":
        raise DecodeError("unsupported image", "floating-point pixels have no known range")
    if image.mode.startswith("I"):
        values = np.array(image)  # (H, W) uint16 or int32, 16 bits in 0 .. 65535
        if values.min() < 0 or values.max() > 65535:
            raise DecodeError("unsupported image", "integer pixels outside 0 .. 65535")
        grey = (values >> 8).astype(np.uint8)  # the high byte, as Pillow does for 16-bit colour
        transparent = image.info.get("transparency")
        if isinstance(transparent, int):
            grey[values == transparent] = 255
        return np.repeat(grey[:, :, None], 3, axis=2)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGB", image.size, "white")
        white.paste(image, mask=image.getchannel("A"))
        return np.array(white)
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise DecodeError("huge image", f"{width}x{height} is more than data.max_pixels = {max_pixels}")
    if width < 1 or height < 1:
        raise DecodeError("zero-size image", f"{width}x{height}")


def _declared_size(data: bytes) -> tuple[int, int] | None:
    """(width, height) as a JPEG, PNG, GIF or WebP header declares it, else None.

    Pillow reports a zero size as "not an image", and its WebP reader allocates the canvas before it tells the size.
    """
    if data[:3] == JPEG_MAGIC:
        return _declared_jpeg_size(data)
    if data[:8] == b"\x89PNG\r\n\x1a\n" and len(data) >= 24:
        return struct.unpack(">II", data[16:24])
    if data[:4] == b"GIF8" and len(data) >= 10:
        return struct.unpack("<HH", data[6:10])
    if data[:4] != b"RIFF" or data[8:12] != b"WEBP" or len(data) < 30:
        return None
    kind = data[12:16]
    if kind == b"VP8X":  # canvas: two 24-bit numbers, minus one
        return int.from_bytes(data[24:27], "little") + 1, int.from_bytes(data[27:30], "little") + 1
    if kind == b"VP8L":  # lossless: 14 and 14 bits after a signature byte, minus one
        bits = int.from_bytes(data[21:25], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind == b"VP8 ":  # lossy: 14 bits each in 16, after frame tag and start code
        width, height = struct.unpack("<HH", data[26:30])
        return width & 0x3FFF, height & 0x3FFF
    return None


def _declared_jpeg_size(data: bytes) -> tuple[int, int] | None:
    at = _jpeg_frame(data)
    if at is None:
        return None
    height, width = struct.unpack(">HH", data[at + 5 : at + 9])
    return width, height


def _jpeg_frame(data: bytes) -> int | None:
    """Where the frame header begins, of any coding."""
    at = 2  # after the start marker; each segment is 0xFF, marker, 16-bit length, body
    while at + 9 < len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return at
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return None


def _check_scans(data: bytes) -> None:
    """Refuse a JPEG whose scans would be decoded for minutes; a baseline one, by far the most, is not searched for them."""
    at = frame = _jpeg_frame(data)
    if at is not None and frame is not None and data[frame + 1] in (0xC0, 0xC1):
        while at + 4 < len(data) and data[at] == 0xFF and data[at + 1] != 0xDA:
            at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if at + 4 < len(data) and data[at + 4] == data[frame + 9]:  # the first scan has all components: it is the only one
            return
    num_scans = data.count(b"\xff\xda")
    if num_scans > MAX_SCANS:
        raise DecodeError("unsupported image", f"a JPEG of {num_scans} scans; more than {MAX_SCANS} are not decoded")


def _cause(data: bytes, error: Exception) -> str:
    cut = "truncated" in str(error).lower() or isinstance(error, EOFError) or _webp_is_cut(data)
    return "truncated image" if cut else "corrupt image"


def _webp_is_cut(data: bytes) -> bool:
    return data[:4] == b"RIFF" and int.from_bytes(data[4:8], "little") + 8 > len(data)
