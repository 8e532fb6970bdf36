"""The linear probe against scikit-learn, its search against the whole grid, and few-shot draws."""

import warnings

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from clipkit.evaluation import linear_probe as module
from clipkit.evaluation.few_shot import draw_shots, few_shot
from clipkit.evaluation.linear_probe import (
    ProbeProblem,
    linear_probe,
    regularisation_at,
    search_regularisation,
    stratified_split,
)
from clipkit.evaluation.statistics import mean_interval


def data(n: int, *, num_classes: int = 4, dim: int = 12, seed: int = 0, noise: float = 1.0) -> tuple[Tensor, Tensor]:
    """Unit-norm features around a common mean and one centre a class, fp32, and labels."""
    centres = torch.randn(num_classes, dim, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(num_classes, (n,), generator=generator)
    features = centres[labels] + noise * torch.randn(n, dim, generator=generator) + 2
    return features / features.norm(dim=1, keepdim=True), labels


def scikit_learns(train: tuple[Tensor, Tensor], regularisation: float) -> LogisticRegression:
    probe = LogisticRegression(C=1 / regularisation, tol=1e-9, max_iter=20_000)
    return probe.fit(train[0].double().numpy(), train[1].numpy())


@pytest.mark.parametrize("regularisation", [100.0, 1.0, 0.01])
@pytest.mark.parametrize(("n", "num_classes", "dim"), [(300, 4, 12), (40, 3, 64)])
def test_the_fit_is_scikit_learns(n: int, num_classes: int, dim: int, regularisation: float) -> None:
    train = data(n, num_classes=num_classes, dim=dim)
    expected = scikit_learns(train, regularisation)
    found = ProbeProblem(*train, num_classes).fit(regularisation)
    assert found.converged
    size = np.abs(expected.coef_).max()
    np.testing.assert_allclose(found.weight.numpy(), expected.coef_, atol=1e-3 * size)
    np.testing.assert_allclose(found.bias.numpy(), expected.intercept_, atol=1e-3 * size)
    np.testing.assert_allclose(found.logits(train[0]).softmax(dim=1).numpy(),
                               expected.predict_proba(train[0].double().numpy()), atol=1e-4)


def test_two_classes_are_penalised_as_in_scikit_learn() -> None:
    train = data(200, num_classes=2)
    expected = scikit_learns(train, 0.5)
    weights = ProbeProblem(*train, 2).fit(0.5)
    np.testing.assert_allclose((weights.weight[1] - weights.weight[0]).numpy(), expected.coef_[0], atol=1e-3)
    np.testing.assert_allclose(float(weights.bias[1] - weights.bias[0]), expected.intercept_[0], atol=1e-3)


def test_single_precision_and_chunks_give_nearly_the_same_classifier(monkeypatch: pytest.MonkeyPatch) -> None:
    train, test = data(1500), data(2000, seed=1)
    exact = ProbeProblem(*train, 4).fit(0.1)
    monkeypatch.setattr(module, "FLOAT64_BELOW", 0)
    monkeypatch.setattr(module, "CHUNK_LOGITS", 1000)
    quick = ProbeProblem(*train, 4).fit(0.1)
    assert float((quick.weight - exact.weight).norm() / exact.weight.norm()) < 0.01  # the tolerance of single precision
    assert (quick.logits(test[0]).argmax(1) == exact.logits(test[0]).argmax(1)).double().mean() >= 0.999


@pytest.mark.parametrize("float64_below", [0, 2**24])
def test_the_strongest_regularisation_gives_the_classifier_of_class_means(
        monkeypatch: pytest.MonkeyPatch, float64_below: int) -> None:
    monkeypatch.setattr(module, "FLOAT64_BELOW", float64_below)
    features = torch.cat([data(400)[0][data(400)[1] == number][:50] for number in range(4)])
    labels, test = torch.arange(4).repeat_interleave(50), data(500, seed=1)[0]
    means = features.double().view(4, 50, -1).mean(dim=1)  # (C, D)
    expected = ((test - means.mean(dim=0)) @ (means - means.mean(dim=0)).T).argmax(dim=1)
    guesses = ProbeProblem(features, labels, 4).fit(1e6).logits(test).argmax(dim=1)
    assert (guesses == expected).double().mean() >= 0.998


def test_where_a_fit_starts_does_not_move_its_solution() -> None:
    train = data(300)
    cold = ProbeProblem(*train, 4).fit(0.01)
    warm = ProbeProblem(*train, 4).fit(0.01, start=ProbeProblem(*data(100, seed=5), 4).fit(1.0))
    torch.testing.assert_close(warm.weight, cold.weight, atol=1e-3, rtol=1e-3)


def test_the_search_tries_the_papers_values_and_finds_the_best_of_the_whole_grid() -> None:
    train, validation = data(120, noise=2.0), data(400, seed=1, noise=2.0)
    best, curve, _ = search_regularisation(train, validation, num_classes=4)
    tried = dict(curve)
    assert set(np.logspace(-6, 6, 7).round(9)) <= {round(value, 9) for value in tried}
    assert len(tried) <= 15 and list(tried) == sorted(tried)
    assert tried[best] == max(tried.values())
    assert best == max(value for value, accuracy in curve if accuracy == tried[best])  # of equals the strongest
    neighbours = [round(8 * np.log10(best)) + side for side in (-1, 1)]
    assert {round(8 * np.log10(value)) for value in tried} >= set(neighbours)
    problem = ProbeProblem(*train, 4)
    whole = [(problem.fit(regularisation_at(step)).logits(validation[0]).argmax(1) == validation[1]).double().mean().item()
             for step in range(24, 97, 4)]
    assert tried[best] >= max(whole) - 0.01


def test_the_grid_goes_from_a_millionth_to_a_million() -> None:
    grid = [regularisation_at(step) for step in range(97)]
    assert (grid[0], grid[48], grid[96]) == (1e-6, 1, 1e6)
    np.testing.assert_allclose(grid, np.logspace(-6, 6, 97))


def test_the_probe_fits_train_and_validation_together_and_tests_once() -> None:
    train, validation, test = data(300), data(100, seed=1), data(500, seed=2)
    found = linear_probe(train, test, num_classes=4, validation=validation)
    both = torch.cat([train[0], validation[0]]), torch.cat([train[1], validation[1]])
    expected = scikit_learns(both, found.regularisation)
    assert found.accuracy == pytest.approx(expected.score(test[0].double().numpy(), test[1].numpy()), abs=1e-3)
    assert (found.guesses == test[1]).double().mean().item() == found.accuracy
    np.testing.assert_allclose(found.logits.softmax(1), expected.predict_proba(test[0].double().numpy()), atol=1e-3)
    assert (found.n, found.num_validation) == (500, 100)
    worse = linear_probe(train, (test[0], test[1].flip(0)), num_classes=4, validation=validation)
    assert (worse.regularisation, worse.curve) == (found.regularisation, found.curve)  # test labels choose nothing


def test_the_validation_images_depend_on_the_labels_alone() -> None:
    labels = torch.tensor([0] * 50 + [1] * 10 + [2] * 3 + [3])
    kept, taken = stratified_split(labels, 0.2)
    assert torch.bincount(labels[taken], minlength=4).tolist() == [10, 2, 1, 0]
    assert sorted([*kept.tolist(), *taken.tolist()]) == list(range(64))
    torch.manual_seed(5)
    assert torch.equal(stratified_split(labels, 0.2)[1], taken)
    labels[0] = 1
    assert not torch.equal(stratified_split(labels, 0.2)[1], taken)


def test_constant_features_are_at_chance_level() -> None:
    labels = torch.arange(100) % 5
    found = linear_probe((torch.full((100, 8), 0.3), labels), (torch.full((50, 8), 0.3), labels[:50]), num_classes=5)
    assert found.accuracy == 0.2
    torch.testing.assert_close(found.logits.softmax(1), torch.full((50, 5), 0.2).double())


def test_a_rotation_of_the_features_changes_nothing() -> None:
    train, test = data(200), data(100, seed=1)
    rotation = torch.linalg.qr(torch.randn(12, 12, generator=torch.Generator().manual_seed(0))).Q
    plain = ProbeProblem(*train, 4).fit(0.1).logits(test[0])
    turned = ProbeProblem(train[0] @ rotation, train[1], 4).fit(0.1).logits(test[0] @ rotation)
    torch.testing.assert_close(turned, plain, atol=1e-3, rtol=1e-3)


def test_a_class_without_training_images_is_never_guessed() -> None:
    train, test = data(100), data(50, seed=1)
    weights = ProbeProblem(*train, 6).fit(1.0)
    assert weights.bias[4:].tolist() == [-torch.inf] * 2
    torch.testing.assert_close(weights.logits(test[0])[:, :4], ProbeProblem(*train, 4).fit(1.0).logits(test[0]))


def test_bad_features_and_labels_are_refused() -> None:
    train, test = data(50), data(20, seed=1)
    with pytest.raises(ValueError, match="test features hold NaN or infinity; the model cannot be measured"):
        linear_probe(train, (test[0] / 0, test[1]), num_classes=4)
    with pytest.raises(ValueError, match="train features hold NaN or infinity"):
        linear_probe((train[0] * torch.nan, train[1]), test, num_classes=4)
    with pytest.raises(ValueError, match="train labels go from 0 to 3; with 3 classes they must lie in 0 to 2"):
        linear_probe(train, (test[0], test[1] % 3), num_classes=3)
    with pytest.raises(ValueError, match=r"train has features \(50, 12\) and 49 labels; give at least one row of features"):
        linear_probe((train[0], train[1][1:]), test, num_classes=4)
    with pytest.raises(ValueError, match="train has images of 1 class; a probe needs at least 2"):
        ProbeProblem(train[0], train[1] * 0, 4)
    with pytest.raises(ValueError, match=r"validation has features \(0, 12\) and 0 labels; give at least one row"):
        linear_probe((train[0][:4], torch.arange(4)), test, num_classes=4)


def test_shots_are_drawn_by_data_k_and_seed() -> None:
    labels = torch.tensor([0] * 30 + [1] * 9 + [2] * 3)
    drawn, held_out = draw_shots(labels, 8, fingerprint="flowers", seed=0)
    assert torch.bincount(labels[drawn]).tolist() == [8, 8, 3]
    assert torch.bincount(labels[held_out], minlength=3).tolist() == [4, 1, 0]
    assert not set(drawn.tolist()) & set(held_out.tolist())
    assert torch.equal(draw_shots(labels, 8, fingerprint="flowers", seed=0)[0], drawn)
    for other in ({"fingerprint": "flowers", "seed": 1}, {"fingerprint": "pets", "seed": 0}):
        assert not torch.equal(draw_shots(labels, 8, **other)[0], drawn)


def test_few_shots_give_means_over_draws_that_rise_with_k() -> None:
    train, test = data(200), data(300, seed=1)
    results = few_shot(train, test, num_classes=5, fingerprint="toy", shots=(1, 8), num_seeds=3)
    one, eight = results
    assert (one.shots, eight.shots, eight.n) == (1, 8, 300)
    assert one.accuracy < eight.accuracy
    assert one.accuracy == pytest.approx(np.mean(one.accuracies))
    low, high = mean_interval(one.accuracies)
    assert (one.ci_low, one.ci_high) == (max(low, 0), min(high, 1))
    assert (one.short_classes, one.num_without_validation) == ((4,), 1)  # class 4 has no image
    drawn, _ = draw_shots(train[1], 8, fingerprint="toy", seed=1)
    assert eight.chosen[1]["regularisation"] < 100  # scikit-learn's own bias does not converge at the strongest
    expected = scikit_learns((train[0][drawn], train[1][drawn]), eight.chosen[1]["regularisation"])
    assert eight.accuracies[1] == pytest.approx(expected.score(test[0].double().numpy(), test[1].numpy()), abs=0.004)


def test_bad_requests_for_few_shots_are_refused() -> None:
    train, test = data(40), data(20, seed=1)
    most = int(torch.bincount(train[1]).max())
    with pytest.raises(ValueError, match="num_seeds is 1; an interval over draws needs at least 2"):
        few_shot(train, test, num_classes=4, fingerprint="", num_seeds=1)
    with pytest.raises(ValueError, match=r"shots is \[0, 1\]; give numbers of images a class, each at least 1"):
        few_shot(train, test, num_classes=4, fingerprint="", shots=(0, 1))
    with pytest.raises(ValueError, match=f"no class has more than {most} training images; {most} shots and one to choose"):
        few_shot(train, test, num_classes=4, fingerprint="", shots=(most,))
    with pytest.raises(ValueError, match="test features hold NaN or infinity"):
        few_shot(train, (test[0] * torch.inf, test[1]), num_classes=4, fingerprint="")


def test_nothing_is_warned_about() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        linear_probe(data(60), data(20, seed=1), num_classes=4)
