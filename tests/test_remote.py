"""Shards from a server that fails as object stores do: what is retried, where reading goes on, and what is said."""

import pickle
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import fsspec
import pytest

from clipkit.data import remote as remote_module
from clipkit.data.remote import RemoteShards
from clipkit.data.shards import expand_shards
from clipkit.data.tars import BadSample, read_numbered
from tests.conftest import write_tar
from tests.shard_server import ALL, add_shard, cut, from_the_start, hang, keys, refuse, shard_server, without_length


@pytest.fixture
def store() -> Iterator[SimpleNamespace]:
    with shard_server() as store:
        yield store


@pytest.fixture(autouse=True)
def waits(monkeypatch) -> list[float]:
    """Waits between retries, which are not waited."""
    seconds: list[float] = []
    monkeypatch.setattr(remote_module, "time", SimpleNamespace(sleep=seconds.append))
    return seconds


@pytest.mark.parametrize("answers", [
    [refuse(500), refuse(503), refuse(429)], [cut(0.5)], [cut(0.3), refuse(500), cut(0.7)], [cut(0.5), from_the_start],
    [cut(0.0)], [cut(0.5), cut(0.5), cut(0.5)], [without_length]])
def test_a_store_that_fails_for_a_while_changes_nothing(store, tmp_path, answers):
    url = add_shard(store, tmp_path)
    store.answers = answers[:]
    assert keys(url, RemoteShards(retries=3)) == ALL and not store.answers


def test_what_broke_off_goes_on_at_its_byte(store, tmp_path):
    url = add_shard(store, tmp_path, count=255)
    store.answers = [cut(0.8)]
    assert len(keys(url, RemoteShards())) == 255
    [(_, first), (_, second)] = store.requests
    start = int(second.removeprefix("bytes=").rstrip("-"))
    # What came with the break itself may be lost in aiohttp's buffer.
    assert first is None and 0 < start <= 0.8 * len(store.files["/a.tar"])


def test_a_server_that_hangs_is_left_after_the_time_out(store, tmp_path):
    url = add_shard(store, tmp_path)
    store.answers = [hang]
    begin = time.monotonic()
    assert keys(url, RemoteShards(timeout_seconds=0.3)) == ALL
    assert time.monotonic() - begin < 5


def test_half_a_body_is_never_the_end(store, tmp_path):
    url = add_shard(store, tmp_path, count=250)
    store.answers = [cut(0.5)] * 99
    *some, last = keys(url, RemoteShards(retries=2))
    assert some == [f"a{i:03}" for i in range(len(some))] and len(some) <= 125  # what came with a break may be lost
    assert last.startswith("unreadable shard: ConnectionError") and "after 2 retries" in last
    assert 3 <= len(store.requests) < 20  # a try that brings something does not count


@pytest.mark.parametrize(("answer", "detail"), [(refuse(403), "refuses access to"), (refuse(401), "check its credentials"),
                                                (refuse(404), "FileNotFoundError"), (refuse(410), "410")])
def test_what_no_retry_can_mend_is_one_cause_at_once(store, tmp_path, waits, answer, detail):
    url = add_shard(store, tmp_path)
    store.answers = [answer] * 9
    [last] = keys(url, RemoteShards())
    assert last.startswith("unreadable shard: ") and detail in last and "\n" not in last
    assert len(store.requests) == 1 and not waits


def test_waits_grow_with_jitter_up_to_a_limit(store, tmp_path, waits):
    url = add_shard(store, tmp_path)
    store.answers = [refuse(500)] * 9
    assert "after 8 retries" in keys(url, RemoteShards(retries=8))[0]
    expected = [0.5, 1, 2, 4, 8, 16, 30, 30]
    assert all(0.5 * mean <= wait <= 1.5 * mean for wait, mean in zip(waits, expected, strict=True))
    assert waits != expected


def test_other_file_systems_are_read_too(tmp_path):
    data = Path(write_tar(tmp_path / "a.tar", [("a000.jpg", bytes(4000))])).read_bytes()
    with fsspec.open("memory://folder/a.tar", "wb") as file:
        file.write(data)  # pyright: ignore
    assert keys("memory://folder/a.tar", RemoteShards()) == ["a000"]
    [last] = keys("memory://folder/b.tar", RemoteShards())
    assert "FileNotFoundError" in last
    [last] = keys("nowhere://folder/b.tar", RemoteShards())
    assert "ValueError" in last and "nowhere" in last


def test_a_pattern_without_access_is_answered_with_the_cause(store, tmp_path):
    url = add_shard(store, tmp_path)
    store.answers = [refuse(403)]
    with pytest.raises(FileNotFoundError, match=r"no shard at .*refuses access .*check the URL and your access") as caught:
        expand_shards([url])
    assert "\n" not in str(caught.value)
    store.answers = [refuse(500)]
    assert expand_shards([url]) == [url]


def test_bad_samples_of_remote_shards_are_picklable(store, tmp_path):
    [last] = [item for _, item in read_numbered(f"{store.url}/none.tar", remote=RemoteShards())]
    assert isinstance(last, BadSample) and pickle.loads(pickle.dumps(last)) == last
