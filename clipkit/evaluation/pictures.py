"""One's own pictures before a model: each gets a name, or a text finds some. Files and a contact sheet; matches.py counts."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from clipkit.evaluation.contact_sheet import draw_contact_sheet
from clipkit.evaluation.encode import EncodedTask
from clipkit.evaluation.image_sets import Share
from clipkit.evaluation.matches import (
    Match,
    classify_pictures,
    matches_sheet,
    matches_table,
    named_sheet,
    predictions_table,
    top_matches,
    write_matches,
    write_predictions,
)
from clipkit.evaluation.sample_keys import printable
from clipkit.evaluation.tasks import Task, TaskSample

if TYPE_CHECKING:
    from PIL.Image import Image

SHEET_PICTURES = 40  # on predictions.png


class Looked(NamedTuple):
    """What was found in pictures."""

    table: str  # for a terminal
    written: list[Path]


def name_pictures(task: Task, encoded: EncodedTask, weight: Tensor, *, classes: Sequence[str], logit_scale: float, top: int,
                  folder: Path) -> Looked:
    """Write the classes that each picture is nearest to, as predictions.csv and predictions.png.

    Args:
      task: has the pictures.
      encoded: their features.
      weight: (C, D) unit norm, from `class_weights`.
      classes: C names, at least two.
      logit_scale: > 0, the model's 1/temperature.
      top: names for each picture, at most.
      folder: made if missing.

    Raises:
      ValueError: there is one class only, or a feature is not finite.
    """
    named = classify_pictures(encoded.keys, encoded.image_features, weight, classes=classes, logit_scale=logit_scale,
                              num_guesses=top)
    written = [folder / "predictions.csv", folder / "predictions.png"]
    write_predictions(written[0], named)
    shown = named[:SHEET_PICTURES]
    pictures = pictures_of(task, [picture.file for picture in shown])
    draw_contact_sheet(named_sheet([pictures[picture.file] for picture in shown], shown), written[1],
                       title=f"{task.name}: nearest classes")
    return Looked(predictions_table(named), written)


def find_pictures(task: Task, encoded: EncodedTask, query: str, query_feature: Tensor, *, top: int, folder: Path) -> Looked:
    """Write the pictures nearest to a text, as matches.csv and matches.png.

    Args:
      task, encoded, folder: as in `name_pictures`.
      query: the text.
      query_feature: (D,) unit norm.
      top: pictures, at most.

    Raises:
      ValueError: a feature is not finite.
    """
    places, scores = top_matches(encoded.image_features, query_feature, top)
    found = [Match(encoded.keys[place], score) for place, score in zip(places.tolist(), scores.tolist(), strict=True)]
    written = [folder / "matches.csv", folder / "matches.png"]
    write_matches(written[0], query, found)
    pictures = pictures_of(task, [match.file for match in found])
    draw_contact_sheet(matches_sheet([pictures[match.file] for match in found], found), written[1],
                       title=f"{task.name}: nearest to {query!r}")
    return Looked(matches_table(found), written)


def pictures_of(task: Task, keys: Sequence[str]) -> "dict[str, Image]":
    """Read some of a task's pictures again, by key; no others are decoded."""
    found = {}
    for sample in task.images.read(Share(keys=frozenset(keys))):
        if isinstance(sample, TaskSample):
            found[printable(sample.key)] = sample.image
            if len(found) == len(set(keys)):
                break
    return found
