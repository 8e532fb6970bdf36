"""The report: a whole page that needs nothing from elsewhere."""

import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from clipkit.evaluation.report import PREDICTION_COLUMNS, write_report
from clipkit.evaluation.report_page import data_uri, escape
from clipkit.evaluation.results import Provenance, Result
from clipkit.evaluation.tasks import CLASSIFICATION, RETRIEVAL

AWKWARD = ['<script>alert("1")</script>', "salt & 'pepper'", "שלום עולם", "👩‍🚀", "bell\x07", "naïve", "a" * 200]
VOID = {"meta", "img", "br", "wbr", "link", "hr", "input"}
PROVENANCE = Provenance("my <run>", "laion", "fp32", "0123456789abcdef" * 4, 742, "0.1.0")


class Page(HTMLParser):
    """Reads a page, and fails where tags do not close in the order in which they opened."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open_tags, self.tags, self.sources, self.text = [], [], [], ""
        self.feed(text)
        self.close()
        assert not self.open_tags

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.sources += [value for key, value in attrs if key in ("src", "href", "srcset", "data", "action", "xlink:href")]
        self.open_tags += [tag] if tag not in VOID else []

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open_tags.pop() == tag

    def handle_data(self, data):
        self.text += "" if self.open_tags[-1:] == ["style"] else data

    def all(self, tag: str, **wanted: str) -> list[dict]:
        return [attrs for name, attrs in self.tags if name == tag and wanted.items() <= attrs.items()]


def classification(n: int = 300, names: Sequence[str] = AWKWARD, *, accuracy: float = 0.6, seed: int = 0, **columns):
    """Predictions of a made-up classifier."""
    rng = np.random.default_rng(seed)
    label = rng.integers(0, len(names), n)
    guess = np.where(rng.random(n) < accuracy, label, rng.integers(0, len(names), n))
    probability = rng.random(n) * 0.9 + 0.05
    values = {"name": "run", "task": "sets/my <task>", "kind": CLASSIFICATION, "prompts": "openai80", "direction": "",
              "key": [f"a/{index:04d}.png" for index in range(n)], "label": label, "label_name": [names[i] for i in label],
              "guess": guess, "guess_name": [names[i] for i in guess], "probability": probability,
              "probability_100": probability**0.1, "nll": -np.log(probability), "nll_100": 2 - np.log(probability),
              "rank": (guess != label) * 3, "tied": np.arange(n) < 6}
    return pd.DataFrame({**values, **columns})


def retrieval(n: int = 100, seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    frames = []
    for direction in ("image_retrieval", "text_retrieval"):
        rank = np.minimum(rng.geometric(0.1, n) - 1, n - 1)
        found = [f"a/{index:04d}.png" if direction == "image_retrieval" else f"another text {index}" for index in range(n)]
        frames.append(classification(n, task="pairs", kind=RETRIEVAL, prompts="captions", direction=direction, rank=rank,
                                     label=-1, label_name=[f"text <{index}>" for index in range(n)], guess_name=found,
                                     tied=False))
    return pd.concat(frames, ignore_index=True).drop(columns=["probability", "probability_100", "nll", "nll_100"])


def result(**changes) -> Result:
    values = {"task": "sets/my <task>", "split": "test", "kind": CLASSIFICATION, "metric": "acc1", "value": 0.654321, "n": 300,
              "ci_low": 0.612, "ci_high": 0.699, "num_classes": 7, "prompts": "openai80", "n_bad": 0}
    return Result(**{**values, **changes})


def thumbnails(task: str, keys: Sequence[str]) -> dict[str, Image.Image]:
    return {key: Image.new("RGB", (200, 100), (len(task), index % 256, 7)) for index, key in enumerate(keys)}


def report(path: Path, **changes) -> tuple[str, Page]:
    prompts = {"sets/my <task>": {"openai80": [[f"a photo of {name}"] * 80 for name in AWKWARD]}}
    arguments = {"title": "A <title>", "provenance": PROVENANCE, "results": [result()], "predictions": classification(),
                 "prompts": prompts, "classes": {"sets/my <task>": AWKWARD}, "thumbnails": thumbnails, "date": "2026-11-22",
                 "versions": {"torch": "2.15.0"}}
    write_report(path / "deep" / "report.html", **{**arguments, **changes})
    text = (path / "deep" / "report.html").read_text(encoding="utf-8")
    return text, Page(text)


def test_the_page_is_well_formed_and_asks_for_nothing_from_elsewhere(tmp_path: Path) -> None:
    text, page = report(tmp_path, predictions=pd.concat([classification(), retrieval()]))
    assert text.startswith("<!DOCTYPE html>\n<html lang=\"en\">")
    assert all(source.startswith(("data:image/", "#task-")) for source in page.sources)
    assert not re.search(r"https?:|url\(|@import|<script|<iframe|<link|javascript:|\son\w+=", text)
    ids = {attrs["id"] for _, attrs in page.tags if "id" in attrs}
    assert {source[1:] for source in page.sources if source.startswith("#")} == ids == {"task-0", "task-1"}


def test_lines_of_a_task_stand_together_under_its_name(tmp_path: Path) -> None:
    results = [result(task="one"), result(task="two"), result(task="one", prompts="plain")]
    _, page = report(tmp_path, results=results, predictions=pd.DataFrame())
    assert [row["class"] for row in page.all("tr") if row] == ["same", "last", "last"]
    assert page.text.count("one") == page.text.count("two") == 1


def test_every_result_stands_in_the_table(tmp_path: Path) -> None:
    results = [result(n_bad=3), result(metric="acc5", value=0.9), result(prompts="plain", value=0.5),
               result(metric="nll", value=1.23456, ci_low=1.1, ci_high=1.3),
               result(metric="tie_rate", value=0.015, ci_low=None, ci_high=None), result(metric="ece", value=float("nan")),
               result(task="pairs", kind=RETRIEVAL, metric="image_retrieval_recall@1", num_classes=None, value=0.125, n=1000),
               result(task="pairs", kind=RETRIEVAL, metric="text_retrieval_recall@1", num_classes=None, value=0.25, n=200)]
    _, page = report(tmp_path, results=results)
    assert sorted(float(attrs["value"]) for attrs in page.all("data")) == sorted(
        one.value for one in results if one.value == one.value)
    for shown in ("65.4%", "61.2\u201369.9", "90.0%", "50.0%", "1.235", "1.1\u20131.3", "12.5%", "25.0%", "1.5%", "3 unusable",
                  "1,000 / 200", "image R@1", "plain", "Zero-shot classification", "Retrieval", "More metrics"):
        assert shown in page.text
    assert page.text.count("unusable") == 1 and "nan" not in page.text


def test_the_header_says_what_was_measured(tmp_path: Path) -> None:
    _, page = report(tmp_path)
    for shown in ("A <title>", "my <run>", "laion", "0123456789ab", "742", "fp32", "2026-11-22", "clipkit 0.1.0",
                  "torch 2.15.0"):
        assert shown in page.text
    assert page.all("code", title="0123456789abcdef" * 4)


def test_names_are_shown_as_they_are_and_never_become_markup(tmp_path: Path) -> None:
    text, page = report(tmp_path)
    for name in (*AWKWARD[:4], "bell?"):
        assert name in page.text
    assert "<script" not in text
    assert "<bdi>שלום עולם</bdi>" in text  # keeps the direction of the words around it
    assert escape("a\x00\x1b\ud800<") == "a???&lt;"


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    frame = pd.concat([classification(), retrieval()])
    assert report(tmp_path / "a", predictions=frame)[0] == report(tmp_path / "b", predictions=frame)[0]


def test_the_page_states_calibration_at_both_scales(tmp_path: Path) -> None:
    frame = classification(500)
    _, page = report(tmp_path, predictions=frame)
    right = (frame["guess"] == frame["label"]).to_numpy()
    for column in ("probability", "probability_100"):
        number = np.digitize(frame[column], np.linspace(0, 1, 16)[1:-1], right=True)
        gaps = [abs((right[number == index] - frame[column][number == index]).sum()) for index in range(15)]
        assert f"{sum(gaps) / 500:.1%}" in page.text
    assert f"{frame['nll'].mean():.3f}" in page.text and f"{frame['nll_100'].mean():.3f}" in page.text
    assert "learned scale" in page.text and "scale 100" in page.text


def test_a_model_whose_scale_is_100_has_one_curve(tmp_path: Path) -> None:
    frame = classification()
    _, page = report(tmp_path, predictions=frame.assign(probability_100=frame["probability"], nll_100=frame["nll"]))
    assert "learned scale" not in page.text and len(page.all("polyline")) == 1


def test_answers_without_probabilities_have_no_diagram(tmp_path: Path) -> None:
    _, page = report(tmp_path, predictions=classification(probability=np.nan, probability_100=np.nan))
    assert not page.all("polyline")


def test_the_worst_queries_are_shown_with_their_answers(tmp_path: Path) -> None:
    frame = retrieval()
    _, page = report(tmp_path, predictions=frame)
    for direction in ("image_retrieval", "text_retrieval"):
        worst = frame[frame["direction"] == direction].nlargest(6, "rank")
        assert all(f"right answer at place {rank + 1}" in page.text for rank in worst["rank"])
        # the own texts of a picture are found among the queries of the other direction
        assert all(f"text <{int(key[2:6])}>" in page.text for key in worst["key"])
    assert page.text.count("found instead") == 12


def test_each_task_asks_for_its_pictures_once_and_misses_them_in_peace(tmp_path: Path) -> None:
    asked = []
    _, page = report(tmp_path, predictions=pd.concat([classification(), retrieval()]),
                     thumbnails=lambda task, keys: asked.append((task, list(keys))) or {})
    assert [task for task, _ in asked] == ["sets/my <task>", "pairs"]
    assert all(len(set(keys)) == len(keys) for _, keys in asked)
    assert not page.all("img") and page.text.count("no picture") > 40


def test_ties_are_told_where_there_are_any(tmp_path: Path) -> None:
    assert "In 6 questions (2.0%) another answer has exactly the top score" in report(tmp_path)[1].text
    assert "exactly the top score" not in report(tmp_path, predictions=classification(tied=False))[1].text


def test_the_first_prompt_rule_is_shown_in_detail(tmp_path: Path) -> None:
    second = classification(prompts="plain", accuracy=0.0)
    _, page = report(tmp_path, predictions=pd.concat([classification(accuracy=1.0), second]))
    assert "The first guess is right for 300 of 300 pictures (100.0%)" in page.text
    assert "one of 2 rules" in page.text and len(page.all("section")) == 1


def test_prompts_are_folded_away_with_examples_and_counts(tmp_path: Path) -> None:
    _, page = report(tmp_path)
    assert len(page.all("details")) == 1 and "open" not in page.all("details")[0]
    assert "7 classes, 80 texts each" in page.text and "and 74 more" in page.text and "and 3 more classes" in page.text
    assert 'a photo of <script>alert("1")</script>' in page.text


def test_many_classes_show_forty_recalls_and_say_how_many_there_are(tmp_path: Path) -> None:
    names = [f"class {index}" for index in range(100)]
    text, page = report(tmp_path, predictions=classification(1000, names), classes={"sets/my <task>": [*names, "unseen"]})
    assert text.count('class="recall"') == 40
    assert "100 classes have pictures; 1 more have no picture" in page.text


@pytest.mark.parametrize(("changes", "shown"), [
    ({"predictions": classification(accuracy=1.0)}, "No picture is named wrongly."),
    ({"predictions": classification(5, "ab", label=0, guess=1, guess_name="b")}, "No picture is named rightly."),
    ({"predictions": classification(3, ["only"]), "classes": {"sets/my <task>": ["only"]}}, "1 class has pictures"),
    ({"predictions": classification(1, ["only"])}, "Each has a single picture"),
    ({"predictions": retrieval().query("direction == 'text_retrieval'").assign(rank=0)}, "100 queries; median place 1."),
    ({"predictions": pd.DataFrame()}, "Zero-shot classification"),
    ({"predictions": pd.DataFrame(columns=list(PREDICTION_COLUMNS))}, "Zero-shot classification"),
    ({"predictions": classification(kind="linear_probe")}, "Zero-shot classification"),
    ({"prompts": {}, "classes": {}, "versions": None, "date": ""}, "The first guess is right"),
])
def test_a_report_of_little_is_whole(changes, shown: str, tmp_path: Path) -> None:
    assert shown in report(tmp_path, **changes)[1].text


def test_five_tasks_stay_below_three_megabytes(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)

    def photographs(task: str, keys: Sequence[str]) -> dict[str, Image.Image]:
        coarse = [Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8)) for _ in keys]
        return {key: image.resize((160, 120), Image.Resampling.BICUBIC) for key, image in zip(keys, coarse, strict=True)}

    text, page = report(tmp_path, predictions=classification(400, "abcdefghijklmnopqrst"), thumbnails=photographs)
    assert len(page.all("img")) == 48
    assert 5 * len(text.encode()) < 3e6


def test_a_thumbnail_is_shrunk_and_never_enlarged() -> None:
    import base64
    import io

    for size, expected in (((1000, 500), (128, 64)), ((20, 30), (20, 30))):
        kind, content = data_uri(Image.new("RGBA", size, "red")).split(";base64,")
        with Image.open(io.BytesIO(base64.b64decode(content))) as image:
            assert image.size == expected and kind == f"data:image/{image.format.lower()}"


def test_no_results_are_not_reported(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there are no results to report; evaluate at least one task"):
        report(tmp_path, results=[])


def test_predictions_without_a_column_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"predictions lack the columns \['tied'\]; a report needs .* evaluate again"):
        report(tmp_path, predictions=classification().drop(columns="tied"))
