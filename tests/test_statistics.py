"""Intervals against scipy, and their limit cases."""

import numpy as np
import pytest
import torch
from scipy.stats import binomtest, bootstrap, quantile_test, ttest_1samp
from sklearn.metrics import balanced_accuracy_score

from clipkit.evaluation import statistics
from clipkit.evaluation.statistics import (
    Z_95,
    average_interval,
    bca_interval,
    clustered_bootstrap_interval,
    clustered_interval,
    mean_interval,
    mean_per_class_recall,
    mean_per_class_recall_interval,
    median_interval,
    wilson_interval,
)


@pytest.mark.parametrize(("hits", "n"), [(0, 10), (10, 10), (1, 3), (400, 1358), (49_999, 50_000)])
def test_the_wilson_interval_is_scipys(hits: int, n: int) -> None:
    expected = binomtest(hits, n).proportion_ci(0.95, method="wilson")
    assert wilson_interval(hits / n, n) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_an_interval_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="n is 0; an interval needs at least one trial"):
        wilson_interval(0.0, 0)


def test_clusters_of_one_give_the_plain_interval() -> None:
    hits = torch.rand(200, generator=torch.Generator().manual_seed(0)) < 0.3
    plain = wilson_interval(hits.double().mean().item(), 200)
    assert clustered_interval(hits, torch.arange(200)) == pytest.approx(plain)


def test_repeated_trials_count_once() -> None:
    hits = torch.rand(200, generator=torch.Generator().manual_seed(0)) < 0.3
    once = clustered_interval(hits, torch.arange(200))
    five_times = clustered_interval(hits.repeat_interleave(5), torch.arange(200).repeat_interleave(5))
    assert five_times == pytest.approx(once)


