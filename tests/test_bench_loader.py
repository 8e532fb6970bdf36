"""The loaders' benchmark: its shards and captions are what it says, and unequal arms give no times."""

from typing import Any

import numpy as np
import pytest

from clipkit.data.tokenize import make_tokenizer
from scripts.bench.loader import compare, race
from scripts.bench.make_shards import digest, make_captions, make_shards


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> list[str]:
    return make_shards(tmp_path_factory.mktemp("bench"), pixels=256, num=16)


class StubArm:
    """Answers with given values; `crop` writes one grey picture."""

    def __init__(self, level: int, ids: list[int], shape: list[int]) -> None:
        self.level, self.ids, self.shape = level, ids, shape

    def ask(self, *, task: str, **request: Any) -> dict[str, Any]:
        if task == "crop":
            np.save(request["out"], np.full((4, 4, 3), self.level, np.uint8))
        return {"box": [0, 0, 4, 4], "tokens": self.ids, "images": self.shape}


def test_a_seed_gives_the_same_shards(shards, tmp_path):
    assert digest(make_shards(tmp_path / "again", pixels=256, num=16)) == digest(shards)
    assert digest(make_shards(tmp_path / "other", pixels=256, num=16, seed=1)) != digest(shards)
    assert len(shards) == 8


@pytest.mark.parametrize(("mix", "mean", "p95"), [("alt-text", 15, 31), ("long", 60, 77), ("full", 77, 77)])
def test_captions_have_the_lengths_of_their_mix(mix, mean, p95):
    ids = make_tokenizer({})(make_captions(mix, 1000))
    lengths = (ids != 0).sum(dim=1).double()
    assert abs(lengths.mean().item() - mean) < 1
    assert abs(np.quantile(lengths, 0.95) - p95) <= 2
    assert make_captions(mix, 5) == make_captions(mix, 5) != make_captions(mix, 5, seed=1)


def test_an_unknown_mix_of_captions_is_refused():
    with pytest.raises(ValueError, match="the mix of captions is 'short'; choose one of"):
        make_captions("short", 1)


@pytest.mark.parametrize(("level", "ids"), [(9, [1]), (10, [2])])
def test_arms_that_differ_in_pixels_or_ids_give_no_times(shards, tmp_path, level, ids):
    equal: Any = {"ours": StubArm(10, [1], [1]), "peer": StubArm(10, [1], [1])}
    assert compare(equal, shards, tmp_path)["mean_absolute_levels"] == 0
    with pytest.raises(ValueError, match=r"the times are not comparable"):
        compare(equal | {"peer": StubArm(level, ids, [1])}, shards, tmp_path)


def test_arms_with_batches_of_two_shapes_give_no_times(shards):
    arms: Any = {"ours": StubArm(0, [], [64]), "peer": StubArm(0, [], [32])}
    with pytest.raises(ValueError, match="they must be alike to be compared"):
        race(arms, shards, 1, rounds=1)
