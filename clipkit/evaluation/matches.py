"""One's own pictures, without labels: the classes that each is nearest to, or the pictures that a text finds first."""

import csv
import io
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from clipkit.evaluation.feature_rows import exact_fp32
from clipkit.evaluation.predictions import Prediction
from clipkit.training.atomic_files import write_text_atomically

if TYPE_CHECKING:
    from PIL.Image import Image

NUM_GUESSES = 3


class NamedPicture(NamedTuple):
    """A picture and the classes it is nearest to."""

    file: str
    guesses: tuple[tuple[str, float], ...]  # (class, probability), the best first


class Match(NamedTuple):
    """A picture that a query finds."""

    file: str
    score: float  # cosine of picture and query, -1 to 1: no probability


@exact_fp32()
def classify_pictures(files: Sequence[str], image_features: Tensor, class_weights: Tensor, *, classes: Sequence[str],
                      logit_scale: float, num_guesses: int = NUM_GUESSES) -> list[NamedPicture]:
    """Name pictures.

    Args:
      files: N names, as they are to be shown.
      image_features: (N, D), unit norm.
      class_weights: (C, D), unit norm.
      classes: C names, at least two.
      logit_scale: > 0, the model's 1/temperature.
      num_guesses: names for each picture, at most; fewer where there are fewer classes.

    Returns:
      N, in the order given. Probabilities are over all the classes: the model has no other answer.

    Raises:
      ValueError: the numbers do not fit each other, there is one class only, or a feature is not finite.
    """
    if not len(files) == len(image_features) or not len(classes) == len(class_weights):
        raise ValueError(f"{len(files)} files with {len(image_features)} features, {len(classes)} classes with "
                         f"{len(class_weights)} weights; give one feature a file and one weight a class")
    if len(classes) < 2:
        raise ValueError(f"classes is {list(classes)}; a probability needs at least two to choose from: add another, such as "
                         "'something else', or use query=... to find pictures of one thing")
    _check_finite(image_features, class_weights)
    probabilities = (logit_scale * image_features.float() @ class_weights.float().T).softmax(dim=-1)  # (N, C)
    ordered = probabilities.sort(dim=-1, descending=True, stable=True)  # of equal ones the class listed first
    rows = zip(files, ordered.indices[:, :num_guesses].tolist(), ordered.values[:, :num_guesses].tolist(), strict=True)
    return [NamedPicture(file, tuple((classes[int(number)], value) for number, value in zip(numbers, values, strict=True)))
            for file, numbers, values in rows]


@exact_fp32()
def top_matches(image_features: Tensor, query_feature: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Find the pictures nearest to a text.

    Args:
      image_features: (N, D), unit norm.
      query_feature: (D,), unit norm.
      k: pictures, at most N are returned.

    Returns:
      (indices, scores), each (min(k, N),): the best first, of equal scores the picture listed first.

    Raises:
      ValueError: k is below 1, or a feature is not finite.
    """
    if k < 1:
        raise ValueError(f"k is {k}; ask for at least 1 match")
    _check_finite(image_features, query_feature)
    scores = image_features.float() @ query_feature.float()  # (N,)
    ordered = scores.sort(descending=True, stable=True)
    return ordered.indices[:k], ordered.values[:k]


def write_predictions(path: Path, pictures: Sequence[NamedPicture]) -> None:
    """Write `file, guess_1, probability_1, guess_2, ...` as UTF-8 CSV, a row a picture.

    Raises:
      ValueError: there are no pictures.
      OSError: the file cannot be written.
    """
    if not pictures:
        raise ValueError("there are no pictures to write; give at least one")
    num_guesses = max(len(picture.guesses) for picture in pictures)
    header = ["file", *(f"{field}_{number + 1}" for number in range(num_guesses) for field in ("guess", "probability"))]
    rows = [[picture.file, *(value for guess, probability in picture.guesses for value in (guess, f"{probability:.6f}"))]
            for picture in pictures]
    _write_csv(path, [header, *rows])


def write_matches(path: Path, query: str, matches: Sequence[Match]) -> None:
    """Write `query, place, file, score` as UTF-8 CSV, the best match first; place 1 = top.

    Raises:
      ValueError: there are no matches.
      OSError: the file cannot be written.
    """
    if not matches:
        raise ValueError("there are no matches to write; give at least one picture")
    rows = [[query, place + 1, match.file, f"{match.score:.6f}"] for place, match in enumerate(matches)]
    _write_csv(path, [["query", "place", "file", "score"], *rows])


def predictions_table(pictures: Sequence[NamedPicture], *, limit: int = 20) -> str:
    """Write the first pictures and their guesses as text for a terminal; a last line counts those left out."""
    cells = [[picture.file, *(f"{probability:6.1%} {guess}" for guess, probability in picture.guesses)]
             for picture in pictures[:limit]]
    return _lines(cells, len(pictures) - limit)


def matches_table(matches: Sequence[Match], *, limit: int = 20) -> str:
    """Write the first matches as text for a terminal: place, score, file; a last line counts those left out."""
    cells = [[f"{place + 1:3d}", f"{match.score:6.3f}", match.file] for place, match in enumerate(matches[:limit])]
    return _lines(cells, len(matches) - limit)


def named_sheet(images: "Sequence[Image]", pictures: Sequence[NamedPicture]) -> list[Prediction]:
    """What `draw_contact_sheet` draws of named pictures: probabilities before the names, no right name."""
    return [Prediction(image, "", tuple((f"{probability:.0%}  {guess}", False) for guess, probability in picture.guesses))
            for image, picture in zip(images, pictures, strict=True)]


def matches_sheet(images: "Sequence[Image]", matches: Sequence[Match]) -> list[Prediction]:
    """What `draw_contact_sheet` draws of a query's matches: the score and the file's name below each picture."""
    return [Prediction(image, "", ((f"{match.score:.3f}", False), (Path(match.file).name, False)))
            for image, match in zip(images, matches, strict=True)]


def _check_finite(*features: Tensor) -> None:
    if not all(torch.isfinite(feature).all() for feature in features):
        raise ValueError("features hold NaN or infinity; the model cannot be used: look at its weights and inputs")


def _write_csv(path: Path, rows: Sequence[Sequence[object]]) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    # A file name that is no valid text keeps its readable part.
    write_text_atomically(path, text.getvalue().encode("utf-8", "replace").decode("utf-8"))


def _lines(cells: Sequence[Sequence[str]], num_left_out: int) -> str:
    """Align cells in columns by their width in a terminal."""
    num_columns = max((len(row) for row in cells), default=0)
    widths = [max(_width(row[column]) for row in cells if column < len(row)) for column in range(num_columns)]
    lines = ["  ".join(cell + " " * (width - _width(cell)) for cell, width in zip(row, widths, strict=False)).rstrip()
             for row in cells]
    return "\n".join([*lines, *[f"... and {num_left_out:,} more"] * (num_left_out > 0)])


def _width(text: str) -> int:
    """Cells that a text takes in a terminal: two for an East Asian letter, none for an accent of its own."""
    return sum(2 if unicodedata.east_asian_width(letter) in "WF" else 0 if unicodedata.combining(letter) else 1
               for letter in text)
