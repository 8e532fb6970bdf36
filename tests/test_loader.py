"""The loader: one stream of batches whatever the ranks and workers, exact resume, and bad samples that are counted."""

import dataclasses
import io
import itertools
import json
import multiprocessing
import os
import random
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from clipkit.config.data import AugmentConfig, DataConfig
from clipkit.data import loader as loader_module
from clipkit.data.lanes import Lane
from clipkit.data.loader import DataError, TrainLoader, default_workers, make_train_loader, merge_states
from clipkit.data.samples import Example, PictureExamples, make_example
from clipkit.data.shards import BadSample, RawSample, expand_shards
from tests.conftest import write_tar

OFF: dict[str, Any] = dict.fromkeys((field.name for field in dataclasses.fields(AugmentConfig)), 0.0)
AUGMENT = AugmentConfig(**OFF | {"crop_scale": (0.5, 1.0), "crop_ratio": (0.75, 1.33), "flip": 0.5, "zoom": (1.0, 1.0),
                                 "colour_jitter": (0.0, 0.0, 0.0, 0.0)})
DATA = DataConfig(train=("x",), weights=None, caption_fields=None, caption_weights=None, class_names=None, templates=None,
                  lanes=None, block_samples=8,
                  resampled=False, decode="exact", max_pixels=10**6, max_bad_fraction=0.05, max_bad_shards_fraction=0.5,
                  allow_pipe=False, workers=0, retries=2, timeout_seconds=10.0, shard_cache_gb=None, cache_dir=None,
                  augment=AUGMENT)
Members = list[tuple[str, bytes]]


def tokenize(texts: list[str]) -> torch.Tensor:
    return torch.tensor([list(text.encode()[:12].ljust(12, b"\0")) for text in texts], dtype=torch.int32)  # (N, 12)


def png(seed: int) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)  # (H, W, 3)
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def sample(key: str, seed: int) -> Members:
    fields = {"captions": [f"{key} a", f"{key} b", f"{key} c"], "concept": seed % 3}
    return [(f"{key}.png", png(seed)), (f"{key}.json", json.dumps(fields).encode())]


def make_source(folder: Path, lengths: tuple[int, ...], name: str = "s") -> list[str]:
    return [write_tar(folder / f"{name}{i}.tar", [member for j in range(length)
                                                  for member in sample(f"{name}{i}_{j}", 100 * i + j)])
            for i, length in enumerate(lengths)]


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> list[list[str]]:
    folder = tmp_path_factory.mktemp("sources")
    return [make_source(folder, (7, 12, 0, 5, 9), "a"), make_source(folder, (20, 3), "b")]


def make(shards: list[list[str]], rank: int = 0, world: int = 1, *, lanes: int = 4, rows: int = 8, state=None,
         group_by: str = "concept", local_world_size: int = 1, **changes) -> TrainLoader:
    settings = {"max_bad_fraction": 0.2} | changes
    data = dataclasses.replace(DATA, train=("x",) * len(shards), **settings)
    return make_train_loader(data, shards=shards, lanes=lanes, tokenize=tokenize, seed=4,
                             examples=PictureExamples(data=data, image_size=6, group_by=group_by),
                             global_batch_size=rows, rank=rank, world_size=world, local_world_size=local_world_size,
                             state=state)


def steps(loaders: list[TrainLoader], count: int) -> list[list[torch.Tensor]]:
    """Global batches: all ranks' rows joined."""
    return [[torch.cat(columns) for columns in zip(*(next(loader) for loader in loaders), strict=True)]
            for _ in range(count)]


def assert_same(one, other) -> None:
    assert len(one) == len(other)
    for batch, expected in zip(one, other, strict=True):
        assert all(torch.equal(a, b) and a.stride() == b.stride() for a, b in zip(batch, expected, strict=True))


ORDERS = [{}, {"weights": (1.0, 2.0)}, {"resampled": True}, {"weights": (1.0, 2.0), "resampled": True}]


