"""predictions.png: pictures with the names that a model gives them, right ones green where the right name is known."""

import unicodedata
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from clipkit.evaluation.predictions import Prediction

COLUMNS = 8
PICTURE_SIZE = 128  # pixels a side of the square that a picture is fitted into
CELL_WIDTH = 184
MARGIN = 12
FONT_SIZE = 14
LINE_HEIGHT = 19
PAPER, INK, GREY, GREEN, FRAME = "#ffffff", "#1a1a1a", "#8a8a8a", "#12812f", "#dddddd"


def draw_contact_sheet(predictions: Sequence[Prediction], path: Path, *, title: str = "") -> None:
    """Draw a sheet of predictions.

    Each picture has its guesses below, the best first: the right one green, others grey. Where none is right, the right
    name follows in black. A green frame: the first guess is right. Pictures without a right name (label "") have the
    first line in black and the others grey.

    Args:
      predictions: at least one.
      path: the PNG to write.
      title: a line above the pictures.

    Raises:
      ValueError: there is nothing to draw.
    """
    if not predictions:
        raise ValueError("there are no predictions to draw; give at least one picture")
    num_lines = max(len(prediction.guesses) + bool(prediction.label) for prediction in predictions)
    cell_height = PICTURE_SIZE + num_lines * LINE_HEIGHT + 2 * MARGIN
    columns = min(COLUMNS, len(predictions))
    header = 2 * MARGIN + 22 if title else MARGIN
    num_rows = -(-len(predictions) // columns)
    sheet = Image.new("RGB", (columns * CELL_WIDTH + MARGIN, header + num_rows * cell_height), PAPER)
    draw = ImageDraw.Draw(sheet)
    if title:
        font = ImageFont.load_default(18)
        draw.text((MARGIN, MARGIN), fit_text(without_accents(title), font, sheet.width - 2 * MARGIN), INK, font)
    for number, prediction in enumerate(predictions):
        row, column = divmod(number, columns)
        _draw_cell(sheet, draw, (MARGIN + column * CELL_WIDTH, header + row * cell_height), prediction)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def _draw_cell(sheet: Image.Image, draw: ImageDraw.ImageDraw, corner: tuple[int, int], prediction: Prediction) -> None:
    """Draw one picture and its lines of text."""
    left, top = corner
    scale = PICTURE_SIZE / max(prediction.image.size)
    size = (max(1, round(prediction.image.width * scale)), max(1, round(prediction.image.height * scale)))
    picture = prediction.image.convert("RGB").resize(size, Image.Resampling.BICUBIC)
    centre = left + (PICTURE_SIZE - size[0]) // 2, top + (PICTURE_SIZE - size[1]) // 2
    first_is_right = bool(prediction.guesses) and prediction.guesses[0][1]
    frame = (left - 2, top - 2, left + PICTURE_SIZE + 1, top + PICTURE_SIZE + 1)
    draw.rectangle(frame, outline=GREEN if first_is_right else FRAME, width=2)
    sheet.paste(picture, centre)
    lines = [(name, GREEN if right else GREY) for name, right in prediction.guesses]
    if not prediction.label:
        lines[:1] = [(name, INK) for name, _ in lines[:1]]
    elif not any(right for _, right in prediction.guesses):
        lines.append((f"= {prediction.label}", INK))
    font = ImageFont.load_default(FONT_SIZE)
    for number, (text, colour) in enumerate(lines):
        place = (left, top + PICTURE_SIZE + 5 + number * LINE_HEIGHT)
        draw.text(place, fit_text(without_accents(text), font, CELL_WIDTH - MARGIN), colour, font)


def fit_text(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: float) -> str:
    """Shorten a text with "..." until it is at most `width` pixels wide."""
    if font.getlength(text) <= width:
        return text
    end = next((end for end in range(len(text) - 1, 0, -1) if font.getlength(text[:end].rstrip() + "...") <= width), 0)
    return text[:end].rstrip() + "..."


def without_accents(text: str) -> str:
    """Take accents off letters ("piñata" becomes "pinata"): the built-in font lacks them."""
    return "".join(letter for letter in unicodedata.normalize("NFKD", text) if not unicodedata.combining(letter))
