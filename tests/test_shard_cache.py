"""The cache of whole remote shards: bounded, shared by processes, never with a damaged shard; and fetching ahead into it."""

import fcntl
import multiprocessing
import pickle
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from clipkit.data import remote as remote_module
from clipkit.data.remote import RemoteShards
from clipkit.data.shard_cache import PART, ShardCache
from clipkit.data.tars import read_numbered
from tests.shard_server import ALL, Handler, add_shard, cut, from_the_start, keys, refuse, shard_server, whole, without_length


@pytest.fixture
def store() -> Iterator[SimpleNamespace]:
    with shard_server() as store:
        yield store


@pytest.fixture(autouse=True)
def no_waits(monkeypatch):
    monkeypatch.setattr(remote_module, "time", SimpleNamespace(sleep=lambda seconds: None))


def cached(folder: Path, limit_bytes: int = 10**7, **options) -> RemoteShards:
    return RemoteShards(cache=ShardCache(folder / "cache", limit_bytes), **options)


def files_of(folder: Path) -> list[Path]:
    return sorted((folder / "cache").glob("*/*"))


def test_a_shard_is_fetched_once_and_read_from_the_disk_then(store, tmp_path):
    url = add_shard(store, tmp_path)
    for _ in range(3):
        assert keys(url, cached(tmp_path)) == ALL
    assert len(store.requests) == 1
    [path] = files_of(tmp_path)
    assert path.read_bytes() == store.files["/a.tar"]
    with cached(tmp_path).open(url) as file:
        assert file.seekable()
    assert keys(url, pickle.loads(pickle.dumps(cached(tmp_path)))) == ALL  # as it goes to workers that are not forked


def test_a_shard_that_broke_off_is_kept_whole(store, tmp_path):
    url = add_shard(store, tmp_path)
    store.answers = [cut(0.4), from_the_start]
    assert keys(url, cached(tmp_path)) == keys(url, cached(tmp_path)) == ALL
    assert files_of(tmp_path)[0].read_bytes() == store.files["/a.tar"] and len(store.requests) == 2


def test_what_was_not_read_to_its_end_is_not_kept(store, tmp_path, monkeypatch):
    monkeypatch.setattr(remote_module, "MAX_DRAINED_BYTES", 2**14)
    url = add_shard(store, tmp_path)
    samples = read_numbered(url, remote=cached(tmp_path))
    next(samples)
    assert [path.name for path in files_of(tmp_path)] == [PART]
    samples.close()  # pyright: ignore
    assert files_of(tmp_path) == []
    store.requests.clear()
    store.answers = [cut(0.0)] * 9
    assert "unreadable" in keys(url, cached(tmp_path, retries=1))[-1]
    assert files_of(tmp_path) == [] and len(store.requests) == 2  # closing it does not ask again
    store.answers.clear()
    store.answers = [without_length]
    assert keys(url, cached(tmp_path)) == ALL and files_of(tmp_path) == []


