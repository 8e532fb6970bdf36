"""The embedding store: its keys, its files, damage, interruption, several processes."""

import contextlib
import json
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from clipkit.data.tars import BadSample
from clipkit.evaluation import encode
from clipkit.evaluation.encode import encode_task, encode_texts
from clipkit.evaluation.image_entry import EncodedImages, SampleInfo
from clipkit.evaluation.image_sets import ALL, Share
from clipkit.evaluation.store import EmbeddingStore, identify, image_key, state_sha256, text_key
from clipkit.evaluation.tasks import CLASSIFICATION, Task, TaskSample
from clipkit.model.build import build_model
from tests.conftest import TINY

TEXTS = ["a cat", "a dog on a mat", "two red cars, and a lorry", "a cat", "rain"]


class Pictures:
    """20 pictures in memory, of which two are bad."""

    def __init__(self, seed: int = 0) -> None:
        self.fingerprint = f"{seed:064d}"
        pixels = np.random.default_rng(seed).integers(0, 256, (20, 5, 4, 3), dtype=np.uint8)
        self.images = [Image.fromarray(one).resize((40, 36)) for one in pixels]

    def read(self, share: Share = ALL):
        for number, image in enumerate(self.images):
            if not share.has(0, number):
                continue
            if number in (3, 11):
                yield BadSample("truncated image", "a", str(number), "")
            else:
                yield TaskSample((0, number), f"a/{number}", image, number % 3, (number % 3,), ("b", "c") * (number % 2))

    def count(self) -> int:
        return len(self.images)


@pytest.fixture
def task() -> Task:
    return Task("pictures", "test", CLASSIFICATION, Pictures(), ("x", "y", "z"))


@pytest.fixture
def store(tmp_path: Path) -> EmbeddingStore:
    return EmbeddingStore(tmp_path / "cache")


def refuse(*_: object, **__: object) -> None:
    raise AssertionError("the model was called")


def same(one: encode.EncodedTask, other: encode.EncodedTask) -> bool:
    tensors = ("image_features", "trunk_features", "labels")
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in tensors if getattr(one, name) is not None) \
        and all(getattr(one, name) == getattr(other, name) for name in ("keys", "label_sets", "captions", "num_bad"))


def test_the_key_changes_with_all_that_the_features_depend_on(tiny_model) -> None:
    identity = identify(tiny_model)
    assert identity == identify(tiny_model)
    keys = [image_key(identity, "data"), image_key(identity, "other data"), text_key(identity)]
    for other in (build_model(config=TINY), build_model(config={**TINY, "quick_gelu": True})):
        other.load_state_dict(tiny_model.state_dict())
        if other.config == tiny_model.config:
            other.towers.visual.proj.data[0, 0] += 1e-6  # weights
        keys += [image_key(identify(other), "data"), text_key(identify(other))]
    preprocess_cfg = {**tiny_model.config["preprocess_cfg"], "resize_mode": "squash"}
    for change in ({"config": {**tiny_model.config, "preprocess_cfg": preprocess_cfg}}, {"dtype": "torch.bfloat16"},
                   {"weights_sha256": "0"}, {"probe_tokens": (1, 2)}, {"open_clip": "4"}):
        keys += [image_key(replace(identity, **change), "data"), text_key(replace(identity, **change))]
    assert len(set(keys)) == len(keys) == 17


def test_the_hash_of_the_weights_is_that_of_the_file_or_of_what_they_are(tiny_model) -> None:
    fresh = identify(tiny_model).weights_sha256
    assert fresh == state_sha256(tiny_model)
    tiny_model.towers.logit_scale.data += 1
    assert identify(tiny_model).weights_sha256 != fresh
    tiny_model.source_sha256 = "of the file"
    assert identify(tiny_model).weights_sha256 == "of the file"
    assert identify(tiny_model.bfloat16()).dtype == "torch.bfloat16"


