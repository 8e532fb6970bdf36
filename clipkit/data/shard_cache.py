"""A folder of whole remote shards, of bounded size, shared by any number of processes.

Each shard has a folder by the hash of its URL; in it the file's name holds size and checksum. Locks (flock) say what is
being read or written: the kernel takes them back when a process dies.
"""

import contextlib
import hashlib
import os
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

CHECKED_BYTES = 2**20
PART = "part"  # name of a shard that is being written


class ShardCache:
    """Args: folder: made where missing. limit_bytes: what all its files together take at most."""

    def __init__(self, folder: str | Path, limit_bytes: int) -> None:
        self.folder, self.limit_bytes = Path(folder).expanduser(), limit_bytes
        self._checked: set[str] = set()  # a file's checksum is looked at once a process

    def has(self, url: str) -> bool:
        return bool(self._files(url))

    def open(self, url: str) -> IO[bytes] | None:
        """Open a shard that is here and whole. It is not removed before it is closed."""
        for path in self._files(url):
            with contextlib.suppress(OSError):  # removed by another process, or not readable: the store has it
                file = path.open("rb")
                _lock(file, shared=True, wait=True)
                if self._is_whole(path, file):
                    with contextlib.suppress(OSError):
                        os.utime(path)  # used last now
                    return file
                file.close()
                path.unlink()
        return None

    def begin(self, url: str, size: int) -> "CachePart | None":
        """Begin to write a shard of `size` bytes; None where there is no room, or another process is at it."""
        place = self._place(url)
        try:
            with self._locked():
                if not self._make_room(size):
                    return None
                place.mkdir(exist_ok=True)
                file = os.fdopen(os.open(place / PART, os.O_RDWR | os.O_CREAT, 0o644), "r+b")
                if not _lock(file):
                    file.close()
                    return None
                file.truncate(0)
                file.truncate(size)  # counted from here on by all who make room
            return CachePart(self, file, place, size)
        except OSError as error:
            _warn(self.folder, error)
            return None

    def _place(self, url: str) -> Path:
        return self.folder / hashlib.blake2b(url.encode(), digest_size=16).hexdigest()

    def _files(self, url: str) -> list[Path]:
        try:
            return [path for path in self._place(url).iterdir() if path.name != PART]
        except OSError:
            return []

    def _is_whole(self, path: Path, file: IO[bytes]) -> bool:
        size, _, checksum = path.name.partition("-")
        if str(os.fstat(file.fileno()).st_size) != size:
            return False
        if str(path) not in self._checked:
            found = 0
            while data := file.read(CHECKED_BYTES):
                found = zlib.crc32(data, found)
            if f"{found:08x}" != checksum:
                return False
            file.seek(0)
            self._checked.add(str(path))
        return True

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Alone among all processes: what is written, renamed and removed here does not change meanwhile."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "lock").open("wb") as file:
            _lock(file, wait=True)
            yield

    def _make_room(self, size: int) -> bool:
        """Remove the files used longest ago until `size` bytes more fit; those in use stay."""
        files = []
        for path in self.folder.glob("*/*"):
            with contextlib.suppress(FileNotFoundError):
                files.append((path.stat().st_mtime_ns, path.stat().st_size, path))
        total = sum(held for _, held, _ in files)
        for _, held, path in sorted(files):
            if total + size <= self.limit_bytes:
                break
            if _remove_unused(path):
                total -= held
        return total + size <= self.limit_bytes


class CachePart:
    """A shard on its way into the cache; it appears there at `close` if all its bytes came. Made by ShardCache.begin.

    Attributes:
      missing: bytes still to come.
    """

    def __init__(self, cache: ShardCache, file: IO[bytes], place: Path, size: int) -> None:
        self.cache, self.file, self.place, self.size, self.missing = cache, file, place, size, size
        self.checksum = 0
        self.failed = False

    def write(self, data: bytes | memoryview) -> None:
        if self.failed:
            return
        try:
            self.file.write(data)
            self.checksum = zlib.crc32(data, self.checksum)
            self.missing -= len(data)
        except OSError as error:
            self.failed = True
            _warn(self.cache.folder, error)

    def close(self) -> None:
        """Keep the shard if it is whole, else remove it."""
        try:
            with self.cache._locked():
                if self.missing or self.failed:
                    (self.place / PART).unlink(missing_ok=True)
                    return
                self.file.flush()
                os.replace(self.place / PART, self.place / f"{self.size}-{self.checksum:08x}")
        except OSError as error:
            _warn(self.cache.folder, error)
        finally:
            with contextlib.suppress(OSError):  # what a full disk did not take is of no use
                self.file.close()


def _lock(file: IO[bytes], *, shared: bool = False, wait: bool = False) -> bool:
    """Take a file for oneself, or together with others, until it is closed; False where another process has it."""
    import fcntl

    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True


def _remove_unused(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            if not _lock(file):
                return False
            path.unlink()
            with contextlib.suppress(OSError):
                path.parent.rmdir()
    except FileNotFoundError:
        pass
    return True


def _warn(folder: Path, error: OSError) -> None:
    warnings.warn(f"the shard cache {folder} cannot be written ({error.strerror or error}): reading without it; "
                  "free its disk, lower data.shard_cache_gb, or set data.cache_dir", stacklevel=3)
