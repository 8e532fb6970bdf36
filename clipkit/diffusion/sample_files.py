"""Samples on disk: 00000.png, 00001.png, ..., each with what it was made from and how inside; and a sheet of them."""

import io
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from PIL import Image, PngImagePlugin

from clipkit import __version__
from clipkit.diffusion.sample_conditions import Conditions
from clipkit.diffusion.sheets import beside
from clipkit.evaluation.contact_sheet import draw_contact_sheet
from clipkit.evaluation.predictions import Prediction
from clipkit.training.atomic_files import one_line_os_error, write_bytes_atomically

SHEET = "sheet.png"
SHEET_PICTURES = 64  # on the sheet, at most
MARK = "model_sha256"  # every sample says of which model it is

Facts = Mapping[str, str]  # what a sample's file says of it: name -> text


class Found(NamedTuple):
    """Samples that are in a folder already."""

    whole: frozenset[int]  # their numbers
    num_damaged: int  # files that cannot be read and are written again


def sample_path(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}.png"


def write_sample(path: Path, picture: Image.Image, facts: Facts) -> None:
    """Write a PNG with a text chunk for each fact, whole or not at all.

    Raises:
      OSError: it cannot be written; one line.
    """
    chunks = PngImagePlugin.PngInfo()
    for name, text in {**facts, "Software": f"clipkit {__version__}"}.items():
        chunks.add_text(name, text)
    file = io.BytesIO()
    picture.save(file, "png", pnginfo=chunks)
    write_bytes_atomically(path, file.getvalue())


def read_sample(path: Path) -> tuple[Image.Image, dict[str, str]] | None:
    """A picture with its text chunks; None for a file that is damaged."""
    try:
        with Image.open(path) as file:
            file.load()
            return file.convert("RGB"), dict(getattr(file, "text", {}))
    except (OSError, SyntaxError, ValueError):  # Pillow raises any of them for a damaged PNG
        return None


def find_samples(folder: Path, facts_of: Callable[[int], Facts], *, num_samples: int) -> Found:
    """Find the samples that need not be made again.

    Args:
      folder: need not exist.
      facts_of: number of a sample -> what its file would say.
      num_samples: those from here on are not looked at.

    Raises:
      ValueError: a file with a sample's name is another picture, or was made with other settings.
    """
    whole, num_damaged = set(), 0
    for path in sorted(folder.glob("*.png")):
        if not re.fullmatch(r"\d{5,}", path.stem) or int(path.stem) >= num_samples:
            continue
        found = read_sample(path)
        if found is None:
            num_damaged += 1
            continue
        _refuse_others(path, found[1], facts_of(int(path.stem)))
        whole.add(int(path.stem))
    return Found(frozenset(whole), num_damaged)


def check_place(folder: Path, *, num_samples: int, image_size: int) -> None:
    """Make the folder; raise OSError in one line if it cannot be written, or has no room for so many pictures."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_bytes_atomically(folder / ".room", b"")
        (folder / ".room").unlink()
    except OSError as error:
        raise one_line_os_error(error, folder) from error
    needed, free = num_samples * 3 * image_size**2, shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(f"n_samples is {num_samples:,}: so many pictures of {image_size} px may need {needed / 1e9:,.1f} GB, and "
                      f"{folder} has {free / 1e9:,.1f} GB free; make fewer, or give out=<folder on a larger disk>")


def draw_sheet(folder: Path, conditions: Conditions, *, num_samples: int, title: str) -> None:
    """Draw the first samples with what each was made from: the prompt below, or the given picture on the left."""
    rows = []
    for number in range(min(num_samples, SHEET_PICTURES)):
        found = read_sample(sample_path(folder, number))
        assert found is not None
        given = conditions.picture(number)
        picture = beside(given, found[0]) if given else found[0]
        rows.append(Prediction(picture, "", ((conditions.sources.title_of(number), False),)))
    shown = f", the first {SHEET_PICTURES}" if num_samples > SHEET_PICTURES else ""
    draw_contact_sheet(rows, folder / SHEET, title=f"{title}: {num_samples:,} pictures{shown}")


def _refuse_others(path: Path, there: Facts, here: Facts) -> None:
    if MARK not in there:
        raise ValueError(f"{path} is no picture of clipkit diffusion sample, and would be overwritten; give out=<another "
                         "folder>")
    names = [name for name in {**here, **there} if name != "Software" and there.get(name) != here.get(name)]
    if names:
        differing = [f"{name} is {there.get(name, 'nothing')!r} there and {here.get(name, 'nothing')!r} here" for name in names]
        raise ValueError(f"{path} was made with other settings: {'; '.join(differing)}; give out=<another folder>, or the "
                         "settings that it was made with")
