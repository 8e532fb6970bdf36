"""Read shards from object stores and web servers through fsspec: again where that fails, on from where it broke off.

What is kept of them on the local disk is shard_cache.py.
"""

import io
import random
import threading
import time
from typing import IO, TYPE_CHECKING, Any, cast

import fsspec
from fsspec.config import conf

from clipkit.data.shard_cache import CachePart, ShardCache

if TYPE_CHECKING:
    from clipkit.config.data import DataConfig

READ_BUFFER_BYTES = 2**16
HTTP_BUFFER_BYTES = 2**18  # each read crosses to fsspec's thread and back, which costs as much as 64 KiB do
BLOCK_BYTES = 4 * 2**20  # of one request to a store that is read by ranges; s3fs would hold 50 MiB a lane
BLOCKS_HELD = 3  # the one being read, the next, which is fetched meanwhile, and the one before
FIRST_WAIT_SECONDS = 0.5
LONGEST_WAIT_SECONDS = 30.0
TRANSIENT_REFUSALS = (408, 425, 429)  # time-out, too early, too many requests
MAX_DRAINED_BYTES = 2**20  # behind the end mark of a tar; a reader that stops earlier did not want the rest


def is_local(url: str) -> bool:
    """Whether a shard is a file of this machine (no URL, no fsspec chain)."""
    return "://" not in url and "::" not in url and not url.startswith("pipe:")


class RemoteShards:
    """How shards that are not files of this machine are read; one for all lanes of a process.

    Args:
      retries: how often in a row a request is repeated, with waits of 0.5, 1, 2, ... up to 30 seconds, give or take half.
      timeout_seconds: of connecting, and of waiting for the next bytes.
      cache: where whole shards are kept; None = nowhere.
    """

    def __init__(self, *, retries: int = 6, timeout_seconds: float = 30.0, cache: ShardCache | None = None) -> None:
        self.retries, self.timeout_seconds, self.cache = retries, timeout_seconds, cache
        self._ahead: threading.Thread | None = None
        self._ahead_url = ""

    def open(self, url: str) -> IO[bytes]:
        """Open a shard for reading from its start: out of the cache, else from the store and into the cache on the way.

        Raises:
          FileNotFoundError, PermissionError: it is missing, or access is refused.
          ConnectionError: it cannot be read, after all retries.
          ValueError: fsspec does not know the protocol.
          ImportError: the protocol needs a package that is not installed.
        """
        if self._ahead and url == self._ahead_url:
            self._ahead.join()
        cached = self.cache.open(url) if self.cache else None
        if cached:
            return cached
        remote = _RemoteFile(url, self.retries, self.timeout_seconds)
        part = self.cache.begin(url, remote.size) if self.cache and remote.size else None
        return cast(IO[bytes], io.BufferedReader(_Kept(remote, part) if part else remote, HTTP_BUFFER_BYTES))

    def fetch_ahead(self, url: str) -> None:
        """Begin to bring a shard into the cache, in a thread; one at a time, further ones are passed over."""
        if self.cache is None or is_local(url) or url.startswith("pipe:") or url == self._ahead_url:
            return
        if (self._ahead and self._ahead.is_alive()) or self.cache.has(url):
            return
        self._ahead_url = url
        self._ahead = threading.Thread(target=self._fetch, args=(url, self.cache), daemon=True)
        self._ahead.start()

    def _fetch(self, url: str, cache: ShardCache) -> None:
        try:
            with _RemoteFile(url, self.retries, self.timeout_seconds) as remote:
                part = cache.begin(url, remote.size) if remote.size else None
                if part:
                    with _Kept(remote, part) as kept:
                        while kept.read(BLOCK_BYTES):
                            pass
        except Exception:  # the lane that comes to this shard meets the trouble itself, and tells it
            return


def remote_shards(data: "DataConfig") -> RemoteShards:
    """Remote shards as the settings of the data say."""
    from clipkit.data.emoji.shards import default_cache_dir

    cache = None
    if data.shard_cache_gb is not None:
        cache = ShardCache(f"{data.cache_dir or default_cache_dir()}/shards", int(data.shard_cache_gb * 1e9))
    return RemoteShards(retries=data.retries, timeout_seconds=data.timeout_seconds, cache=cache)


