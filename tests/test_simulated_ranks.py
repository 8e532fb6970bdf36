"""Thousands of ranks and shards in one process: whole epochs, any number of ranks, exact resume, sources mixed and counted."""

import dataclasses
import json
import random
from collections import Counter
from pathlib import Path

import pytest
import torch

from clipkit.data import lanes as lanes_module
from clipkit.data.lanes import Lane
from clipkit.data.loader import DataError, TrainLoader, make_train_loader
from clipkit.data.samples import PictureExamples
from clipkit.data.shards import BadSample, RawSample
from clipkit.training.meter import Meter
from scripts.simulate_ranks import check_epochs, check_ranks, global_batch, make_ranks, simulate, simulated_data
from tests.test_loader import DATA, assert_same, make, make_source, png, steps, tokenize


@pytest.mark.parametrize(("shards", "lanes", "block"), [(1000, 64, 4), (70, 64, 3), (1000, 1, 512), (6, 8, 4)])
def test_every_sample_comes_once_an_epoch_over_all_lanes(shards, lanes, block):
    assert check_epochs([str(shard) for shard in range(shards)], lanes=lanes, block_samples=block) > 0


def test_hundreds_of_ranks_have_the_batches_of_one_and_resume_on_others():
    lines = []
    simulate(simulated_data(), num_shards=2000, lanes=256, worlds=[1, 2, 64, 256], num_steps=5, say=lines.append)
    assert len(lines) == 6


def test_a_wrong_order_is_noticed():
    data, shards = simulated_data(), [str(shard) for shard in range(64)]
    one = make_ranks(data, shards, lanes=16, world_size=1)
    batches = [global_batch(one) for _ in range(4)]
    wrong = [*batches[:3], batches[3].flip(0)]
    with pytest.raises(AssertionError, match="another batch at step 3"):
        check_ranks(data, shards, wrong, lanes=16, world_size=4, resumed_on=2, rng=random.Random(0))


def test_the_order_of_100_000_shards_is_made_once_for_all_lanes_and_cheap_to_hold():
    lanes_module._everyones_order.cache_clear()
    one = make_ranks(simulated_data(), [str(shard) for shard in range(100_000)], lanes=64, world_size=1)[0]
    next(one)
    info = lanes_module._everyones_order.cache_info()
    assert (info.misses, info.hits) == (1, 63)
    assert lanes_module._everyones_order(1, 0, 0, 100_000).itemsize == 4


@pytest.mark.slow
def test_4096_ranks_over_100_000_shards():
    torch.set_num_threads(1)
    simulate(simulated_data(), num_shards=100_000, lanes=4096, worlds=[1, 2, 64, 4096], num_steps=8)


def many_sources(count: int, shards_each: int) -> list[list[str]]:
    return [[f"{source}/{shard}" for shard in range(shards_each)] for source in range(count)]


def read_simulated(url: str, *, keep):
    """Three samples a shard; the second of source 1 is bad, and every tenth shard of source 2 is unreadable."""
    source, shard = map(int, url.split("/"))
    if source == 2 and shard % 10 == 0:
        yield -1, BadSample("unreadable shard", url, None, "503")
        return
    for number in range(3):
        text = None if (source, number) == (1, 1) else b"text"
        yield number, RawSample(f"{shard}_{number}", url, png(number), "png", text, None, None) if keep(number) else None