def test_a_second_call_gives_the_same_bits_without_the_model(tiny_model, task, store, monkeypatch) -> None:
    alone = encode_task(tiny_model, task, batch_size=4, trunk=True)
    first = encode_task(tiny_model, task, batch_size=4, store=store, trunk=True)
    assert first.num_bad == {"truncated image": 2} and len(first.keys) == 18 and first.keys[3] == "a/4"
    assert first.label_sets[1] == (1,) and first.captions[1] == ("b", "c") and first.labels[4] == 2
    monkeypatch.setattr(tiny_model.towers, "encode_image", refuse)
    monkeypatch.setattr(task.images, "read", refuse)
    second = encode_task(tiny_model, task, batch_size=4, store=store, trunk=True)
    assert same(alone, first) and same(first, second)
    found = EmbeddingStore(store.folder.parent).read_images(image_key(identify(tiny_model), task.images.fingerprint))
    assert found is not None and torch.equal(found.image_features, alone.image_features)


def test_features_before_the_projection_are_added_when_they_are_asked_for(tiny_model, task, store) -> None:
    plain = encode_task(tiny_model, task, batch_size=4, store=store)
    assert plain.trunk_features is None
    both = encode_task(tiny_model, task, batch_size=4, store=store, trunk=True)
    assert both.trunk_features is not None and both.trunk_features.shape == (18, 32)
    assert torch.equal(plain.image_features, both.image_features)
    encode_task(tiny_model, task, batch_size=4, store=store)  # the richer entry stays
    assert len(list(store.folder.glob("images-*/trunk_features.npy"))) == 1


def test_features_are_mapped_into_memory_and_the_files_stay_as_they_are(tiny_model, task, store, monkeypatch) -> None:
    encode_task(tiny_model, task, batch_size=4, store=store)
    modes, load = [], np.load
    monkeypatch.setattr(np, "load", lambda *args, **options: modes.append(options["mmap_mode"]) or load(*args, **options))
    encoded = encode_task(tiny_model, task, batch_size=4, store=store)
    assert modes == ["c"]
    kept = encoded.image_features.clone()
    encoded.image_features.zero_()
    assert torch.equal(encode_task(tiny_model, task, batch_size=4, store=store).image_features, kept)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def change_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [cut, change_a_byte, Path.unlink], ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("name", ["image_features.npy", "trunk_features.npy", "samples.parquet", "store.json"])
def test_damage_is_recognised_said_in_one_line_and_encoded_again(tiny_model, task, store, name, damage) -> None:
    first = encode_task(tiny_model, task, batch_size=4, store=store, trunk=True)
    damage(next(store.folder.glob(f"images-*/{name}")))
    with pytest.warns(UserWarning, match=r"images-\w+ is damaged \(.*\): it is removed, and its pictures are encoded again$"):
        again = encode_task(tiny_model, task, batch_size=4, store=store, trunk=True)
    assert same(first, again)
    assert same(first, encode_task(tiny_model, task, batch_size=4, store=store, trunk=True))  # whole again: no warning


def test_a_large_file_is_compared_by_size_and_looked_into(tiny_model, task, store, monkeypatch) -> None:
    monkeypatch.setattr("clipkit.evaluation.image_entry.HASHED_BYTES", 0)
    encode_task(tiny_model, task, batch_size=4, store=store)
    path = next(store.folder.glob("images-*/image_features.npy"))
    content = bytearray(path.read_bytes())
    content[-4:] = np.float32(np.nan).tobytes()
    path.write_bytes(content)
    with pytest.warns(UserWarning, match="image_features.npy holds values that are not finite"):
        encode_task(tiny_model, task, batch_size=4, store=store)


def test_what_a_killed_writer_left_is_no_entry(tiny_model, task, store) -> None:
    (store.folder / ".tmp-images-abc").mkdir(parents=True)
    (store.folder / ".tmp-images-abc" / "image_features.npy").write_bytes(b"half")
    assert store.read_images("abc") is None
    encode_task(tiny_model, task, batch_size=4, store=store)
    names = [path.name.split("-")[0] for path in store.folder.iterdir()]
    assert sorted(names) == [".tmp", "images"]