def test_a_clustered_interval_of_hits_alone_is_that_of_the_clusters() -> None:
    hits, clusters = torch.ones(50, dtype=torch.bool), torch.arange(10).repeat_interleave(5)
    assert clustered_interval(hits, clusters) == wilson_interval(1.0, 10)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def captions_of_images(rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Hits of 300 images with 1 to 6 captions each; the captions of an image are alike."""
    clusters = np.repeat(np.arange(300), rng.integers(1, 7, 300))
    hits = rng.random(len(clusters)) < rng.beta(1, 2, 300)[clusters]
    return torch.from_numpy(hits), torch.from_numpy(clusters)


def test_the_closed_form_for_clusters_agrees_with_their_bootstrap(rng: np.random.Generator) -> None:
    hits, clusters = captions_of_images(rng)
    closed, resampled = clustered_interval(hits, clusters), clustered_bootstrap_interval(hits, clusters, num_resamples=8000)
    width = closed[1] - closed[0]
    assert resampled == pytest.approx(closed, abs=0.08 * width)  # Monte Carlo error of a bound is 0.02 of the width
    assert width > 1.2 * np.diff(wilson_interval(hits.double().mean().item(), len(hits)))[0]


def test_the_bootstrap_is_scipys(rng: np.random.Generator) -> None:
    values = rng.lognormal(size=50)
    expected = bootstrap((values,), np.mean, method="BCa", n_resamples=20_000, rng=rng).confidence_interval
    found = bca_interval(lambda weights: weights @ values / weights.sum(axis=1), np.ones(50, int), num_resamples=20_000)
    assert found == pytest.approx((expected.low, expected.high), abs=0.05 * (expected.high - expected.low))


def test_trials_that_are_alike_may_be_given_as_counts(rng: np.random.Generator) -> None:
    kinds, counts = np.array([0.0, 1.0, 5.0]), np.array([60, 30, 10])
    found = bca_interval(lambda weights: weights @ kinds / weights.sum(axis=1), counts, num_resamples=20_000)
    one_by_one = np.repeat(kinds, counts)
    expected = bca_interval(lambda weights: weights @ one_by_one / 100, np.ones(100, int), num_resamples=20_000)
    assert found == pytest.approx(expected, abs=0.05 * (expected[1] - expected[0]))


def test_leaving_out_groups_of_many_trials_gives_nearly_the_interval_of_leaving_out_each(
        rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    values = rng.lognormal(size=1500)
    grouped = bca_interval(lambda weights: weights @ values / 1500, np.ones(1500, int))
    monkeypatch.setattr(statistics, "MAX_EXACT_JACKKNIFE", 2000)
    each = bca_interval(lambda weights: weights @ values / 1500, np.ones(1500, int))
    assert grouped == pytest.approx(each, abs=0.03 * (each[1] - each[0]))


def test_the_bootstrap_is_the_same_each_time_and_differs_with_the_seed(rng: np.random.Generator) -> None:
    labels, guesses = rng.integers(5, size=(2, 100))
    first = mean_per_class_recall_interval(labels, guesses)
    assert mean_per_class_recall_interval(labels, guesses) == first
    assert mean_per_class_recall_interval(labels, guesses, seed=1) != first


def test_the_mean_per_class_recall_is_scikit_learns_balanced_accuracy(rng: np.random.Generator) -> None:
    labels = rng.choice([0, 1, 2, 5], size=400, p=[0.6, 0.3, 0.08, 0.02])  # classes 3 and 4 have no image
    guesses = np.where(rng.random(400) < 0.5, labels, rng.choice([0, 1, 2, 5], size=400))
    assert mean_per_class_recall(labels, guesses) == pytest.approx(balanced_accuracy_score(labels, guesses), abs=1e-12)
    low, high = mean_per_class_recall_interval(labels, guesses, num_resamples=4000)
    weight = 1 / np.bincount(labels)[labels]
    scipys = bootstrap((labels == guesses, weight), lambda hits, weight: (hits * weight).sum() / weight.sum(),
                       paired=True, vectorized=False, n_resamples=1000, method="BCa", rng=rng).confidence_interval
    assert (low, high) == pytest.approx(tuple(scipys), abs=0.1 * (high - low))  # 1000 resamples: 0.05 of the width


def test_on_a_balanced_set_the_mean_per_class_recall_is_the_accuracy(rng: np.random.Generator) -> None:
    labels, guesses = np.repeat(np.arange(10), 30), rng.integers(10, size=300)
    assert mean_per_class_recall(labels, guesses) == pytest.approx((labels == guesses).mean(), abs=1e-12)


def test_with_one_image_a_class_the_recall_interval_is_that_of_the_accuracy() -> None:
    labels = np.arange(300)
    guesses = np.where(labels < 90, labels, 0)  # 90 of 300 right
    found = mean_per_class_recall_interval(labels, guesses)
    assert found == pytest.approx(wilson_interval(0.3, 300), abs=0.005)  # two kinds of interval, a tenth of the width


def test_the_recall_interval_of_hits_alone_is_wilsons() -> None:
    labels = np.arange(20) % 4
    assert mean_per_class_recall_interval(labels, labels) == wilson_interval(1.0, 20)


def test_labels_without_a_guess_are_refused() -> None:
    with pytest.raises(ValueError, match="there are 3 labels and 2 guesses; give one guess for each label"):
        mean_per_class_recall(np.zeros(3, int), np.zeros(2, int))


def test_the_interval_of_a_mean_is_scipys(rng: np.random.Generator) -> None:
    values = rng.random(7)
    expected = ttest_1samp(values, 0).confidence_interval(0.95)
    assert mean_interval(values) == pytest.approx((expected.low, expected.high))
    with pytest.raises(ValueError, match="there are 1 values; the interval of a mean needs at least 2"):
        mean_interval([0.5])


@pytest.mark.parametrize("n", [6, 9, 10, 101, 1000])
def test_the_interval_of_a_median_is_scipys(n: int, rng: np.random.Generator) -> None:
    values = rng.integers(0, 50, n)
    expected = quantile_test(values, q=0, p=0.5).confidence_interval(0.95)
    assert median_interval(torch.from_numpy(values)) == (expected.low, expected.high)


def test_a_median_of_repeated_ranks_is_as_sure_as_that_of_the_ranks_once(rng: np.random.Generator) -> None:
    values, clusters = torch.from_numpy(rng.permutation(100)), torch.arange(100)
    low, high = median_interval(values)
    repeated = median_interval(values.repeat_interleave(5), clusters.repeat_interleave(5))
    assert repeated == pytest.approx((low, high), abs=1)  # the rank of a bound, rounded
    assert median_interval(values.repeat_interleave(5)) > (low, 0)  # without clusters: too narrow
    assert median_interval(torch.tensor([3])) == (3, 3)
    with pytest.raises(ValueError, match="there are 0 values; the interval of a median needs at least one"):
        median_interval(torch.tensor([]))


def test_the_average_of_a_suite_propagates_standard_errors() -> None:
    errors = np.array([0.01, 0.02, 0.005])
    values = np.array([0.5, 0.7, 0.1])
    average, low, high = average_interval(list(zip(values, values - Z_95 * errors, values + Z_95 * errors, strict=True)))
    assert average == pytest.approx(1.3 / 3)
    assert high - average == pytest.approx(Z_95 * np.sqrt((errors**2).sum()) / 3)
    assert average - low == pytest.approx(high - average)
    assert average_interval([(1.0, 0.9, 1.0)]) == (1.0, pytest.approx(0.9), 1.0)
    with pytest.raises(ValueError, match="there are 0 results; an average needs at least one"):
        average_interval([])


def test_the_interval_of_a_paired_difference_is_scipys(rng: np.random.Generator) -> None:
    a, b = rng.random(300) < 0.7, rng.random(300) < 0.6
    differences = a.astype(int) - b.astype(int)
    expected = bootstrap((differences,), np.mean, method="BCa", n_resamples=4000, rng=rng).confidence_interval
    found = statistics.difference_interval(differences, np.ones(300))
    assert found == pytest.approx(tuple(expected), abs=0.01)  # 2000 resamples: a tenth of the width
    assert statistics.difference_interval(np.zeros(98), np.ones(98)) == pytest.approx((-0.0277, 0.0277), abs=1e-4)
