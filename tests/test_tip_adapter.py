"""Tip-Adapter against loops over pictures, and its two weights, which see validation pictures alone."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from clipkit.evaluation.few_shot import draw_shots, few_shot
from clipkit.evaluation.tip_adapter import ALPHAS, BETAS, cache_logits, tip_adapter
from tests.test_linear_probe import data


def slow_logits(image, weight, cached, labels, alpha: float, beta: float) -> list[float]:
    """One picture's score for each class, in float64 and one cached picture at a time."""
    scores = [100 * float(image.double() @ row.double()) for row in weight]
    for picture, label in zip(cached, labels.tolist(), strict=True):
        scores[label] += alpha * math.exp(-beta * (1 - float(image.double() @ picture.double())))
    return scores


def texts(noise: float = 1.0) -> torch.Tensor:
    """(4, 12) class texts that are about right."""
    features, labels = data(400)
    means = torch.stack([features[labels == number].mean(dim=0) for number in range(4)])
    off = torch.randn(means.shape, generator=torch.Generator().manual_seed(5))
    return F.normalize(means - means.mean(dim=0) + noise * 0.05 * off, dim=1)


def test_the_cache_is_that_of_a_loop() -> None:
    features, (cached, labels) = data(20, seed=1)[0], data(40)
    for beta in (0.5, 8.0):
        expected = np.array([slow_logits(image, torch.zeros(4, 12), cached, labels, 1.0, beta) for image in features])
        np.testing.assert_allclose(cache_logits(features, cached, labels, 4, beta).numpy(), expected, rtol=1e-4)  # fp32


def test_the_weights_are_those_of_a_slow_search_on_validation_pictures() -> None:
    train, validation, test = data(16), data(20, seed=2), data(25, seed=1)
    weight = texts(3.0)
    chosen, score = tip_adapter(weight)(train, validation, 4)
    accuracy = {}
    for alpha in ALPHAS:
        for beta in BETAS[::4]:
            guesses = [int(np.argmax(slow_logits(image, weight, *train, alpha, beta))) for image in validation[0]]
            accuracy[alpha, beta] = np.mean(np.array(guesses) == validation[1].numpy())
    own = [int(np.argmax(slow_logits(image, weight, *train, chosen["alpha"], chosen["beta"]))) for image in validation[0]]
    assert np.mean(np.array(own) == validation[1].numpy()) >= max(accuracy.values()) > accuracy[0.0, BETAS[0]]
    expected = [slow_logits(image, weight, *train, chosen["alpha"], chosen["beta"]) for image in test[0]]
    np.testing.assert_allclose(score(test[0]).numpy(), np.array(expected), atol=2e-3)  # fp32 at scores of 100


def test_texts_that_are_always_right_leave_the_cache_aside() -> None:
    weight = F.normalize(torch.eye(4, 12), dim=1)
    images, labels = weight.repeat(5, 1), torch.arange(4).repeat(5)
    chosen, score = tip_adapter(weight)((images, (labels + 1) % 4), (images, labels), 4)  # a cache that is always wrong
    assert chosen == {"alpha": 0.0, "beta": BETAS[0]}
    assert torch.equal(score(images), 100 * images @ weight.T)


def test_draws_are_those_of_few_shot() -> None:
    train, test, weight = data(200), data(300, seed=1), texts()
    found = few_shot(train, test, num_classes=4, fingerprint="toy", shots=(1, 8), num_seeds=3, learn=tip_adapter(weight))
    drawn, held_out = draw_shots(train[1], 8, fingerprint="toy", seed=1)
    chosen, score = tip_adapter(weight)((train[0][drawn], train[1][drawn]), (train[0][held_out], train[1][held_out]), 4)
    assert found[1].chosen[1] == chosen
    assert found[1].accuracies[1] == (score(test[0]).argmax(1) == test[1]).double().mean().item()
    by_text = ((test[0] @ weight.T).argmax(1) == test[1]).double().mean().item()
    assert found[1].accuracy > by_text  # eight pictures a class teach something that these texts leave out


def test_bad_features_are_refused() -> None:
    train, validation = data(24), data(30, seed=2)
    with pytest.raises(ValueError, match="train features hold NaN or infinity"):
        tip_adapter(texts())((train[0] * torch.nan, train[1]), validation, 4)
    with pytest.raises(ValueError, match=r"validation has features \(0, 12\) and 0 labels"):
        tip_adapter(texts())(train, (validation[0][:0], validation[1][:0]), 4)