class _RemoteFile(io.RawIOBase):
    """The bytes of a remote file in order. Requests that fail are repeated; one that breaks off goes on at its byte.

    Attributes:
      size: in bytes; None where the store does not tell.
    """

    def __init__(self, url: str, retries: int, timeout_seconds: float) -> None:
        self.url, self.retries, self.timeout_seconds = url, retries, timeout_seconds
        self.size: int | None = None
        self._file: IO[bytes] | None = None
        self._offset = 0
        self._failures = 0  # in a row
        while self._file is None:
            try:
                self._file = self._connect()
            except Exception as error:  # fsspec's backends raise classes of their own (aiohttp, botocore, ...)
                self._wait_or_raise(error)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while True:
            try:
                self._file = self._file or self._connect()
                data = self._file.read(len(buffer))
                if not data and self.size is not None and self._offset < self.size:
                    raise ConnectionError(f"it ended after {self._offset:,} of {self.size:,} bytes")
            except Exception as error:
                self._wait_or_raise(error)
                continue
            self._failures = 0 if data else self._failures
            self._offset += len(data)
            buffer[:len(data)] = data
            return len(data)

    def close(self) -> None:
        self._disconnect()
        super().close()

    def _connect(self) -> IO[bytes]:
        filesystem, path = fsspec.url_to_fs(self.url, **_time_outs(self.url, self.timeout_seconds))
        if self.url.startswith(("http://", "https://")):
            return self._get(filesystem, path)
        # Stores are read by ranges; other file systems (memory, sftp, chains) have their own ways.
        ranges = {"block_size": BLOCK_BYTES, "cache_type": "background", "cache_options": {"maxblocks": BLOCKS_HELD}}
        file = filesystem.open(path, "rb", **(ranges if filesystem.async_impl else {}))
        self.size = getattr(file, "size", None)
        file.seek(self._offset)
        return cast(IO[bytes], file)

    def _get(self, filesystem: Any, path: str) -> IO[bytes]:
        """One plain GET, which servers without range requests answer too; they give the beginning again after a break."""
        headers = {**filesystem.kwargs.get("headers", {}), "Accept-Encoding": "identity"}
        if self._offset:
            headers["Range"] = f"bytes={self._offset}-"
        file = filesystem.open(path, "rb", block_size=0, size=1, headers=headers)  # a size spares a request for it
        skipped = 0 if file.r.status == 206 else self._offset
        length = file.r.headers.get("Content-Length")
        if length is not None and "Content-Encoding" not in file.r.headers:
            self.size = self._offset - skipped + int(length)
        while skipped:
            data = file.read(min(skipped, BLOCK_BYTES))
            if not data:
                raise ConnectionError("it is shorter than before")
            skipped -= len(data)
        return file

    def _disconnect(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            file.close()

    def _wait_or_raise(self, error: Exception) -> None:
        self._disconnect()
        status = getattr(error, "status", None)
        if status in (401, 403):
            raise PermissionError(f"the server refuses access to {self.url} ({status}); check its credentials") from error
        refused = isinstance(status, int) and 400 <= status < 500 and status not in TRANSIENT_REFUSALS
        if refused or isinstance(error, FileNotFoundError | PermissionError | ImportError | ValueError):
            raise error
        if self._failures >= self.retries:
            raise ConnectionError(f"{error!r}, after {self.retries} retries") from error
        # All processes meet an outage at the same time and must not come back together; the run's own chance is left alone.
        jitter = random.SystemRandom().uniform(0.5, 1.5)
        time.sleep(jitter * min(LONGEST_WAIT_SECONDS, FIRST_WAIT_SECONDS * 2**self._failures))
        self._failures += 1


class _Kept(io.RawIOBase):
    """A remote file whose bytes go into the cache as they are read; kept there if it is read to its end."""

    def __init__(self, remote: _RemoteFile, part: CachePart) -> None:
        self.remote, self.part = remote, part

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            count = self.remote.readinto(buffer)
        except Exception:
            self.part.failed = True
            raise
        self.part.write(buffer[:count])
        return count

    def close(self) -> None:
        if self.closed:
            return
        try:
            if self.part.missing <= MAX_DRAINED_BYTES:
                while self.part.missing and not self.part.failed and self.read(READ_BUFFER_BYTES):
                    pass
        except Exception:  # the reader has all that it wanted; the shard is not kept
            pass
        finally:
            self.part.close()
            self.remote.close()
            super().close()


def _time_outs(url: str, seconds: float) -> dict[str, Any]:
    """What fsspec's file system for a URL takes for time-outs, beside what the user's fsspec settings give it."""
    protocol = "" if "::" in url else url.partition("://")[0]
    if protocol in ("http", "https"):
        from aiohttp import ClientTimeout

        name, own = "client_kwargs", {"timeout": ClientTimeout(total=None, sock_connect=seconds, sock_read=seconds),
                                      "read_bufsize": HTTP_BUFFER_BYTES}
    elif protocol in ("s3", "s3a"):
        name, own = "config_kwargs", {"connect_timeout": seconds, "read_timeout": seconds}
    else:
        return {"requests_timeout": seconds} if protocol in ("gs", "gcs") else {}
    return {name: {**own, **conf.get(protocol, {}).get(name, {})}}