def test_thousands_of_shards_are_mixed_by_weight_and_counted_by_source():
    shards = many_sources(3, 2000)
    data = dataclasses.replace(DATA, train=("a", "b", "c"), weights=(6.0, 3.0, 1.0), block_samples=4, max_bad_fraction=0.5)

    def loader(rank: int = 0, world: int = 1, state=None) -> TrainLoader:
        return make_train_loader(data, shards=shards, lanes=8, tokenize=tokenize, seed=4, global_batch_size=16, rank=rank,
                                 world_size=world, examples=PictureExamples(data=data, image_size=6, group_by="none"),
                                 state=state, read=read_simulated)

    one, two = loader(), [loader(0, 2), loader(1, 2)]
    assert_same(steps(two, 150), steps([one], 150))
    drawn, bad = one.by_source["drawn_by_source"], one.by_source["bad_by_source"]
    total = sum(drawn.values())
    assert total == sum(lane["position"] for lane in one.state()["lanes"].values())
    assert sum(bad.values()) == sum(one.bad.values())
    for name, share in zip("abc", (0.6, 0.3, 0.1), strict=True):
        assert abs(drawn[name] / total - share) < 4 * (share * (1 - share) / total) ** 0.5
    assert "a" not in bad and abs(bad["b"] / drawn["b"] - 1 / 3) < 0.05 and bad["c"] > 0
    assert Counter(two[0].by_source["drawn_by_source"]) + Counter(two[1].by_source["drawn_by_source"]) == Counter(drawn)
    state = json.loads(json.dumps(one.state()))
    assert loader(state=state).by_source == one.by_source
    for lane in state["lanes"].values():  # as checkpoints were before samples were counted by source
        del lane["drawn_by_source"], lane["bad_by_source"]
    old = loader(state=state)
    assert_same(steps([old], 3), steps([one], 3))
    assert sum(old.by_source["drawn_by_source"].values()) == pytest.approx(48, rel=0.5)


def test_joined_sources_are_not_told_apart(tmp_path):
    loader = make([make_source(tmp_path, (7, 12), "a"), make_source(tmp_path, (9,), "b")])
    next(loader)
    assert loader.by_source == {} and "drawn_by_source" not in loader.state()["lanes"]["0"]


@pytest.mark.parametrize("weights", [None, (1.0, 1.0, 1.0)])
def test_a_lane_over_thousands_of_shards_holds_one_open_shard_and_one_block_a_source(weights):
    open_now = most = 0

    def read_counted(url: str, *, keep):
        nonlocal open_now, most
        open_now += 1
        most = max(most, open_now)
        try:
            for number in range(7):
                yield number, RawSample(f"{number}", url, b"i", "png", b"t", None, None) if keep(number) else None
        finally:
            open_now -= 1

    lane = Lane(many_sources(3, 2000), lane=0, lanes=4, seed=0, block_samples=4, weights=weights, read=read_counted)
    for _ in range(6000):
        next(lane)
        assert sum(item is not None for source in lane.sources for item in source.block) <= 4 * len(lane.sources)
    assert most <= len(lane.sources)


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.multiprocess)])
def test_too_many_unreadable_shards_stop_the_run_though_their_samples_are_few(tmp_path, workers):
    shards = make_source(tmp_path, (6,) * 30)
    for shard in shards[::6]:
        Path(shard).unlink()
    loader = make([shards], lanes=2, rows=4, workers=workers, max_bad_fraction=0.2, max_bad_shards_fraction=0.1)
    with pytest.raises(DataError, match=r"^\d+ of about \d\d shards are unreadable, allowed are 10% "
                                        r"\(data\.max_bad_shards_fraction\); by cause: \d unreadable shard") as caught:
        steps([loader], 200)
    assert "\n" not in str(caught.value)
    steps([make([shards], lanes=2, rows=4, max_bad_fraction=0.2, max_bad_shards_fraction=0.3)], 60)


def test_an_outage_of_the_store_stops_a_lane_after_a_few_shards(tmp_path):
    asked = []

    def read_nothing(url: str, *, keep):
        asked.append(url)
        yield -1, BadSample("unreadable shard", url, None, "503")

    loader = make_train_loader(DATA, shards=[[f"{i}" for i in range(1000)]], lanes=2, tokenize=tokenize, seed=0,
                               examples=PictureExamples(data=DATA, image_size=6, group_by="none"), global_batch_size=4,
                               read=read_nothing)
    with pytest.raises(DataError, match=r"5 unreadable shards in a row \(data\.max_bad_shards_fraction is 0\.5\)"):
        next(loader)
    assert len(asked) == 5


@pytest.mark.parametrize("counts", [{}, {"drawn_by_source": {"a": 3}, "bad_by_source": {}}])
def test_metrics_hold_the_samples_of_each_source(counts):
    meter = Meter(global_batch_size=4, num_samples=None, max_skipped_steps=3, device=torch.device("cpu"))
    meter.add(torch.ones(()), torch.ones(()), torch.zeros(()))
    metrics = meter.take(1, lr=0.1, bad={"no image": 1}, by_source=counts)
    assert metrics["bad"] == {"no image": 1} and counts.items() <= metrics.items()
    assert ("drawn_by_source" in metrics) == bool(counts)
