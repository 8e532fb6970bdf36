"""Average precision and AUROC against scikit-learn, and cases worked by hand."""

import numpy as np
import pytest
from scipy.special import log_softmax
from scipy.stats import bootstrap
from sklearn.metrics import average_precision_score, roc_auc_score

from clipkit.evaluation.multi_label import auroc, average_precision, multi_label_scores


@pytest.fixture
def task() -> tuple[np.ndarray, np.ndarray]:
    """Similarities (120, 6), coarse so that many tie, and targets; class 4 has no positive, class 5 nothing else."""
    rng = np.random.default_rng(0)
    targets = rng.random((120, 6)) < [0.5, 0.2, 0.1, 0.05, 0, 2]
    return (rng.normal(size=(120, 6)) + targets).round(1) / 50, targets


def test_the_scores_are_scikit_learns_also_where_similarities_tie(task: tuple[np.ndarray, np.ndarray]) -> None:
    similarity, targets = task
    precise, area = average_precision(similarity, targets), auroc(similarity, targets)
    for c in range(4):
        assert precise[c] == pytest.approx(average_precision_score(targets[:, c], similarity[:, c]), abs=1e-12)
        assert area[c] == pytest.approx(roc_auc_score(targets[:, c], similarity[:, c]), abs=1e-12)
    found = multi_label_scores(similarity, targets, ranking="similarity", num_resamples=200)
    assert found.macro_auroc == pytest.approx(roc_auc_score(targets[:, :4], similarity[:, :4], average="macro"))
    assert found.micro_auroc == pytest.approx(roc_auc_score(targets.ravel(), similarity.ravel()))
    assert found.mean_average_precision == pytest.approx(np.mean([*precise[:4], 1]))


def test_classes_that_cannot_be_measured_are_left_out_and_counted(task: tuple[np.ndarray, np.ndarray]) -> None:
    found = multi_label_scores(*task, num_resamples=100)
    assert (found.num_without_positives, found.num_without_auroc, found.n) == (1, 2, 120)
    assert np.flatnonzero(np.isnan(found.average_precision)).tolist() == [4]
    assert np.flatnonzero(np.isnan(found.auroc)).tolist() == [4, 5]


def test_the_order_of_images_that_tie_has_no_part() -> None:
    scores, targets = np.zeros((10, 1)), np.arange(10)[:, None] < 3
    assert average_precision(scores, targets) == average_precision(scores, targets[::-1]) == pytest.approx(0.3)
    assert auroc(scores, targets) == 0.5


def test_eleven_points_are_those_of_the_voc_development_kit(task: tuple[np.ndarray, np.ndarray]) -> None:
    ranked = np.array([[0.9], [0.8], [0.7], [0.6], [0.5]])
    # Precisions at the positives: 1, 2/3, 3/5 at recalls 1/3, 2/3, 1: four, three and four of the eleven points.
    by_hand = average_precision(ranked, np.array([[1], [0], [1], [0], [1]], bool), points="11")[0]
    assert by_hand == pytest.approx((4 * 1 + 3 * 2 / 3 + 4 * 3 / 5) / 11)
    scores = task[0] + np.random.default_rng(1).normal(size=(120, 6)) * 1e-6  # the kit knows no ties
    for c in range(4):
        right = task[1][np.argsort(-scores[:, c]), c]
        recall, precision = right.cumsum() / right.sum(), right.cumsum() / np.arange(1, 121)
        kit = np.mean([precision[recall >= tenth / 10 - 1e-9].max() for tenth in range(11)])
        assert average_precision(scores, task[1], points="11")[c] == pytest.approx(kit)


def test_the_softmax_over_classes_comes_before_the_ranking_of_images(task: tuple[np.ndarray, np.ndarray]) -> None:
    similarity, targets = task
    found = multi_label_scores(similarity, targets, scale=50.0, num_resamples=100)
    expected = average_precision_score(targets[:, 0], log_softmax(50 * similarity, axis=1)[:, 0])
    assert found.average_precision[0] == pytest.approx(expected)
    # A shift of all of an image's similarities moves its place in the plain ranking alone.
    shifted = similarity + np.random.default_rng(2).normal(size=(120, 1))
    assert multi_label_scores(shifted, targets, scale=50.0, num_resamples=100).average_precision == pytest.approx(
        found.average_precision, nan_ok=True)


@pytest.mark.parametrize("points", ["all", "11"])
def test_the_interval_is_that_of_scipys_bootstrap_over_images(points: str) -> None:
    rng = np.random.default_rng(3)
    targets = rng.random((60, 2)) < 0.4
    scores = rng.normal(size=(60, 2)) + targets
    found = multi_label_scores(scores, targets, ranking="similarity", points=points, num_resamples=4000)

    def mean_of(images: np.ndarray) -> float:
        return average_precision(scores[images], targets[images], points=points).mean()

    expected = bootstrap((np.arange(60),), mean_of, vectorized=False, n_resamples=600, method="BCa",
                         rng=rng).confidence_interval
    width = found.ci_high - found.ci_low
    assert (found.ci_low, found.ci_high) == pytest.approx(tuple(expected), abs=0.15 * width)  # 600 resamples: 0.06


def test_bad_choices_and_arrays_are_refused(task: tuple[np.ndarray, np.ndarray]) -> None:
    similarity, targets = task
    with pytest.raises(ValueError, match=r"ranking is 'sigmoid'; choose one of \['softmax', 'similarity'\]"):
        multi_label_scores(similarity, targets, ranking="sigmoid")
    with pytest.raises(ValueError, match=r"points is '12'; choose one of \['all', '11'\]"):
        multi_label_scores(similarity, targets, points="12")
    with pytest.raises(ValueError, match=r"similarity \(120, 6\) and targets \(120, 5\) must have one shape: images x classes"):
        multi_label_scores(similarity, targets[:, :5])
    with pytest.raises(ValueError, match="similarities hold NaN or infinity"):
        multi_label_scores(np.full((120, 6), np.inf), targets)
    with pytest.raises(ValueError, match="no image has a right class; average precision needs at least one positive"):
        multi_label_scores(similarity, targets & False)
