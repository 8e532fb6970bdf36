"""The numbers and the figures of a report are those of scikit-learn."""

import numpy as np
import pytest
from sklearn.calibration import calibration_curve
from sklearn.metrics import confusion_matrix, recall_score

from clipkit.evaluation.calibration import reliability_table
from clipkit.evaluation.report_figures import histogram, interval_bar, reliability_diagram
from clipkit.evaluation.report_numbers import class_recalls, rank_histogram, read_answers, surest_first, worst_confusions
from tests.test_report import Page, classification


def test_confusions_are_those_of_the_confusion_matrix() -> None:
    frame = classification(400, "abcde")
    matrix = confusion_matrix(frame["label"], frame["guess"])
    found = worst_confusions(read_answers(frame), limit=100)
    assert len(found) == (matrix - np.diag(np.diag(matrix)) > 0).sum()
    assert [one.count for one in found] == sorted((one.count for one in found), reverse=True)
    for one in found:
        label, guess = "abcde".index(one.label_name), "abcde".index(one.guess_name)
        assert one.count == matrix[label, guess]
        assert one.num_of_label == matrix[label].sum()
        of_pair = frame[(frame["label"] == label) & (frame["guess"] == guess)]
        assert one.key == of_pair.loc[of_pair["probability"].idxmax(), "key"]
        right = frame[(frame["label"] == guess) & (frame["guess"] == guess)]
        assert one.guess_key == right.loc[right["probability"].idxmax(), "key"]


def test_a_guessed_class_without_pictures_has_no_picture() -> None:
    frame = classification(2, "ab", label=[0, 0], guess=[1, 1], guess_name="b", label_name="a")
    assert worst_confusions(read_answers(frame), limit=5)[0].guess_key is None


def test_recalls_of_classes_are_those_of_scikit_learn() -> None:
    frame = classification(400, "abcdefgh")
    found = class_recalls(read_answers(frame))
    expected = recall_score(frame["label"], frame["guess"], average=None)
    assert {one.name: one.recall for one in found} == pytest.approx(dict(zip("abcdefgh", expected, strict=True)), abs=1e-12)
    assert [one.recall for one in found] == sorted(one.recall for one in found)


def test_the_dots_of_the_reliability_diagram_are_the_calibration_curve() -> None:
    frame = classification(500)
    right = (frame["guess"] == frame["label"]).to_numpy()
    probability = frame["probability"].to_numpy()
    accuracy, confidence = calibration_curve(right, probability, n_bins=15)
    figure = Page(reliability_diagram([("learned scale", reliability_table(probability, right))]))
    square = figure.all("rect", **{"class": "frame"})[0]
    left, top, side = (float(square[key]) for key in ("x", "y", "width"))
    dots = figure.all("circle")[:-1]  # the last belongs to the legend
    assert [(float(dot["cx"]) - left) / side for dot in dots] == pytest.approx(confidence.tolist(), abs=1e-3)  # 0.1 pixel
    assert [1 - (float(dot["cy"]) - top) / side for dot in dots] == pytest.approx(accuracy.tolist(), abs=1e-3)


def test_rank_bins_sum_to_the_recalls() -> None:
    ranks = (np.random.default_rng(0).pareto(0.5, 500) * 3).astype(int).clip(max=999).tolist()
    bins = rank_histogram(ranks)
    assert [one.last for one in bins][:7] == [1, 5, 10, 20, 50, 100, 200]
    assert sum(one.count for one in bins) == 500
    for index, k in enumerate((1, 5, 10)):
        assert sum(one.count for one in bins[:index + 1]) == sum(rank < k for rank in ranks)
    assert [(one.first, one.last, one.count) for one in rank_histogram([0])] == [(1, 1, 1), (2, 5, 0), (6, 10, 0)]
    assert [one.last for one in rank_histogram([10])] == [1, 5, 10, 20] and [one.last for one in rank_histogram([9])][-1] == 10


def test_bars_are_as_tall_as_their_counts() -> None:
    bars = Page(histogram([("1", 40), ("2-5", 10), ("6-10", 0)], title="t", axis="a", num_strong=1)).all("rect")
    heights = [float(bar["height"]) for bar in bars]
    assert heights[1] == pytest.approx(heights[0] / 4, abs=0.05) and heights[2] == 0
    assert [bar["class"] for bar in bars] == ["bar strong", "bar", "bar"]


def test_an_interval_bar_spans_its_interval() -> None:
    _, interval, mark = Page(interval_bar(0.5, 0.4, 0.7)).all("rect")
    assert (float(interval["x"]), float(interval["width"])) == (40, 30)
    assert float(mark["x"]) == pytest.approx(50, abs=1)
    _, interval, mark = Page(interval_bar(0.0, 0.0, 0.0)).all("rect")
    assert float(mark["x"]) == 0 and float(interval["width"]) > 0  # can be seen


def test_the_surest_answers_come_first_and_ties_go_by_key() -> None:
    frame = classification(4, "ab", probability=[0.5, 0.9, 0.5, 0.7], key=["d", "c", "b", "a"])
    assert [answer.key for answer in surest_first(read_answers(frame))] == ["c", "a", "b", "d"]
