"""Lanes: their order against a reference that holds everything in lists, and exact continuation from any place."""

import itertools
import json
import random
import shutil
from collections import Counter
from pathlib import Path

import pytest

from clipkit.data.lanes import Cursor, Lane, check_lanes, default_lanes
from clipkit.data.shards import BadSample, DataError, RawSample
from tests.conftest import write_tar

Shards = list[list[str]]  # the keys of each shard


def make_source(folder: Path, lengths: tuple[int, ...], name: str = "s") -> list[str]:
    folder.mkdir(exist_ok=True)
    return [write_tar(folder / f"{name}{i}.tar", [(f"{name}{i}_{j}.txt", b"t") for j in range(length)])
            for i, length in enumerate(lengths)]


def keys_of(lengths: tuple[int, ...], name: str = "s") -> Shards:
    """What make_source wrote: an empty shard is one bad sample, which its first lane counts."""
    return [[f"{name}{i}_{j}" for j in range(length)] or [f"bad:{name}{i}"] for i, length in enumerate(lengths)]


def take(lane: Lane, count: int) -> list[str]:
    return [item.key or f"bad:{Path(item.url).stem}" for item in itertools.islice(lane, count)]


def shuffled(items: list, name: str) -> list:
    """Fisher and Yates, as written in textbooks."""
    items, rng = list(items), random.Random(name)
    for i in range(len(items) - 1, 0, -1):
        j = rng.randrange(i + 1)
        items[i], items[j] = items[j], items[i]
    return items