def test_a_store_that_cannot_be_written_costs_no_result(tiny_model, task, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file in the way")
    with pytest.warns(UserWarning, match="features are not kept for the next time: cannot write .*: a part of that path is a"):
        encoded = encode_task(tiny_model, task, batch_size=4, store=EmbeddingStore(tmp_path / "cache"))
    assert same(encoded, encode_task(tiny_model, task, batch_size=4))
    with pytest.warns(UserWarning, match="features are not kept"):
        encode_texts(tiny_model, TEXTS, batch_size=4, store=EmbeddingStore(tmp_path / "cache"))


@pytest.mark.parametrize("workers", [0, 2])
def test_an_interrupted_encoding_goes_on_where_it_was(tiny_model, task, store, monkeypatch, workers) -> None:
    whole = encode_task(tiny_model, task, batch_size=4, trunk=True)
    monkeypatch.setattr(encode, "PART_SAMPLES", 7)  # two batches, one with a bad picture
    encode_image, seen = tiny_model.towers.visual.transformer.forward, []

    def stop_in_the_third_batch(*args: object, **options: object) -> object:
        seen.append(1)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return encode_image(*args, **options)

    monkeypatch.setattr(tiny_model.towers.visual.transformer, "forward", stop_in_the_third_batch)
    with pytest.raises(KeyboardInterrupt):
        encode_task(tiny_model, task, batch_size=4, store=store, trunk=True, workers=workers)
    assert len(list(store.folder.glob("parts/*.arrow"))) == 1
    resumed = encode_task(tiny_model, task, batch_size=4, store=store, trunk=True, workers=workers)
    assert len(seen) == 3 + 3  # three batches were left, cut where those of the whole are
    assert same(whole, resumed)
    assert not list(store.folder.glob("parts/*"))


@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_the_batches_of_pictures_are_the_same_for_any_number_of_processes(tiny_model, task, monkeypatch, world_size) -> None:
    encode_image, seen = tiny_model.towers.encode_image, []
    monkeypatch.setattr(tiny_model.towers, "encode_image",
                        lambda pixels: seen.append(pixels.numpy().tobytes()) or encode_image(pixels))
    whole = encode_task(tiny_model, task, batch_size=4)
    alone = sorted(seen)
    for workers in (0, 2) if world_size == 2 else (0,):
        seen.clear()
        rows = {}
        for rank in range(world_size):
            monkeypatch.setattr(encode, "ranks_of", lambda spread, rank=rank: (rank, world_size))
            with contextlib.suppress(ValueError):  # no picture fell to this one
                share = encode_task(tiny_model, task, batch_size=4, workers=workers)
                rows |= dict(zip(share.keys, share.image_features, strict=True))
        assert sorted(seen) == alone
        assert torch.equal(torch.stack([rows[key] for key in whole.keys]), whole.image_features)


def test_a_damaged_part_is_encoded_again(tiny_model, task, store) -> None:
    whole = encode_task(tiny_model, task, batch_size=4)
    samples = [SampleInfo(sample.position, sample.key, sample.label, sample.labels, sample.captions)
               for sample in task.images.read() if isinstance(sample, TaskSample)]
    part = EncodedImages(whole.image_features[:5], None, samples[:5], Counter())
    change_a_byte(store.write_part(image_key(identify(tiny_model), task.images.fingerprint), part))
    with pytest.warns(UserWarning, match=r"arrow is damaged \(its sha256 is not that of its name\): it is removed"):
        assert same(whole, encode_task(tiny_model, task, batch_size=4, store=store))


def test_loader_processes_give_the_features_of_none(tiny_model, task) -> None:
    inline = encode_task(tiny_model, task, batch_size=4)
    assert same(inline, encode_task(tiny_model, task, batch_size=4, workers=3))


def test_data_that_cannot_be_read_is_one_line_also_from_a_loader_process(tiny_model, task, monkeypatch) -> None:
    def read(share: Share):
        yield from Pictures().read(share)
        raise ValueError("label 7 is outside the 3 classes")

    monkeypatch.setattr(task.images, "read", read)
    for workers in (0, 1):
        with pytest.raises(ValueError, match=r"^label 7 is outside the 3 classes$"):
            encode_task(tiny_model, task, batch_size=4, workers=workers)


def test_progress_is_told_after_each_batch(tiny_model, task) -> None:
    told = []
    encode_task(tiny_model, task, batch_size=5, progress=lambda done, total: told.append((done, total)))
    assert told[-1] == (20, 20) and [done for done, _ in told] == sorted({done for done, _ in told}) and len(told) == 4
    told.clear()
    encode_texts(tiny_model, TEXTS, batch_size=1, progress=lambda done, total: told.append((done, total)))
    assert told[-1] == (4, 4)


def test_features_that_are_not_finite_name_their_first_sample(tiny_model, task, store) -> None:
    tiny_model.towers.visual.proj.data.fill_(torch.nan)
    with pytest.raises(ValueError, match=r"features hold NaN or infinity \(18 of 18 rows, the first: picture a/0 of task pi"):
        encode_task(tiny_model, task, batch_size=4, store=store)
    assert not store.folder.exists()
    tiny_model.towers.token_embedding.weight.data[tiny_model.tokenize(["dog"])[0, 1]] = torch.inf
    with pytest.raises(ValueError, match=r"\(1 of 4 rows, the first: text 'a dog on a mat'\); the model cannot be measured"):
        encode_texts(tiny_model, TEXTS, batch_size=4, store=store)


def test_a_fact_is_found_once_and_again_when_its_file_is_damaged(store) -> None:
    asked = []

    def find() -> list[float]:
        asked.append(1)
        return [0.1, 2.5e-30]

    assert store.fact(["a", 1], find) == store.fact(["a", 1], find) == [0.1, 2.5e-30]
    assert len(asked) == 1
    store.fact(["a", 2], find)
    for damage in (cut, change_a_byte, lambda path: path.write_text("[]")):
        for path in store.folder.glob("facts/*.json"):
            damage(path)
        assert store.fact(["a", 1], find) == [0.1, 2.5e-30]
    assert len(asked) == 2 + 3


def test_writers_at_once_keep_all_texts(store, monkeypatch) -> None:
    from concurrent.futures import ThreadPoolExecutor

    monkeypatch.setattr("clipkit.evaluation.store.TEXTS_PER_FILE", 3)
    texts = [f"text {number}" for number in range(12)]
    features = torch.arange(24.0).reshape(12, 2)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda start: store.add_texts("k", texts[start:start + 6], features[start:start + 6]), [0, 3, 6, 0]))
    rows, found = store.read_texts("k", ["no such", *texts[::-1]])
    assert sorted(rows.tolist()) == list(range(1, 13))
    assert torch.equal(found[rows.argsort()], features.flip(0))
    assert store.read_texts("other", texts)[0].tolist() == []


