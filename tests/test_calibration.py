"""Calibration against torchmetrics and scikit-learn."""

import numpy as np
import pytest
import torch
from sklearn.calibration import calibration_curve
from sklearn.metrics import log_loss
from torch import Tensor
from torchmetrics.functional.classification import multiclass_calibration_error

from clipkit.evaluation.calibration import (
    PAPER_SCALE,
    calibration_error_interval,
    expected_calibration_error,
    fit_scale,
    measure_calibration,
    probabilities_at,
    reliability_table,
    temperature_on_half,
)


@pytest.fixture
def task() -> tuple[Tensor, Tensor]:
    """Similarities (800, 7) whose true scale is 20: the labels are drawn from softmax(20 * similarity)."""
    generator = torch.Generator().manual_seed(0)
    similarity = 0.2 + 0.06 * torch.randn(800, 7, generator=generator)
    return similarity, (20 * similarity).softmax(dim=1).multinomial(1, generator=generator)[:, 0]


@pytest.mark.parametrize("scale", [5.0, 20.0, PAPER_SCALE])
def test_the_measures_are_those_of_torchmetrics_and_scikit_learn(task: tuple[Tensor, Tensor], scale: float) -> None:
    similarity, labels = task
    found = measure_calibration(probabilities_at(similarity, labels, scale))
    probabilities = (similarity.double() * scale).softmax(dim=1)
    expected = multiclass_calibration_error(probabilities, labels, num_classes=7, n_bins=15)
    assert found.ece[0] == pytest.approx(expected.item(), abs=1e-6)
    assert found.nll[0] == pytest.approx(log_loss(labels, probabilities), rel=1e-6)
    one_hot = np.eye(7)[labels]
    assert found.brier[0] == pytest.approx(((probabilities.numpy() - one_hot) ** 2).sum(axis=1).mean(), rel=1e-6)
    for value, low, high in found:
        assert low <= value <= high


def test_the_reliability_table_is_scikit_learns_curve(task: tuple[Tensor, Tensor]) -> None:
    found = probabilities_at(*task, 20.0)
    confidence, hits = found.guess_probability.numpy(), found.hits.numpy()
    table = reliability_table(confidence, hits, num_bins=10)
    accuracy, mean_confidence = calibration_curve(hits, confidence, n_bins=10)
    assert [line.accuracy for line in table] == pytest.approx(accuracy)
    assert [line.confidence for line in table] == pytest.approx(mean_confidence)
    assert sum(line.n for line in table) == 800
    by_hand = sum(line.n * abs(line.accuracy - line.confidence) for line in table) / 800
    assert expected_calibration_error(confidence, hits, num_bins=10) == pytest.approx(by_hand)


def test_probabilities_on_the_edges_of_bins_belong_to_the_lower_bin() -> None:
    table = reliability_table(np.array([0.0, 0.2, 0.4, 1.0]), np.array([False, False, True, True]), num_bins=5)
    assert [(line.low, line.high, line.n) for line in table] == [(0, 0.2, 2), (0.2, 0.4, 1), (0.8, 1, 1)]
    assert expected_calibration_error(np.ones(3), np.ones(3, bool)) == 0


def test_the_interval_of_the_calibration_error_holds_the_true_error() -> None:
    rng, covered = np.random.default_rng(0), 0
    for seed in range(100):
        confidence = rng.uniform(0.3, 1, 2000)
        hits = rng.random(2000) < confidence - 0.1  # the true error is 0.1
        low, high = calibration_error_interval(confidence, hits, seed=seed, num_resamples=200)
        covered += low <= 0.1 <= high
    assert covered >= 88  # 95 expected, standard deviation 2.2


def test_the_interval_of_a_calibrated_model_reaches_to_zero() -> None:
    rng = np.random.default_rng(0)
    confidence = rng.uniform(0.3, 1, 500)
    low, high = calibration_error_interval(confidence, rng.random(500) < confidence)
    assert low == 0 and high > 0.01


def test_the_fitted_scale_is_the_true_one_and_heals_the_other_half(task: tuple[Tensor, Tensor]) -> None:
    similarity, labels = task
    assert fit_scale(similarity, labels) == pytest.approx(20, rel=0.1)  # 800 images
    fitted = temperature_on_half(similarity, labels, scale=PAPER_SCALE)
    assert fitted.n == 400
    assert fitted.after.nll[0] < fitted.before.nll[0] / 2
    assert fitted.after.ece[0] < fitted.before.ece[0] / 4
    assert temperature_on_half(similarity, labels, scale=PAPER_SCALE) == fitted
    assert temperature_on_half(similarity, labels, scale=PAPER_SCALE, seed=1).scale != fitted.scale


def test_constant_similarities_are_at_chance_level() -> None:
    labels = torch.arange(10)
    found = measure_calibration(probabilities_at(torch.full((10, 10), 0.3), labels, PAPER_SCALE))
    assert found.nll[0] == pytest.approx(np.log(10))
    assert found.ece[0] == pytest.approx(0, abs=1e-6)  # a tenth is right, and each has a tenth (fp32)


def test_what_is_no_probability_or_not_finite_is_refused() -> None:
    with pytest.raises(ValueError, match="2 confidences; give at least one, all of them probabilities from 0 to 1"):
        expected_calibration_error(np.array([0.5, 1.1]), np.array([True, False]))
    with pytest.raises(ValueError, match="0 confidences; give at least one"):
        reliability_table(np.array([]), np.array([], bool))
    with pytest.raises(ValueError, match="similarities hold NaN or infinity; the model cannot be measured"):
        probabilities_at(torch.tensor([[torch.nan, 1]]), torch.tensor([0]), 100.0)
    with pytest.raises(ValueError, match="there are 3 images; a temperature fitted on one half and measured on the other"):
        temperature_on_half(torch.rand(3, 2), torch.zeros(3, dtype=torch.int64), scale=100.0)