@pytest.mark.parametrize("changes", ORDERS)
def test_batches_are_the_lanes_in_order_each_with_its_own_samples(sources, changes):
    given = steps([make(sources, rows=8, **changes)], 12)
    assert (given[0][0].shape, given[0][0].dtype) == ((8, 3, 6, 6), torch.uint8)
    assert [column.dtype for column in given[0]] == [torch.uint8, torch.int32, torch.int64, torch.int64]
    assert given[0][0].is_contiguous(memory_format=torch.channels_last)
    rows: list[list[Example]] = []
    for number in range(4):
        lane = Lane(sources, lane=number, lanes=4, seed=4, block_samples=8, weights=changes.get("weights"),
                    resampled=changes.get("resampled", False))
        examples = []
        for position in range(40):  # 24 samples, and the bad ones between them
            raw = next(lane)
            if isinstance(raw, RawSample):
                examples.append(make_example(raw, image_size=6, config=AUGMENT, group_by="concept", max_pixels=10**6,
                                             rng=random.Random(f"4/{number}/{position}")))
        rows.append(examples)
    for step, (images, tokens, groups, _) in enumerate(given):
        expected = [example for lane in rows for example in lane[2 * step:2 * step + 2]]
        assert torch.equal(images, torch.stack([example.image for example in expected]))
        assert torch.equal(tokens, tokenize([example.caption for example in expected]))
        assert groups.tolist() == [example.group_id for example in expected]


@pytest.mark.parametrize("changes", ORDERS)
@pytest.mark.parametrize(("lanes", "rows"), [(4, 8), (12, 12)])
def test_any_number_of_ranks_gives_the_same_batches(sources, lanes, rows, changes):
    one = make(sources, lanes=lanes, rows=rows, **changes)
    expected = steps([one], 6)
    for world in (2, 4):
        ranks = [make(sources, rank, world, lanes=lanes, rows=rows, **changes) for rank in range(world)]
        assert_same(steps(ranks, 6), expected)
        assert merge_states([rank.state() for rank in ranks]) == one.state()


@pytest.mark.parametrize("changes", ORDERS)
def test_a_run_goes_on_exactly_from_any_batch_on_other_ranks(sources, changes):
    expected = steps([make(sources, lanes=8, rows=8, **changes)], 12)
    running = [make(sources, rank, 4, lanes=8, rows=8, **changes) for rank in range(4)]
    for done, world in zip(range(10), itertools.cycle((1, 2, 4)), strict=False):
        state = json.loads(json.dumps(merge_states([rank.state() for rank in running])))
        assert state["samples"] == 8 * done
        resumed = [make(sources, rank, world, lanes=8, rows=8, state=state, **changes) for rank in range(world)]
        assert_same(steps(resumed, 2), expected[done:done + 2])
        steps(running, 1)


def test_one_shard_feeds_any_number_of_lanes(tmp_path):
    shards = make_source(tmp_path, (32,))
    for lanes in (1, 4, 16):
        loader = make([shards], lanes=lanes, rows=16)
        seen = Counter(bytes(row[:5].tolist()).decode() for _ in range(2) for row in next(loader).tokens)
        assert len(seen) == 32  # one epoch: two batches of 16


@pytest.mark.multiprocess
def test_workers_change_nothing(sources, server, tmp_path):
    for source in sources:
        for shard in source:
            (tmp_path / Path(shard).name).write_bytes(Path(shard).read_bytes())
    served = [expand_shards([f"{server}/{Path(shard).name}" for shard in source]) for source in sources]
    expected = steps([make(sources, weights=(1.0, 2.0))], 14)
    for shards, workers in ((sources, 1), (served, 3)):
        loader = make(shards, weights=(1.0, 2.0), workers=workers)
        assert_same(steps([loader], 5), expected[:5])
        state = json.loads(json.dumps(loader.state()))  # the workers are ahead of it
        assert_same(steps([make(shards, weights=(1.0, 2.0), workers=0, state=state)], 4), expected[5:9])
        assert_same(steps([make(sources, weights=(1.0, 2.0), workers=2, state=state)], 4), expected[5:9])
        loader.close()
        assert loader.state() == state
        assert_same(steps([loader], 3), expected[5:8])  # and this one goes on too
        loader.close()


@pytest.mark.multiprocess
def test_workers_end_with_their_loader_and_leave_signals_to_it(sources):
    before = set(multiprocessing.active_children())
    loader = make(sources, workers=2)
    next(loader)
    workers = set(multiprocessing.active_children()) - before
    assert len(workers) == 2
    for worker in workers:  # Ctrl-C in a terminal and a scheduler's SIGTERM reach all; the main process saves first
        os.kill(worker.pid, signal.SIGINT)
        os.kill(worker.pid, signal.SIGTERM)
    steps([loader], 8)
    del loader
    assert not set(multiprocessing.active_children()) - before


def _iterate_with_a_worker_killed(sources: list[list[str]], mark: Path) -> None:
    loader = make(sources, workers=2)
    next(loader)
    mark.touch()
    os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
    steps([loader], 50)