def encode_on_a_rank(rank: int, world_size: int, port: int, cache: str, out: str) -> None:
    import torch.distributed as dist

    torch.set_num_threads(1)
    if world_size > 1:
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    torch.manual_seed(0)
    model, task = build_model(config=TINY), Task("pictures", "test", CLASSIFICATION, Pictures(), ("x", "y", "z"))
    store = EmbeddingStore(Path(cache, "first" if rank == 0 else "never"))
    for turn in range(2):
        if turn == 1:
            model.towers.encode_image = model.towers.encode_text = refuse
        encoded = encode_task(model, task, batch_size=3, spread=True, store=store, trunk=True)
        texts = encode_texts(model, TEXTS, batch_size=3, spread=True, store=store)
        assert encoded.trunk_features is not None
        rows = {"image": encoded.image_features, "trunk": encoded.trunk_features, "text": texts}
        np.savez(Path(out, f"{world_size}-{rank}-{turn}.npz"), **{name: row.numpy() for name, row in rows.items()})
        facts = [encoded.keys, encoded.labels.tolist(), encoded.label_sets, encoded.captions, encoded.num_bad]
        Path(out, f"{world_size}-{rank}-{turn}.json").write_text(json.dumps(facts))
    if world_size > 1:
        dist.destroy_process_group()


@pytest.mark.multiprocess
def test_two_processes_get_the_rows_of_one_and_the_first_keeps_them(tmp_path: Path, free_port: int) -> None:
    import torch.multiprocessing as mp

    encode_on_a_rank(0, 1, free_port, str(tmp_path / "alone"), str(tmp_path))
    mp.spawn(encode_on_a_rank, (2, free_port, str(tmp_path / "cache"), str(tmp_path)), nprocs=2)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["first"]
    for rank in range(2):
        for turn in range(2):
            assert (tmp_path / f"2-{rank}-{turn}.json").read_text() == (tmp_path / "1-0-0.json").read_text()
            one, two = np.load(tmp_path / "1-0-0.npz"), np.load(tmp_path / f"2-{rank}-{turn}.npz")
            for name in ("image", "trunk", "text"):
                np.testing.assert_array_equal(two[name], one[name])  # each batch is the same one


def test_reading_says_nothing_when_all_is_well(tiny_model, task, store) -> None:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        encode_task(tiny_model, task, batch_size=4, store=store, workers=1)
        encode_task(tiny_model, task, batch_size=4, store=store, workers=1)
    assert not said