@pytest.mark.parametrize("damage", ["cut", "bit", "grown"])
def test_a_damaged_file_of_the_cache_is_fetched_anew(store, tmp_path, damage):
    url = add_shard(store, tmp_path)
    keys(url, cached(tmp_path))
    [path] = files_of(tmp_path)
    data = bytearray(path.read_bytes())
    if damage == "bit":
        data[len(data) // 2] ^= 1
    path.write_bytes(data[:-1] if damage == "cut" else data + b"\0" * (damage == "grown"))
    assert keys(url, cached(tmp_path)) == ALL and len(store.requests) == 2
    assert files_of(tmp_path)[0].read_bytes() == store.files["/a.tar"]


def test_the_cache_keeps_its_bound_and_what_was_used_last(store, tmp_path):
    urls = {name: add_shard(store, tmp_path, name) for name in "abcd"}
    size = len(store.files["/a.tar"])
    remote = cached(tmp_path, int(2.5 * size))
    for name in "abacad":
        keys(urls[name], remote)
        assert sum(path.stat().st_size for path in files_of(tmp_path)) <= 2.5 * size
        time.sleep(0.02)
    assert [path for path, _ in store.requests] == ["/a.tar", "/b.tar", "/c.tar", "/d.tar"]
    assert remote.cache and [name for name in "abcd" if remote.cache.has(urls[name])] == ["a", "d"]


def test_what_is_being_read_is_not_removed_and_a_full_cache_is_passed_by(store, tmp_path):
    urls = {name: add_shard(store, tmp_path, name) for name in "ab"}
    remote = cached(tmp_path, int(1.5 * len(store.files["/a.tar"])))
    keys(urls["a"], remote)
    with remote.open(urls["a"]):
        assert len(keys(urls["b"], remote)) == 60
        assert remote.cache and remote.cache.has(urls["a"]) and not remote.cache.has(urls["b"])
    assert len(keys(urls["b"], remote)) == 60 and remote.cache.has(urls["b"]) and not remote.cache.has(urls["a"])
    assert len(keys(urls["a"], cached(tmp_path, 1000))) == 60  # larger than the whole cache


def test_a_part_that_a_dead_process_left_is_written_anew(store, tmp_path):
    url = add_shard(store, tmp_path)
    cache = ShardCache(tmp_path / "cache", 10**7)
    part = cache.begin(url, 1000)
    assert part and cache.begin(url, 1000) is None  # one process writes
    part.file.close()  # as the kernel does for a process that is killed
    assert keys(url, cached(tmp_path)) == ALL
    assert [path.name == PART for path in files_of(tmp_path)] == [False]


def _read_all(urls: list[str], folder: Path, results) -> None:
    remote = cached(folder, 1_000_000)
    results.put(all(len(keys(url, remote)) == 60 for url in urls * 3))


@pytest.mark.multiprocess
def test_many_processes_share_a_small_cache(store, tmp_path):
    urls = [add_shard(store, tmp_path, name) for name in "abcdef"]  # 270 kB each
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [context.Process(target=_read_all, args=(urls[i:] + urls[:i], tmp_path, results)) for i in (0, 2)]
    for process in processes:
        process.start()
    assert [results.get(timeout=100) for _ in processes] == [True, True]
    for process in processes:
        process.join(10)
    assert sum(path.stat().st_size for path in files_of(tmp_path)) <= 1_000_000


def test_a_disk_that_takes_nothing_is_told_and_the_shard_is_read(store, tmp_path):
    url = add_shard(store, tmp_path)
    (tmp_path / "cache").write_text("in the way")
    with pytest.warns(UserWarning, match=r"cannot be written.*data\.cache_dir"):
        assert keys(url, cached(tmp_path)) == ALL


def test_a_disk_that_fills_up_on_the_way_is_told_and_the_shard_is_read(store, tmp_path, monkeypatch):
    url = add_shard(store, tmp_path)
    remote = cached(tmp_path)
    assert remote.cache
    begin = remote.cache.begin

    def on_a_full_disk(url: str, size: int):
        part = begin(url, size)
        assert part
        part.file.close()
        part.file = open("/dev/full", "r+b", buffering=0)  # noqa: SIM115 -- closed by the part
        return part

    monkeypatch.setattr(remote.cache, "begin", on_a_full_disk)
    with pytest.warns(UserWarning, match="No space left on device"):
        assert keys(url, remote) == ALL
    assert files_of(tmp_path) == []


def test_the_next_shard_is_fetched_ahead_one_at_a_time(store, tmp_path):
    urls = {name: add_shard(store, tmp_path, name) for name in "ab"}
    remote = cached(tmp_path)
    release = threading.Event()

    def slow(handler: Handler, data: bytes, start: int) -> None:
        release.wait(5)
        whole(handler, data, start)

    store.answers = [slow]
    remote.fetch_ahead(urls["a"])
    remote.fetch_ahead(urls["b"])  # the first is under way
    release.set()
    assert keys(urls["a"], remote) == ALL
    assert [path for path, _ in store.requests] == ["/a.tar"]
    remote.fetch_ahead(urls["a"])  # it is here
    RemoteShards().fetch_ahead(urls["b"])  # without a cache there is nowhere to put it
    remote.fetch_ahead(str(tmp_path / "local.tar"))
    assert len(store.requests) == 1


def test_trouble_while_fetching_ahead_is_left_to_the_reader(store, tmp_path):
    url = add_shard(store, tmp_path)
    remote = cached(tmp_path)
    store.answers = [refuse(403), refuse(403)]
    remote.fetch_ahead(url)
    [last] = keys(url, remote)
    assert "refuses access" in last and len(store.requests) == 2


def test_a_reader_holds_a_shared_lock(store, tmp_path):
    url = add_shard(store, tmp_path)
    remote = cached(tmp_path)
    keys(url, remote)
    with remote.open(url), remote.open(url), files_of(tmp_path)[0].open("rb") as other, pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