@pytest.mark.multiprocess
def test_a_dead_worker_is_an_error_and_no_hang(sources, tmp_path, monkeypatch):
    monkeypatch.setattr(loader_module, "SIGTERM_GRACE_SECONDS", 1)
    # In a process of its own: torch raises its error from a signal handler, anywhere in the main thread.
    child = multiprocessing.get_context("fork").Process(target=_iterate_with_a_worker_killed,
                                                        args=(sources, tmp_path / "mark"))
    child.start()
    child.join(60)
    assert (tmp_path / "mark").exists() and child.exitcode == 1  # 1: an exception; None: it hangs


def test_global_random_numbers_are_left_alone(sources):
    before = random.getstate(), torch.get_rng_state(), np.random.get_state()[1].copy()
    steps([make(sources)], 2)
    assert random.getstate() == before[0] and torch.equal(torch.get_rng_state(), before[1])
    assert (np.random.get_state()[1] == before[2]).all()


@pytest.mark.multiprocess
def test_workers_leave_the_global_generator_alone(sources):
    before = torch.get_rng_state()
    loader = make(sources, workers=1)
    next(loader)
    loader.close()
    assert torch.equal(torch.get_rng_state(), before)


def test_bad_samples_are_counted_by_cause_and_the_rest_goes_on(tmp_path):
    members = [member for i in range(200) for member in sample(f"{i:03}", i)]
    spoiled = {"010.png": b"", "020.json": b"{", "030.json": b"{}", "040.png": png(1)[:60], "050.json": b"[1]"}
    members = [(name, spoiled.get(name, data)) for name, data in members if name != "060.png"]
    path = write_tar(tmp_path / "0.tar", [*members, ("evil.pkl", b"x")])
    missing = str(tmp_path / "1.tar")
    loader = make([[path, missing]], lanes=2, rows=10, group_by="none")
    while loader.state()["lanes"]["0"]["position"] < 101 or loader.state()["lanes"]["1"]["position"] < 101:
        assert not next(loader).group_ids.any()
    # Both lanes went once through; the shards of the second epoch change hands, so that some come twice.
    assert {"unreadable shard", "no image", "no caption", "bad json"} <= set(loader.bad)
    assert loader.state()["bad"] == loader.bad == dict(Counter(loader.bad))
    assert loader.last_bad["unreadable shard"].url == missing and loader.last_bad["no image"].key == "060"
    assert sum(loader.bad.values()) + loader.state()["samples"] == sum(
        lane["position"] for lane in loader.state()["lanes"].values())


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.multiprocess)])
def test_too_many_bad_samples_stop_the_run_with_their_causes(tmp_path, workers):
    members = [member for i in range(150) for member in sample(f"{i:03}", i)]
    members = [(name, b"damaged" if name.endswith("3.png") else data) for name, data in members]
    members = [(name, b"{}" if name.endswith("7.json") else data) for name, data in members]
    shards = [write_tar(tmp_path / "0.tar", members), write_tar(tmp_path / "1.tar", members)]
    loader = make([shards], lanes=2, rows=10, workers=workers, max_bad_fraction=0.1)
    with pytest.raises(DataError) as caught:
        steps([loader], 1000)
    message = str(caught.value)
    for part in ("samples are bad, allowed are 10%", "no caption", ".tar key ", "data.max_bad_fraction", "shards check"):
        assert part in message, message
    assert "\n" not in message
    assert 100 <= sum(lane["position"] for lane in loader.state()["lanes"].values()) < 130


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.multiprocess)])
@pytest.mark.parametrize("max_bad_fraction", [0.1, 1.0])
def test_data_without_one_good_sample_is_an_error_and_no_endless_loop(tmp_path, max_bad_fraction, workers):
    shards = [write_tar(tmp_path / f"{i}.tar", [(f"{j}.txt", b"caption") for j in range(5)]) for i in range(2)]
    for these, cause in ((shards, "no image"), ([str(tmp_path / "none.tar")], "unreadable shard")):
        loader = make([these], lanes=1, rows=4, workers=workers, max_bad_fraction=max_bad_fraction)
        with pytest.raises(DataError, match=rf"by cause: \d+ {cause}.*in a row") as caught:
            next(loader)
        assert "\n" not in str(caught.value)


def test_wrong_lanes_states_and_sources_are_refused(sources):
    with pytest.raises(ValueError, match=r"data\.lanes is 3"):
        make(sources, lanes=3)
    with pytest.raises(ValueError, match="source 1 of 2 has no shards"):
        make([sources[0], []])
    state = make(sources).state()
    with pytest.raises(ValueError, match=r"resume with data\.lanes=4"):
        make(sources, lanes=8, state=state)
    with pytest.raises(ValueError, match=r"resume with data\.lanes=2"):
        make(sources, lanes=4, state=make(sources, 0, 2).state())  # of one rank only
    with pytest.raises(ValueError, match="over 1 sources"):
        next(make(sources, weights=(1.0, 1.0), state=state))
    with pytest.raises(ValueError, match="the same lane"):
        merge_states([state, state])


