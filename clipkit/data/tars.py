"""Read the samples of one WebDataset tar, from disk or from any fsspec URL, in the order of the archive.

Members are read by name and size and never unpacked. Which shards there are is shards.py; which samples come when is
lanes.py.
"""

import io
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from typing import IO, Any, NamedTuple, cast

from clipkit.data.archive import DAMAGE, Archive, open_archive
from clipkit.data.remote import READ_BUFFER_BYTES, RemoteShards, is_local

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm")
READ_SUFFIXES = frozenset((*IMAGE_SUFFIXES, "txt", "json", "cls"))
PROBLEM = "problem"  # pseudo suffix under which a damaged member travels through the grouping
MAX_MEMBER_BYTES = 256 * 2**20  # far above any training picture; a larger member is a bad sample
MAX_TEXT_BYTES = 4 * 2**20  # of a .txt, .json or .cls; parsed, a json can take thirty times its size
TEXT_SUFFIXES = ("txt", "json", "cls")


class RawSample(NamedTuple):
    """The bytes of one sample as they stand in the archive."""

    key: str  # member name up to its first dot
    url: str
    image: bytes | None
    suffix: str  # of the image, lower case; "" without one
    text: bytes | None  # .txt
    json: bytes | None
    label: bytes | None  # .cls
    multi_hot: bytes | None = None  # .npy; read only where asked for


class BadSample(NamedTuple):
    """A sample, or with key None a shard, that cannot be used."""

    cause: str  # short, to count by
    url: str
    key: str | None
    detail: str


class DataError(ValueError):
    """The data cannot be trained on: too many bad samples, or none good."""


def open_shard(url: str, *, allow_pipe: bool = False, remote: RemoteShards | None = None) -> IO[bytes]:
    """Open a shard for reading from its start.

    Args:
      url: a path, any fsspec URL (also chained: `simplecache::https://...`), or `pipe:` and a shell command.
      allow_pipe: whether `pipe:` may start its command.
      remote: how URLs are read; None = with its own defaults.

    Raises:
      OSError: it is missing or cannot be read.
      ValueError: a `pipe:` URL without allow_pipe, or a protocol that fsspec does not know.
      ImportError: the protocol needs a package that is not installed.
    """
    if url.startswith("pipe:"):
        if not allow_pipe:
            raise ValueError(refuse_pipe(url))
        return _PipeReader(url.removeprefix("pipe:"))
    if is_local(url):
        return open(url, "rb", buffering=READ_BUFFER_BYTES)
    return (remote or RemoteShards()).open(url)


class _PipeReader(io.BufferedReader):
    """What a shell command writes; closing it waits for the command to end."""

    def __init__(self, command: str) -> None:
        self.process = subprocess.Popen(command, shell=True, stdout=subprocess.PIPE, bufsize=0)
        super().__init__(cast(io.RawIOBase, self.process.stdout))

    def close(self) -> None:
        super().close()
        self.process.wait()


def refuse_pipe(url: str) -> str:
    return (f"{url!r} would run a shell command, so pipe: is refused; give paths or URLs (s3://, https://, ...), "
            "or set data.allow_pipe=true if you trust it")


def read_shard(url: str, *, keep: Callable[[int], bool] | None = None, max_member_bytes: int = MAX_MEMBER_BYTES,
               allow_pipe: bool = False, remote: RemoteShards | None = None) -> Iterator[RawSample | BadSample]:
    """Read the samples of a shard in archive order.

    Only images, .txt, .json and .cls members are looked at; any other member, a link, and a name that leads out of
    the archive are passed over. What follows damage is not read: the samples before it come, then one BadSample.

    Args:
      url: as in open_shard. Compressed tars (gzip, bzip2, xz) are recognised by their content.
      keep: told the number of a sample in the shard (0, 1, ...), says whether to read it; the bytes of others are
        skipped (a seek in a local uncompressed tar). None = all.
      max_member_bytes: of a sample's members together; a larger sample is a bad one. Texts have MAX_TEXT_BYTES each.
      allow_pipe, remote: as in open_shard.

    Yields:
      A RawSample or BadSample for each sample kept, then at most one BadSample with key None for the shard: "truncated
      shard", "unreadable shard" or "empty shard".
    """
    for _, item in read_numbered(url, keep=keep, max_member_bytes=max_member_bytes, allow_pipe=allow_pipe, remote=remote):
        if item is not None:
            yield item


def read_numbered(url: str, *, keep: Callable[[int], bool] | None = None, max_member_bytes: int = MAX_MEMBER_BYTES,
                  allow_pipe: bool = False, with_npy: bool = False, remote: RemoteShards | None = None,
                  ) -> Iterator[tuple[int, RawSample | BadSample | None]]:
    """As read_shard, but yield (number in the shard, item) for all samples, None for those not kept.

    Trouble with the shard itself has number -1. `with_npy` reads .npy members too, the labels of multi-label sets; in
    other shards they hold embeddings and the like, which would be read for nothing. `remote`: as in open_shard.
    """
    suffixes = READ_SUFFIXES | {"npy"} if with_npy else READ_SUFFIXES
    try:
        with open_shard(url, allow_pipe=allow_pipe, remote=remote) as file:
            yield from _read_open(file, url, keep or (lambda number: True), max_member_bytes, suffixes)
    except Exception as error:  # fsspec's backends raise classes of their own (aiohttp, botocore, ...)
        yield -1, BadSample("unreadable shard", url, None, f"{type(error).__name__}: {error}")


