"""Choices among near misses: judged by hand, ties included, and the tables that they stand in."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F

from clipkit.evaluation.choices import judge
from clipkit.evaluation.encode import EncodedTask, encode_task
from clipkit.evaluation.paired import compare_predictions
from clipkit.evaluation.store import EmbeddingStore
from clipkit.evaluation.tasks import CHOICE, RETRIEVAL, load_task
from clipkit.evaluation.zero_shot import measure
from tests.test_report import report, result
from tests.test_tasks import picture

THREE = ["image,caption,negative_caption_1,negative_caption_2,kind", "a.png,red,blue,green,swap", "a.png,round,square,,add",
         "b.png,big,small,,swap"]
PAIRS = "image_0,caption_0,image_1,caption_1,tag\na.png,one two,b.png,two one,order\nb.png,up,c.png,down,place\n"


def table(folder: Path, text: str, pictures: Sequence[str] = "abc") -> str:
    folder.mkdir(exist_ok=True)
    for number, name in enumerate(pictures):
        (folder / f"{name}.png").write_bytes(picture(number))
    (folder / "choices.csv").write_text(text)
    return str(folder / "choices.csv")


@pytest.mark.parametrize(("similarity", "text", "image", "margin"), [
    ([[0.3, 0.2, 0.1]], True, True, 0.1),  # one picture: its caption is nearer than either false one
    ([[0.2, 0.3, 0.1]], False, True, -0.1),
    ([[0.2, 0.1, 0.2]], False, True, 0.0),  # a tie is a miss
    ([[0.4, 0.3], [0.2, 0.5]], True, True, 0.1),
    ([[0.4, 0.3], [0.5, 0.6]], True, False, -0.1),  # the first caption is nearer to the second picture
    ([[0.4, 0.5], [0.2, 0.6]], False, True, -0.1),
    ([[0.4, 0.4], [0.2, 0.6]], False, True, 0.0),
    ([[0.4, 0.3], [0.4, 0.5]], True, False, 0.0),
])
def test_a_question_is_judged_as_by_hand(similarity, text: bool, image: bool, margin: float) -> None:
    verdict = judge(np.array(similarity))
    assert (verdict.text_margin > 0, verdict.image_margin > 0) == (text, image)
    assert verdict.margin == pytest.approx(margin, abs=1e-12)


def test_no_permutation_of_false_captions_changes_anything() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        row = rng.integers(0, 4, (1, 5)).astype(float)  # many ties
        order = [0, *rng.permutation(np.arange(1, 5))]
        assert judge(row).margin == judge(row[:, order]).margin


def asked(monkeypatch: pytest.MonkeyPatch, task, images: dict[str, list[float]], texts: dict[str, list[float]]):
    """Measure a task with given features."""
    from clipkit.evaluation import zero_shot

    features = F.normalize(torch.tensor(list(images.values())), dim=1)
    encoded = EncodedTask(features, list(images), torch.arange(len(images)), [()] * len(images), [()] * len(images),
                          Counter())
    monkeypatch.setattr(zero_shot, "encode_task", lambda *_, **__: encoded)
    monkeypatch.setattr(zero_shot, "encode_texts", lambda _, given, **__: F.normalize(
        torch.tensor([texts[text] for text in given]), dim=1))
    return measure(None, task)


def values_of(outcome) -> dict[str, float]:
    return {one.metric: one.value for one in outcome.results}


def test_one_picture_with_false_captions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = load_task(table(tmp_path / "t", "\n".join(THREE)))
    assert task.kind == CHOICE and [len(question.captions) for question in task.questions] == [3, 2, 2]
    texts = {"red": [1, 0], "blue": [0, 1], "green": [0.5, 1], "round": [1, 1], "square": [1, -1], "big": [1, 0.5],
             "small": [1, 0]}
    found = asked(monkeypatch, task, {"a.png": [1.0, 0.0], "b.png": [1.0, 0.0]}, texts)
    # red is nearer than blue and green; round and square are equally near: a miss; small is nearer than big.
    assert values_of(found) == pytest.approx({"acc": 1 / 3, "tie_rate": 1 / 3})
    assert {one.n for one in found.results} == {3} and {one.prompts for one in found.results} == {"captions"}
    rows = found.predictions
    assert rows["rank"].tolist() == [0, 1, 1] and rows["tied"].tolist() == [False, True, False]
    assert rows["guess_name"].tolist() == ["red", "square", "small"] and rows["key"].tolist() == ["a.png", "a.png", "b.png"]


def test_two_pictures_with_two_captions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = load_task(table(tmp_path / "t", PAIRS))
    texts = {"one two": [1, 0.2], "two one": [0.2, 1], "up": [1, 0], "down": [0.9, 0.1]}
    found = asked(monkeypatch, task, {"a.png": [1, 0], "b.png": [0.0, 1.0], "c.png": [0.1, 1.0]}, texts)
    # The first question is right both ways; in the second both pictures choose "down", and both captions the third picture.
    assert values_of(found) == {"acc": 0.5, "text_acc": 0.5, "image_acc": 0.5, "tie_rate": 0.0}
    rows = found.predictions.set_index(["direction", "question"])
    assert rows.loc[("text", 1), "guess_name"] == "down | down" and rows.loc[("image", 1), "guess_name"] == "c.png | c.png"
    assert rows.loc[("", 0), "key"] == "a.png | b.png" and rows.loc[("", 1), "rank"] == 1
    compared = compare_predictions(found.predictions, found.predictions)
    assert [one.metric for one in compared] == ["acc", "text_acc", "image_acc"] and {one.n for one in compared} == {2}


def test_a_model_that_sees_no_difference_scores_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    constant = torch.randn(16, generator=torch.Generator().manual_seed(0)).tolist()
    for text in (PAIRS, "\n".join(THREE)):
        task = load_task(table(tmp_path / "t", text))
        captions = {caption: constant for question in task.questions for caption in question.captions}
        found = values_of(asked(monkeypatch, task, {f"{name}.png": constant for name in "abc"}, captions))
        assert (found.pop("tie_rate"), set(found.values())) == (1, {0})


def test_a_picture_of_several_questions_is_encoded_once(tiny_model, tmp_path: Path) -> None:
    task, store = load_task(table(tmp_path / "t", "\n".join(THREE))), EmbeddingStore(tmp_path / "cache")
    assert len(encode_task(tiny_model, task, batch_size=8, store=store).keys) == 2
    assert values_of(measure(tiny_model, task, store=store)) == values_of(measure(tiny_model, task))


def test_what_cannot_be_asked_is_left_out_and_counted(tiny_model, tmp_path: Path) -> None:
    rows = [*THREE, "b.png,alone,,,swap", "nowhere.png,x,y,,swap", ",x,y,,swap", "b.png,,y,,swap", "a.png,x,y"]
    found = measure(tiny_model, load_task(table(tmp_path / "t", "\n".join(rows))))
    assert {(one.n, one.n_bad) for one in found.results} == {(3, 5)}
    assert "5 questions" not in found.notes[0] and "5 of 8 questions" in found.notes[0]
    for cause in ("no false caption", "picture cannot be used", "no image", "no caption", "wrong number of columns"):
        assert cause in found.notes[0]
    with pytest.raises(ValueError, match=r"has no question that can be asked \(left out: {'no false caption': 1}\)"):
        measure(tiny_model, load_task(table(tmp_path / "u", "image,caption,negative_caption\na.png,x,\n")))


def test_a_parquet_table_may_hold_the_pictures_and_lists_of_false_captions(tiny_model, tmp_path: Path) -> None:
    table(tmp_path / "t", PAIRS)
    inside = [{"bytes": picture(number), "path": None} for number in range(3)]
    pd.DataFrame({"image_0": [inside[0], inside[1]], "caption_0": ["one two", "up"], "image_1": [inside[1], inside[2]],
                  "caption_1": ["two one", "down"]}).to_parquet(tmp_path / "pairs.parquet")
    of_files = measure(tiny_model, load_task(str(tmp_path / "t" / "choices.csv")))
    of_table = measure(tiny_model, load_task(str(tmp_path / "pairs.parquet")))
    assert values_of(of_table) == values_of(of_files)
    np.testing.assert_allclose(of_table.predictions["margin"], of_files.predictions["margin"], atol=1e-6)  # other batches
    pd.DataFrame({"filename": ["t/a.png", "t/b.png"], "true_caption": ["x", "y"],
                  "false_captions": [["a", "b"], ["c"]]}).to_parquet(tmp_path / "lists.parquet")
    task = load_task(str(tmp_path / "lists.parquet"))
    assert [question.captions for question in task.questions] == [("x", "a", "b"), ("y", "c")]


def test_columns_that_are_no_choices_are_told_in_one_line(tmp_path: Path) -> None:
    plain = table(tmp_path / "t", "image,caption\na.png,x\n")
    assert load_task(plain).kind == RETRIEVAL
    with pytest.raises(ValueError, match=r"has the columns 'image', 'caption'; image_caption_selection needs an image"):
        load_task(plain, kind=CHOICE)
    with pytest.raises(ValueError, match="image_caption_selection needs an image, caption or true_caption, and negative_capt"):
        load_task(table(tmp_path / "u", "image,negative_caption\na.png,x\n"))
    with pytest.raises(ValueError, match=r"kind is 'image_caption_selection', but task .* is no table; give one \(.csv, .tsv"):
        load_task(str(tmp_path / "t"), kind=CHOICE)
    with pytest.raises(FileNotFoundError, match="no table at"):
        load_task(str(tmp_path / "none.csv"), kind=CHOICE)
    assert load_task(table(tmp_path / "v", "\n".join(THREE)), kind=RETRIEVAL).kind == RETRIEVAL


def test_the_report_shows_the_clearest_mistakes(tmp_path: Path) -> None:
    rows = pd.DataFrame([{"task": "t", "kind": CHOICE, "prompts": "captions", "direction": direction, "key": key, "label": 0,
                          "label_name": "a <cat> | a hen", "guess": int(margin <= 0), "guess_name": "a hen | a hen",
                          "rank": int(margin <= 0), "tied": margin == 0, "margin": margin}
                         for direction in ("", "text", "image")
                         for key, margin in (("a | b", -0.25), ("c | d", 0.5), ("e | f", 0.0))])
    results = [result(task="t", kind=CHOICE, metric=metric, prompts="captions", num_classes=None)
               for metric in ("acc", "text_acc", "image_acc", "tie_rate")]
    _, page = report(tmp_path, results=results, predictions=rows, prompts={}, classes={})
    assert "All choices are right in 1 of 3 questions (33.3%). 1 question is missed by an exact tie." in page.text
    order = [page.text.index(text) for text in ("less that of the chosen: -0.250", "less that of the chosen: +0.000")]
    assert order == sorted(order) and "+0.500" not in page.text and "a <cat>" in page.text and len(page.all("img")) == 4
    right = rows.loc[rows["margin"] > 0]
    assert "None: every picture finds its caption." in report(tmp_path, results=results, predictions=right)[1].text