def test_more_workers_than_lanes_are_fewer_workers_and_it_is_said(sources):
    with pytest.warns(UserWarning, match="using 4 workers"):
        assert make(sources, workers=9).workers == 4
    assert make(sources, 1, 4, lanes=4, workers=9).workers == 1  # said by rank 0
    assert make(sources, workers=None).workers == min(4, default_workers())
    assert 1 <= default_workers(10**6) <= default_workers() <= 8


# Samples


def raw(fields=None, text: bytes | None = None, image: bytes | None = None) -> RawSample:
    return RawSample("k", "u.tar", png(0) if image is None else image, "png", text,
                     None if fields is None else json.dumps(fields).encode(), None)


def captions_of(sample: RawSample, count: int = 300, **options) -> Counter:
    found: Counter = Counter()
    for seed in range(count):
        example = make_example(sample, image_size=6, config=AUGMENT, rng=random.Random(seed), max_pixels=100, **options)
        found[example.caption if isinstance(example, Example) else f"bad: {example.cause}"] += 1
    return found


def test_captions_come_from_the_json_list_else_the_text():
    assert captions_of(raw(text=b"\xef\xbb\xbf a cat\n"), 2) == {"a cat": 2}
    assert captions_of(raw({"captions": []}, b"t"), 2) == captions_of(raw({"captions": [" ", 3]}, b"t"), 2) == {"t": 2}
    assert min(captions_of(raw({"captions": ["a", "b", "c"]}, b"t")).values()) > 70
    assert set(captions_of(raw({"captions": ["a", "b", "c"]}, b"t"))) == {"a", "b", "c"}
    assert captions_of(raw({"caption": "x"}), 2) == {"bad: no caption": 2}
    assert captions_of(raw(text=b"\xff"), 2) == {"bad: bad text": 2}
    assert captions_of(raw(["list"]), 2) == {"bad: bad json": 2}


def test_caption_fields_are_drawn_by_weight_among_those_there():
    fields = {"label": "l", "tags": ["t", "u"], "empty": ""}
    found = captions_of(raw(fields, b"text"), 800, caption_fields=("label", "tags", "empty", "none", "txt"),
                        caption_weights=(2.0, 1.0, 9.0, 9.0, 1.0))
    assert set(found) == {"l", "t", "u", "text"}
    for caption, share in (("l", 0.5), ("t", 0.125), ("u", 0.125), ("text", 0.25)):
        assert abs(found[caption] / 800 - share) < 4 * (share * (1 - share) / 800) ** 0.5
    assert captions_of(raw(fields), 2, caption_fields=("none", "txt")) == {"bad: no caption": 2}
    assert set(captions_of(raw(fields), 50, caption_fields=("label", "tags"))) == {"l", "t", "u"}


def test_equal_groups_have_equal_ids():
    def group(sample: RawSample, group_by: str) -> int | str:
        example = make_example(sample, image_size=6, config=AUGMENT, rng=random.Random(0), max_pixels=100,
                               group_by=group_by)
        return example.group_id if isinstance(example, Example) else example.cause

    assert group(raw(text=b"a"), "none") == 0
    assert group(raw(text=b"a"), "caption") == group(raw({"x": 1}, b" a "), "caption") != group(raw(text=b"b"), "caption")
    assert group(raw({"x": 1}, b"a"), "x") == group(raw({"x": 1}, b"b"), "x") != group(raw({"x": 2}, b"a"), "x")
    assert group(raw({"x": 1}, b"a"), "y") == "no group"
    ids = [group(raw(text=str(i).encode()), "caption") for i in range(200)]
    assert len(set(ids)) == 200 and all(isinstance(i, int) and 0 < i < 2**63 for i in ids)


def test_pictures_that_cannot_be_used_are_bad_samples():
    for image, cause in ((b"", "empty image"), (b"junk", "not an image")):
        assert captions_of(raw(text=b"t", image=image), 1) == {f"bad: {cause}": 1}
    bad = make_example(raw(text=b"t"), image_size=6, config=AUGMENT, rng=random.Random(0), max_pixels=10)
    assert isinstance(bad, BadSample) and bad.cause == "huge image" and "data.max_pixels" in bad.detail
    assert captions_of(raw(text=b"t")._replace(image=None), 1) == {"bad: no image": 1}


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_dropped_iterator_of_a_slow_source_ends_soon(sources):
    started = time.monotonic()
    loader = make(sources, workers=2, rows=400)
    next(loader)
    del loader
    assert time.monotonic() - started < 20