def reference_epoch(shards: Shards, epoch: int, *, lane: int, lanes: int, seed: int, block: int, source: int = 0,
                    resampled: bool = False) -> list[str]:
    """One epoch of a lane (resampled: one draw), with everything in lists."""
    number = len(shards)
    if resampled:
        order = [random.Random(f"{seed}/{source}/draw/{lane}/{epoch}").randrange(number)]
    elif number < lanes:
        order = shuffled(list(range(number)), f"{seed}/{source}/shards/{lane}/{epoch}")
    else:
        everyone = shuffled(list(range(number)), f"{seed}/{source}/shards/{epoch}")
        order = [shard for i, shard in enumerate(everyone) if (i - epoch * (number % lanes)) % lanes == lane]
    result = []
    for shard in order:
        own = shards[shard]
        if number < lanes and not resampled:
            own = [key for j, key in enumerate(own) if (shard + j) % lanes == lane]
        first = max(1, block * (lane + 1) // lanes)
        blocks = [own[:first]] + [own[start:start + block] for start in range(first, len(own), block)]
        for i, keys in enumerate(blocks):
            result += shuffled(keys, f"{seed}/{source}/block/{lane}/{epoch}/{shard}/{i}")
    return result


def reference(shards: Shards, count: int, **options) -> list[str]:
    result = []
    for epoch in itertools.count():
        result += reference_epoch(shards, epoch, **options)
        if len(result) >= count:
            return result[:count]
    raise AssertionError


LENGTHS = [(12, 12, 12, 12), (5, 9, 1, 14, 3, 7, 2), (30,), (0, 6, 0, 8, 5), (40, 3)]


@pytest.mark.parametrize("resampled", [False, True])
@pytest.mark.parametrize("lanes", [1, 2, 4, 8])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_a_lane_gives_what_the_reference_gives(tmp_path, lengths, lanes, resampled):
    shards = make_source(tmp_path, lengths)
    for lane, block in itertools.product({0, lanes // 2, lanes - 1}, (1, 4, 100)):
        options = {"lane": lane, "lanes": lanes, "seed": 3, "resampled": resampled}
        given = take(Lane([shards], block_samples=block, **options), 40)
        assert given == reference(keys_of(lengths), 40, block=block, **options)


@pytest.mark.parametrize("lanes", [1, 2, 4, 8])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_all_lanes_together_give_each_sample_once_an_epoch(tmp_path, lengths, lanes):
    shards = make_source(tmp_path, lengths)
    seen: dict[int, Counter] = {epoch: Counter() for epoch in range(3)}
    for number in range(lanes):
        lane = Lane([shards], lane=number, lanes=lanes, seed=0, block_samples=4)
        orders = [[] for _ in range(3)]
        while True:
            item = next(lane)
            epoch = lane.sources[0].cursor.epoch  # still the item's own: the cursor moves on when the next is read
            if epoch > 2:
                break
            seen[epoch][item.key or item.url] += 1
            orders[epoch].append(item.key)
        if len(orders[0]) > 8:
            assert orders[0] != orders[1]
    keys = {key if not key.startswith("bad:") else shards[int(key[5:])] for shard in keys_of(lengths) for key in shard}
    for counts in seen.values():
        assert set(counts) == keys and set(counts.values()) == {1}


def test_shards_that_lanes_do_not_divide_are_seen_equally_often_over_time(tmp_path):
    shards = make_source(tmp_path, (4,) * 6)
    seen = Counter()
    for number in range(4):
        seen.update(take(Lane([shards], lane=number, lanes=4, seed=0, block_samples=4), 600))
    assert min(seen.values()) > 0.95 * max(seen.values())  # lanes that kept their shards would give 1 to 2


@pytest.mark.parametrize("options", [{}, {"resampled": True}, {"weights": (3.0, 1.0)},
                                     {"weights": (1.0, 1.0), "resampled": True}])
@pytest.mark.parametrize("lanes", [1, 2, 7])
def test_a_lane_goes_on_exactly_from_any_place(tmp_path, lanes, options):
    sources = [make_source(tmp_path, (6, 0, 9, 3), "a"), make_source(tmp_path, (17,), "b")]
    for number in {0, lanes - 1}:
        settings = {"lane": number, "lanes": lanes, "seed": 5, "block_samples": 4, **options}
        whole = take(Lane(sources, **settings), 62)
        running = Lane(sources, **settings)
        for done in range(50):
            state = json.loads(json.dumps(running.state()))
            assert state["position"] == done
            assert take(Lane(sources, **settings, state=state), 12) == whole[done:done + 12], done
            next(running)


def test_shards_cut_or_missing_are_told_and_the_lane_goes_on_exactly(tmp_path):
    shards = make_source(tmp_path, (8, 8, 8, 8))
    cut = Path(shards[1]).read_bytes()
    Path(shards[1]).write_bytes(cut[:4 * 1024 + 300])
    Path(shards[2]).unlink()
    for lanes in (1, 2, 8):
        causes = Counter()
        for number in range(lanes):
            lane = Lane([shards], lane=number, lanes=lanes, seed=1, block_samples=4)
            epoch, done = 0, 0
            while True:
                state = lane.state()
                item = next(lane)
                again = next(Lane([shards], lane=number, lanes=lanes, seed=1, block_samples=4, state=state))
                assert again == item, done
                if lane.sources[0].cursor.epoch > epoch:
                    break
                causes[item.cause if isinstance(item, BadSample) else "good"] += 1
                done += 1
        told = lanes if lanes > len(shards) else 1  # of a cut shard that lanes share, each misses samples of its own
        assert causes == {"good": 8 + 4 + 8, "truncated shard": told, "unreadable shard": 1}, lanes


def test_sources_are_drawn_by_weight_and_each_keeps_its_own_order(tmp_path):
    lengths = ((9, 9), (13, 4, 2))
    sources = [make_source(tmp_path, lengths[0], "a"), make_source(tmp_path, lengths[1], "b")]
    given = take(Lane(sources, lane=1, lanes=2, seed=9, block_samples=4, weights=(3.0, 1.0)), 2000)
    options = {"lane": 1, "lanes": 2, "seed": 9, "block": 4}
    for number, name in enumerate("ab"):
        own = [key for key in given if key[0] == name]
        assert own == reference(keys_of(lengths[number], name), len(own), source=number, **options)
    assert abs(sum(key[0] == "a" for key in given) / 2000 - 0.75) < 0.04  # 4 standard deviations


def test_sources_without_weights_are_one_source(tmp_path):
    sources = [make_source(tmp_path, (3, 5), "a"), make_source(tmp_path, (4,), "b")]
    options = {"lane": 0, "lanes": 2, "seed": 0, "block_samples": 8}
    assert take(Lane(sources, **options), 50) == take(Lane([sources[0] + sources[1]], **options), 50)


def test_shards_drawn_with_replacement_all_come_about_equally_often(tmp_path):
    shards = make_source(tmp_path, (2,) * 10)
    seen = Counter(key.split("_")[0] for key in take(
        Lane([shards], lane=0, lanes=2, seed=0, block_samples=8, resampled=True), 2000))
    assert len(seen) == 10 and max(abs(count - 200) for count in seen.values()) < 80  # 4 deviations of 2 * sqrt(90)
    runs = [len(list(run)) for _, run in itertools.groupby(take(
        Lane([shards], lane=0, lanes=2, seed=0, block_samples=8, resampled=True), 2000), lambda key: key.split("_")[0])]
    assert max(runs) > 2  # a shard follows itself now and then: with replacement


def test_the_order_is_that_of_the_seed_not_of_the_place_of_the_files(tmp_path):
    shards = make_source(tmp_path / "here", (9, 9))
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    moved = [shard.replace("/here/", "/there/") for shard in shards]
    options = {"lane": 0, "lanes": 2, "block_samples": 4}
    random.seed(0)
    given = take(Lane([shards], seed=1, **options), 60)
    random.seed(1)
    assert take(Lane([moved], seed=1, **options), 60) == given
    assert take(Lane([shards], seed=2, **options), 60) != given


def test_a_lane_holds_one_block_and_frees_what_it_gave(tmp_path):
    lane = Lane([make_source(tmp_path, (50,))], lane=0, lanes=1, seed=0, block_samples=10)
    for given in range(50):
        next(lane)
        held = [item for item in lane.sources[0].block if item is not None]
        assert len(held) == 9 - given % 10


def test_first_blocks_are_shorter_for_lower_lanes(tmp_path):
    shards = make_source(tmp_path, (20,) * 4)
    lengths = []
    for number in range(4):
        lane = Lane([shards], lane=number, lanes=4, seed=0, block_samples=8)
        next(lane)
        lengths.append(len(lane.sources[0].block))
    assert lengths == [2, 4, 6, 8]


def test_a_lane_without_samples_says_so(tmp_path):
    shards = make_source(tmp_path, (2, 1))
    lane = Lane([shards], lane=3, lanes=8, seed=0, block_samples=4)
    with pytest.raises(DataError, match=r"lane 3 of 8 finds no sample in its 2 shards.*set data\.lanes"):
        next(lane)


def test_a_position_over_other_sources_is_refused(tmp_path):
    sources = [make_source(tmp_path, (2,), "a"), make_source(tmp_path, (2,), "b")]
    options = {"lane": 0, "lanes": 1, "seed": 0, "block_samples": 4}
    state = Lane(sources, weights=(1.0, 1.0), **options).state()
    assert state == {"position": 0, "cursors": [list(Cursor())] * 2}
    with pytest.raises(ValueError, match="over 2 sources"):
        Lane(sources, **options, state=state)


def test_default_lanes_is_a_power_of_two_by_the_shards():
    assert [default_lanes(n) for n in (1, 2, 3, 4, 15, 16, 63, 64, 65, 10**6)] == [1, 2, 2, 4, 8, 16, 32, 64, 64, 64]


def test_lanes_fit_exactly_when_ranks_divide_them_and_they_divide_the_batch():
    for lanes, size, world in itertools.product((1, 2, 3, 4, 6, 8, 12), (4, 6, 8, 24, 7), (1, 2, 3, 4)):
        if lanes % world == 0 and size % lanes == 0:
            check_lanes(lanes, size, world)
            continue
        with pytest.raises(ValueError, match=r"set (data\.lanes|train\.global_batch_size)") as caught:
            check_lanes(lanes, size, world)
        message = str(caught.value)
        assert "\n" not in message
        for option in message.partition(": set ")[2].split(" or "):  # each cure that is named is one
            name, _, value = option.partition("=")
            if value:
                check_lanes(int(value) if name == "data.lanes" else lanes,
                            int(value) if name != "data.lanes" else size, world)


@pytest.mark.parametrize(("num_shards", "lanes"), [(20, 4), (3, 8), (64, 64), (70, 64)])
@pytest.mark.parametrize("resampled", [False, True])
def test_shards_met_are_those_that_were_opened(num_shards, lanes, resampled):
    opened = Counter()
    shards = [f"{shard}" for shard in range(num_shards)]

    def read(url, *, keep):
        opened[url] += 1
        return ((number, RawSample("k", url, b"", "png", b"", None, None) if keep(number) else None) for number in range(40))

    met = 0.0
    for number in range(lanes):
        lane = Lane([shards], lane=number, lanes=lanes, seed=0, block_samples=8, resampled=resampled, read=read)
        for _ in range(500):
            next(lane)
        met += lane.shards_met
    shared = lanes if num_shards < lanes and not resampled else 1
    assert met == pytest.approx(opened.total() / shared, rel=0.15)


def test_the_shard_that_comes_next_is_told_while_one_is_read(tmp_path):
    told, opened = [], []

    def read(url, *, keep):
        opened.append(url)
        return ((number, RawSample("k", url, b"", "png", b"", None, None)) for number in range(8))

    lane = Lane([[f"{i}" for i in range(6)]], lane=0, lanes=2, seed=0, block_samples=4, read=read, fetch_ahead=told.append)
    for _ in range(24):
        next(lane)
    assert opened[1:3] == sorted(set(told), key=told.index) and len(opened) == 3
