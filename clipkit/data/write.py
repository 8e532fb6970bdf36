"""Write WebDataset shards: each is whole or not there, and the same samples give the same bytes."""

import contextlib
import io
import json
import os
import shutil
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

import numpy as np
from PIL import Image

from clipkit.data.decode import decode_image

MAGIC = ((b"\xff\xd8\xff", "jpg"), (b"\x89PNG", "png"), (b"RIFF", "webp"), (b"GIF8", "gif"), (b"BM", "bmp"),
         (b"II", "tif"), (b"MM", "tif"), (b"P", "ppm"))
JPEG_QUALITY = 95
SIZES_FILE = "sizes.json"  # samples a shard, as img2dataset-style readers and count_samples take it


class ShardWriter:
    """Cut a stream of samples into tars; use it in a `with` statement.

    The shards are written in a hidden folder and moved to their place together when the `with` block ends well, where
    they replace those of an earlier set; where it ends with an error, nothing of them is left.

    Attributes:
      sizes: samples of each finished shard, by file name.
      num_samples, num_bytes: what was written so far.
    """

    def __init__(self, folder: Path, *, samples_per_shard: int, name: str) -> None:
        self.folder = folder
        self.samples_per_shard = samples_per_shard
        self.name = name  # with the shard's number as a format field, "shard-{:06d}.tar"
        self.sizes: dict[str, int] = {}
        self.num_samples = 0
        self.num_bytes = 0
        self._unfinished = folder / ".unfinished"
        self._tar: tarfile.TarFile | None = None
        self._samples_in_shard = 0

    def write(self, members: Mapping[str, bytes]) -> None:
        """Add a sample, with its running number as its key.

        Args:
          members: {suffix: content}, such as {"jpg": ..., "txt": ...}.
        """
        if self._tar is None:
            path = self._unfinished / self.name.format(len(self.sizes))
            self._tar = tarfile.open(path, "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115 (lives over many calls)
        for suffix, content in members.items():
            member = tarfile.TarInfo(f"{self.num_samples:09d}.{suffix}")  # time 0, no owner: the same bytes each time
            member.size = len(content)
            self._tar.addfile(member, io.BytesIO(content))
            self.num_bytes += len(content)
        self.num_samples += 1
        self._samples_in_shard += 1
        if self._samples_in_shard == self.samples_per_shard:
            self._finish_shard()

    def _finish_shard(self) -> None:
        assert self._tar is not None
        self._tar.close()
        self._tar = None
        name = self.name.format(len(self.sizes))
        with (self._unfinished / name).open("rb") as file:
            os.fsync(file.fileno())
        self.sizes[name] = self._samples_in_shard
        self._samples_in_shard = 0

    def __enter__(self) -> "ShardWriter":
        shutil.rmtree(self._unfinished, ignore_errors=True)  # of a killed process
        self._unfinished.mkdir(parents=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        try:
            if kind is not None:
                return
            if self._tar is not None:
                self._finish_shard()
            for old in existing_shards(self.folder, self.name):
                old.unlink()
            for name in self.sizes:
                os.replace(self._unfinished / name, self.folder / name)
        finally:
            if self._tar is not None and self._tar.fileobj is not None:
                with contextlib.suppress(OSError):  # a full disk; the error on its way tells
                    self._tar.fileobj.close()  # not the tar's own close, which would write an end mark
            shutil.rmtree(self._unfinished, ignore_errors=True)


def existing_shards(folder: Path, name: str) -> list[Path]:
    """The shards in a folder that a ShardWriter of this name pattern would replace."""
    prefix, suffix = name.partition("{")[0], name.rpartition("}")[2]
    return sorted(path for path in folder.glob(f"{prefix}*{suffix}")
                  if path.name.removeprefix(prefix).removesuffix(suffix).isdigit())


def write_sizes(folder: Path, sizes: Mapping[str, int]) -> None:
    """Write sizes.json beside the shards: {file name: number of samples}."""
    write_text(folder / SIZES_FILE, json.dumps(sizes, indent=1) + "\n")


def write_benchmark_files(folder: Path, split: str, classnames: Sequence[str], templates: Sequence[str],
                          num_shards: int) -> None:
    """Write the text files that make a folder of shards a labelled set in the CLIP_benchmark layout.

    Args:
      folder: the set; its shards are <split>/0.tar, <split>/1.tar, ...
      split: "test".
      classnames: one a class, in the order of the .cls numbers.
      templates: prompts with {c} in the class name's place.
      num_shards: of the split.
    """
    write_text(folder / "classnames.txt", "".join(f"{name}\n" for name in classnames))
    write_text(folder / "zeroshot_classification_templates.txt", "".join(f"{text}\n" for text in templates))
    write_text(folder / "dataset_type.txt", "classification\n")
    write_text(folder / split / "nshards.txt", f"{num_shards}\n")


def write_text(path: Path, text: str) -> None:
    """Write a small file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{path.name}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def picture_member(data: bytes, *, image_size: int | None, max_pixels: int,
                   only: Sequence[str] | None = None) -> tuple[str, bytes]:
    """Check that a picture decodes, and name and shrink it for a shard.

    Args:
      data: the picture's file, of any kind that decode_image takes.
      image_size: bound on the shorter side; a larger picture is resized (Pillow, bicubic) and encoded again, as JPEG
        if it was one, else as PNG, over white and without metadata. None = keep the bytes as they are.
      max_pixels: as in decode_image.
      only: suffixes that are allowed; a picture of another kind is encoded again, as PNG. None = all.

    Returns:
      (suffix, bytes).

    Raises:
      DecodeError: the picture cannot be used.
    """
    pixels = decode_image(data, max_pixels=max_pixels)  # (H, W, 3)
    suffix = next(suffix for magic, suffix in MAGIC if data.startswith(magic))
    is_small = image_size is None or min(pixels.shape[:2]) <= image_size
    if is_small and (only is None or suffix in only):
        return suffix, data
    return _encode_again(pixels, min(pixels.shape[:2]) if is_small or image_size is None else image_size, suffix == "jpg")


def _encode_again(pixels: np.ndarray, image_size: int, as_jpeg: bool) -> tuple[str, bytes]:
    height, width = pixels.shape[:2]
    scale = image_size / min(height, width)
    size = round(width * scale), round(height * scale)
    small, buffer = Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC), io.BytesIO()
    if as_jpeg:
        small.save(buffer, "JPEG", quality=JPEG_QUALITY)
        return "jpg", buffer.getvalue()
    small.save(buffer, "PNG")
    return "png", buffer.getvalue()