def _read_open(file: IO[bytes], url: str, wanted: Callable[[int], bool], max_member_bytes: int,
               suffixes: frozenset[str]) -> Iterator[tuple[int, RawSample | BadSample | None]]:
    """Read the samples of an open shard; errors of the connection are raised."""
    from webdataset.tariterators import group_by_keys

    try:
        archive = open_archive(file)
    except DAMAGE as error:
        yield -1, BadSample("unreadable shard", url, None, f"not a tar: {error}")
        return
    members = _Members(archive, url, wanted, max_member_bytes, suffixes)
    number = -1
    for number, group in enumerate(group_by_keys(iter(members), keys=lambda name: (name[0], name[1]))):
        if group["__key__"] == members.cut_key:
            break
        yield number, _sample(group) if wanted(number) else None
    if members.damage:
        yield -1, BadSample("truncated shard", url, None, members.damage)
    elif number < 0:
        yield -1, BadSample("empty shard", url, None, "no .jpg, .png, .webp, .txt, .json or .cls member"
                            + (f", but {members.passed_over!r}" if members.passed_over else ""))


class _Members:
    """The members of an archive as group_by_keys takes them; iterate once.

    Attributes:
      damage: why reading stopped before the end of the archive; "" where it did not.
      cut_key: the sample that damage left incomplete, or None.
      passed_over: name of a file that no sample is made of, for messages.
    """

    def __init__(self, archive: Archive, url: str, wanted: Callable[[int], bool], max_member_bytes: int,
                 suffixes: frozenset[str]) -> None:
        self.archive, self.url, self.wanted, self.max_member_bytes = archive, url, wanted, max_member_bytes
        self.suffixes = suffixes
        self.damage = ""
        self.cut_key: str | None = None
        self.passed_over = ""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        key, number, suffixes, held = None, -1, set(), 0
        try:
            for name, suffix, member in self._headers():
                if name != key:
                    key, number, suffixes, held = name, number + 1, set(), 0
                held += member.size
                too_large = held > self.max_member_bytes or (suffix in TEXT_SUFFIXES and member.size > MAX_TEXT_BYTES)
                data = self._data(member) if self.wanted(number) and not too_large else None
                if suffix in suffixes and PROBLEM not in suffixes:
                    suffix, data = PROBLEM, ("duplicate member", f"two members are named {member.name!r}")
                elif too_large and PROBLEM not in suffixes:
                    suffix, data = PROBLEM, ("huge member", f"{member.name!r} has {member.size} bytes")
                if suffix not in suffixes:
                    suffixes.add(suffix)
                    yield {"fname": (key, suffix), "data": data, "__url__": self.url}
        except DAMAGE as error:
            self.damage = f"{error} (in or after sample {number + 1}, key {key!r})"

    def _headers(self) -> Iterator[tuple[str, str, tarfile.TarInfo]]:
        """(key, suffix, header) of the members that samples are made of."""
        from webdataset.tariterators import base_plus_ext

        while (member := self.archive.next()) is not None:
            self.archive.members.clear()  # pyright: ignore -- tarfile would hold every header
            if not member.isfile() or member.issparse():
                continue
            name, suffix = base_plus_ext(member.name)
            leads_out = member.name.startswith("/") or ".." in member.name.split("/")
            if leads_out or name is None or suffix is None or suffix.lower() not in self.suffixes:
                self.passed_over = self.passed_over or member.name
                continue
            yield name, suffix.lower(), member
        if not isinstance(self.archive.ended_by, tarfile.EOFHeaderError):  # pyright: ignore
            raise tarfile.ReadError(f"the archive ends without an end mark: {self.archive.ended_by}")

    def _data(self, member: tarfile.TarInfo) -> bytes:
        file = cast(IO[bytes], self.archive.fileobj)
        file.seek(member.offset_data)
        data = file.read(member.size)
        if len(data) != member.size:
            self.cut_key, _ = member.name.split(".", 1)
            raise tarfile.ReadError(f"{member.name!r} ends after {len(data)} of {member.size} bytes")
        return data


def _sample(group: dict[str, Any]) -> RawSample | BadSample:
    key, url = group["__key__"], group["__url__"]
    if PROBLEM in group:
        cause, detail = group[PROBLEM]
        return BadSample(cause, url, key, detail)
    suffix = next((suffix for suffix in IMAGE_SUFFIXES if suffix in group), "")
    return RawSample(key, url, group.get(suffix), suffix, group.get("txt"), group.get("json"), group.get("cls"),
                     group.get("npy"))
