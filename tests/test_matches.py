"""One's own pictures, named or found by a text."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.special import softmax

from clipkit.evaluation.contact_sheet import draw_contact_sheet
from clipkit.evaluation.matches import (
    Match,
    NamedPicture,
    classify_pictures,
    matches_sheet,
    matches_table,
    named_sheet,
    predictions_table,
    top_matches,
    write_matches,
    write_predictions,
)

CLASSES = ["cat", "dog", "a, \"quoted\" fox", "naïve 猫"]


def features(*shape: int, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def named(num_images: int = 20, **changes) -> list[NamedPicture]:
    arguments = {"classes": CLASSES, "logit_scale": 20.0}
    files = [f"holiday/{number}.jpg" for number in range(num_images)]
    return classify_pictures(files, features(num_images, 8), features(4, 8, seed=1), **{**arguments, **changes})


def test_guesses_are_the_largest_of_the_softmax() -> None:
    logits = 20.0 * features(20, 8).double().numpy() @ features(4, 8, seed=1).double().numpy().T
    probabilities = softmax(logits, axis=1)
    for row, picture in zip(probabilities, named(), strict=True):
        order = np.argsort(-row)[:3]
        assert [guess for guess, _ in picture.guesses] == [CLASSES[number] for number in order]
        assert [value for _, value in picture.guesses] == pytest.approx(row[order].tolist(), abs=1e-5)  # fp32 against fp64


def test_files_keep_their_order_and_a_permutation_of_classes_changes_no_guess() -> None:
    assert [picture.file for picture in named(3)] == ["holiday/0.jpg", "holiday/1.jpg", "holiday/2.jpg"]
    order = [2, 0, 3, 1]
    permuted = classify_pictures([picture.file for picture in named()], features(20, 8), features(4, 8, seed=1)[order],
                                 classes=[CLASSES[number] for number in order], logit_scale=20.0)
    assert [[guess for guess, _ in one.guesses] for one in permuted] == [[guess for guess, _ in one.guesses] for one in named()]


def test_of_two_classes_there_are_two_guesses_and_of_equal_ones_the_first_wins() -> None:
    same = features(1, 8).expand(2, 8)
    picture = classify_pictures(["a.jpg"], features(1, 8), same, classes=["x", "y"], logit_scale=100.0)[0]
    assert picture.guesses == (("x", 0.5), ("y", 0.5))


def test_matches_are_those_of_a_whole_sort() -> None:
    images, query = features(50, 8), features(8, seed=2)
    indices, scores = top_matches(images, query, 7)
    expected = np.sort(images.double().numpy() @ query.double().numpy())[::-1][:7]
    assert scores.tolist() == pytest.approx(expected.tolist(), abs=1e-6)  # fp32 against fp64
    assert (images[indices] @ query).tolist() == pytest.approx(scores.tolist(), abs=1e-6)


def test_of_equal_scores_the_picture_listed_first_wins_and_few_pictures_are_all_returned() -> None:
    indices, scores = top_matches(features(1, 8).expand(3, 8), features(8, seed=1), 10)
    assert indices.tolist() == [0, 1, 2] and len(scores) == 3


def test_predictions_are_written_as_csv_that_reads_back(tmp_path: Path) -> None:
    pictures = [NamedPicture("a, b/ü\nx.jpg", (('say "cat"', 0.75), ("猫", 0.25))),
                NamedPicture("c.jpg", (("猫", 1.0), ("x", 0.0)))]
    write_predictions(tmp_path / "new" / "predictions.csv", pictures)
    with (tmp_path / "new" / "predictions.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["file", "guess_1", "probability_1", "guess_2", "probability_2"]
    assert [(row["file"], row["guess_1"], float(row["probability_1"]), row["guess_2"]) for row in rows] == [
        ("a, b/ü\nx.jpg", 'say "cat"', 0.75, "猫"), ("c.jpg", "猫", 1.0, "x")]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["predictions.csv"]  # nothing half-written beside it


def test_a_file_name_that_is_no_text_is_still_written(tmp_path: Path) -> None:
    write_predictions(tmp_path / "a.csv", [NamedPicture("bad\udcff.jpg", (("x", 1.0),))])
    assert (tmp_path / "a.csv").read_text(encoding="utf-8").splitlines()[1] == "bad?.jpg,x,1.000000"


def test_matches_are_written_with_their_places(tmp_path: Path) -> None:
    write_matches(tmp_path / "m.csv", "a red car", [Match("b.jpg", 0.31), Match("a.jpg", -0.2)])
    assert (tmp_path / "m.csv").read_text(encoding="utf-8").splitlines() == [
        "query,place,file,score", "a red car,1,b.jpg,0.310000", "a red car,2,a.jpg,-0.200000"]


def test_the_tables_align_also_where_letters_are_wide() -> None:
    lines = predictions_table([NamedPicture("猫.jpg", (("cat", 0.987), ("dog", 0.013))),
                               NamedPicture("long name.jpg", (("a fox", 0.5), ("b", 0.5)))]).splitlines()
    assert lines == ["猫.jpg          98.7% cat      1.3% dog", "long name.jpg   50.0% a fox   50.0% b"]
    assert matches_table([Match("b.jpg", 0.3129), Match("a.jpg", -0.2)]).splitlines() == ["  1   0.313  b.jpg",
                                                                                         "  2  -0.200  a.jpg"]


def test_the_tables_say_how_many_lines_are_left_out() -> None:
    assert matches_table([Match("a.jpg", 0.5)] * 25, limit=20).splitlines()[-1] == "... and 5 more"
    assert len(predictions_table(named(20), limit=20).splitlines()) == 20
    assert matches_table([]) == ""


def test_sheets_of_named_and_of_found_pictures_are_drawn(tmp_path: Path) -> None:
    images = [Image.new("RGB", (30, 20), "orange")] * 9
    draw_contact_sheet(named_sheet(images, named(9)), tmp_path / "named.png", title="cat or dog?")
    found = matches_sheet(images, [Match(f"folder/{number}.jpg", 0.3) for number in range(9)])
    assert found[0].guesses == (("0.300", False), ("0.jpg", False)) and found[0].label == ""
    draw_contact_sheet(found, tmp_path / "found.png", title="“a red car”")
    with Image.open(tmp_path / "named.png") as one, Image.open(tmp_path / "found.png") as other:
        assert one.width == other.width and one.height > other.height  # three lines below each picture, and two


@pytest.mark.parametrize(("call", "message"), [
    (lambda: named(classes=CLASSES[:3]), "20 files with 20 features, 3 classes with 4 weights; give one feature a file"),
    (lambda: classify_pictures(["a"], features(1, 8), features(1, 8), classes=["cat"], logit_scale=1.0),
     r"classes is \['cat'\]; a probability needs at least two to choose from"),
    (lambda: classify_pictures(["a"], features(1, 8) * torch.nan, features(2, 8), classes=["a", "b"], logit_scale=1.0),
     "features hold NaN or infinity; the model cannot be used"),
    (lambda: top_matches(features(3, 8), features(8) * torch.inf, 2), "features hold NaN or infinity"),
    (lambda: top_matches(features(3, 8), features(8), 0), "k is 0; ask for at least 1 match"),
    (lambda: write_predictions(Path("never.csv"), []), "there are no pictures to write; give at least one"),
    (lambda: write_matches(Path("never.csv"), "x", []), "there are no matches to write; give at least one picture"),
])
def test_bad_input_is_refused_in_one_line(call, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
