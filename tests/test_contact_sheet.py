"""The picture of predictions."""

from pathlib import Path

import pytest
from PIL import Image, ImageColor, ImageFont

from clipkit.evaluation.contact_sheet import (
    FONT_SIZE,
    GREEN,
    INK,
    LINE_HEIGHT,
    MARGIN,
    draw_contact_sheet,
    fit_text,
    without_accents,
)
from clipkit.evaluation.predictions import Prediction


def prediction(right_guess: int | None, colour: str = "orange", size: tuple[int, int] = (64, 64)) -> Prediction:
    guesses = tuple((f"guess {number}", number == right_guess) for number in range(3))
    return Prediction(Image.new("RGB", size, colour), "a label", guesses)


def count_colour(path: Path, wanted: str) -> int:
    with Image.open(path) as image:
        colours = image.getcolors(maxcolors=1 << 20) or []
    return sum(count for count, colour in colours if colour == ImageColor.getrgb(wanted))


def test_right_guesses_are_green_and_only_they(tmp_path: Path) -> None:
    draw_contact_sheet([prediction(None)] * 3, tmp_path / "wrong.png")
    draw_contact_sheet([prediction(2)] * 3, tmp_path / "third.png")
    draw_contact_sheet([prediction(0)] * 3, tmp_path / "first.png")
    assert count_colour(tmp_path / "wrong.png", GREEN) == 0
    third, first = (count_colour(tmp_path / name, GREEN) for name in ("third.png", "first.png"))
    assert 0 < third < first  # a frame joins the name


def test_pictures_stand_in_rows_of_eight(tmp_path: Path) -> None:
    draw_contact_sheet([prediction(0)] * 8, tmp_path / "one.png", title="one row")
    draw_contact_sheet([prediction(0)] * 9, tmp_path / "two.png", title="two rows")
    with Image.open(tmp_path / "one.png") as one, Image.open(tmp_path / "two.png") as two:
        assert one.width == two.width
        assert one.height < two.height < 2 * one.height


def test_a_picture_of_any_shape_is_fitted_into_its_square(tmp_path: Path) -> None:
    wide, narrow = prediction(None, "#ff00ff", (500, 5)), prediction(None, "#ff00ff", (3, 300))
    draw_contact_sheet([wide, narrow], tmp_path / "a.png")
    assert count_colour(tmp_path / "a.png", "#ff00ff") == 2 * 128  # 128x1 and 1x128


def test_a_long_name_is_shortened_to_the_width() -> None:
    font = ImageFont.load_default(FONT_SIZE)
    text = "woman and man holding hands, medium-dark skin tone"
    short = fit_text(text, font, 100)
    assert short.endswith("...")
    assert text.startswith(short[:-3])
    assert font.getlength(short) <= 100
    assert fit_text("cat", font, 100) == "cat"


def test_accents_that_the_font_lacks_are_taken_off() -> None:
    assert without_accents("piñata, Åland, “ok”") == "pinata, Aland, “ok”"


def test_a_sheet_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there are no predictions to draw"):
        draw_contact_sheet([], tmp_path / "a.png")


def test_pictures_without_a_right_name_have_their_first_guess_in_black_and_no_green(tmp_path: Path) -> None:
    guesses = (("98%  a cat", False), ("2%  a dog", False))
    unlabelled = Prediction(Image.new("RGB", (64, 64), "orange"), "", guesses)
    draw_contact_sheet([unlabelled], tmp_path / "unlabelled.png")
    draw_contact_sheet([unlabelled._replace(label="a cow")], tmp_path / "labelled.png")
    assert count_colour(tmp_path / "unlabelled.png", GREEN) == 0
    assert count_colour(tmp_path / "unlabelled.png", INK) > 0
    with Image.open(tmp_path / "unlabelled.png") as unlabelled_sheet, Image.open(tmp_path / "labelled.png") as labelled_sheet:
        assert unlabelled_sheet.height == labelled_sheet.height - LINE_HEIGHT  # no line for the right name


def test_a_long_title_stays_on_the_sheet(tmp_path: Path) -> None:
    draw_contact_sheet([prediction(None)], tmp_path / "long.png", title="a very long query about 猫 " * 20)
    with Image.open(tmp_path / "long.png") as sheet:
        margin = sheet.crop((sheet.width - MARGIN, 0, sheet.width, 30))
        assert margin.getcolors() == [(margin.width * margin.height, (255, 255, 255))]
