"""The vote of the nearest pictures against scikit-learn, and its two settings, which see validation pictures alone."""

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from clipkit.evaluation.knn import NEIGHBOURS, TEMPERATURES, nearest, nearest_vote, weighted_votes
from clipkit.evaluation.linear_probe import VALIDATION_SHARE, stratified_split
from tests.test_linear_probe import data


def scikit_learns(train, queries, k: int, temperature: float) -> np.ndarray:
    """(Q, C) shares of the votes."""
    judge = KNeighborsClassifier(k, metric="cosine", algorithm="brute",
                                 weights=lambda distance: np.exp((1 - distance) / temperature))
    return judge.fit(train[0].double().numpy(), train[1].numpy()).predict_proba(queries.double().numpy())


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (5, 0.07), (20, 0.01), (200, 0.2)])
def test_votes_are_scikit_learns(k: int, temperature: float) -> None:
    train, queries = data(300), data(80, seed=1)[0]
    likeness, index = nearest(queries, train[0], k)
    votes = weighted_votes(likeness, train[1][index], 4, temperature)
    # fp32 cosines are off by 1e-7, which the lowest temperature makes 1e-5.
    np.testing.assert_allclose(votes.numpy(), scikit_learns(train, queries, k, temperature), atol=1e-4)


def test_the_whole_choice_is_that_of_a_slow_search() -> None:
    train, test = data(250, noise=2.0), data(300, seed=1, noise=2.0)
    kept, taken = stratified_split(train[1], VALIDATION_SHARE)
    tried = {}
    for k in (k for k in NEIGHBOURS if k <= len(kept)):
        for temperature in TEMPERATURES:
            votes = scikit_learns((train[0][kept], train[1][kept]), train[0][taken], k, temperature)
            tried[k, temperature] = (votes.argmax(axis=1) == train[1][taken].numpy()).mean()
    found = nearest_vote(train, test, num_classes=4)
    assert {(k, temperature): accuracy for k, temperature, accuracy in found.curve} == pytest.approx(tried)
    assert tried[found.num_neighbours, found.temperature] == max(tried.values())
    expected = scikit_learns(train, test[0], found.num_neighbours, found.temperature)  # of all of train
    np.testing.assert_allclose(found.votes.numpy(), expected, atol=1e-4)
    assert (found.votes.argmax(1) == test[1]).double().mean() > 0.5 and found.num_validation == len(taken)


def test_the_test_pictures_have_no_part_in_the_choice() -> None:
    train, test = data(200), data(100, seed=1)
    found = nearest_vote(train, test, num_classes=4)
    other = nearest_vote(train, (test[0], (test[1] + 1) % 4), num_classes=4)
    assert (other.num_neighbours, other.temperature, other.curve) == (found.num_neighbours, found.temperature, found.curve)
    assert torch.equal(other.votes, found.votes)


def test_of_equally_alike_pictures_the_first_are_taken_in_chunks_of_any_size() -> None:
    train = data(30)[0]
    twice = torch.cat([train, train])  # each picture has a double
    queries = data(50, seed=1)[0]
    likeness, index = nearest(queries, twice, 3)
    scores = (queries @ twice.T).numpy()
    expected = [sorted(range(60), key=lambda place, row=row: (-row[place], place))[:3] for row in scores]
    assert index.tolist() == expected and (likeness.diff(dim=1) <= 0).all()
    assert torch.equal(nearest(queries, twice, 3, chunk_size=7)[1], index)
    same = nearest(queries, train[:1].expand(5, -1), 4)[1]
    assert torch.equal(same, torch.arange(4).expand(50, 4))


def test_constant_features_are_at_chance_level() -> None:
    labels = torch.arange(4).repeat(25)
    constant = torch.nn.functional.normalize(torch.ones(100, 8), dim=1)
    votes = nearest_vote((constant, labels), (constant, labels), num_classes=4).votes
    assert (votes.argmax(1) == labels).double().mean() == 0.25


def test_what_cannot_vote_is_refused() -> None:
    train, test = data(40), data(20, seed=1)
    with pytest.raises(ValueError, match="no class has more than 2 training images, and k is chosen on a fifth of them"):
        nearest_vote((train[0][:4], torch.arange(4)), test, num_classes=4)
    with pytest.raises(ValueError, match="train features hold NaN or infinity"):
        nearest_vote((train[0] * torch.nan, train[1]), test, num_classes=4)
    with pytest.raises(ValueError, match="test labels go from 0 to 3; with 3 classes they must lie in 0 to 2"):
        nearest_vote((train[0], train[1].clamp(max=2)), test, num_classes=3)
