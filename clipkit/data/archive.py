"""Open a tar of unknown origin and read its headers: what a hostile one can make tarfile do is bounded here.

What samples its members make is tars.py.
"""

import bz2
import gzip
import lzma
import tarfile
import zlib
from collections.abc import Callable
from typing import IO, Any, cast

from clipkit.data.remote import READ_BUFFER_BYTES

MAX_HEADER_BYTES = 2**20  # of a pax or GNU long-name header, which is read whole
MAX_ARCHIVE_BYTES = 2**60  # no file system seeks beyond 2**63
SAFE_EXPANSION_BYTES = 2**28  # that a compressed archive may always give
MAX_EXPANSION = 100  # beyond them, times the compressed bytes; pictures hardly shrink, captions to a tenth
DECOMPRESSORS: dict[bytes, Callable[[Any], Any]] = {
    b"\x1f\x8b": lambda file: gzip.GzipFile(fileobj=file, mode="rb"), b"BZh": bz2.BZ2File, b"\xfd7zXZ\x00": lzma.LZMAFile}
DAMAGE = (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError)  # what a cut or corrupt archive raises


class _Header(tarfile.TarInfo):
    """A tar header that tells how the archive ended: tarfile itself takes any damaged header for a regular end."""

    @classmethod
    def fromtarfile(cls, archive: Any) -> "_Header":
        try:
            return super().fromtarfile(archive)
        except (ValueError, IndexError, RecursionError) as error:  # header after header about the next one, for one
            raise tarfile.ReadError(f"headers that cannot be read ({type(error).__name__})") from error
        except Exception as error:  # of whatever class: noted, and raised on
            archive.ended_by = error
            raise

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "_Header":
        # Nearly all members are plain files with short names; tarfile's own parse of one takes several times as long.
        if buf[156:157] == tarfile.REGTYPE and buf[257:262] == b"ustar" and buf[345:346] == b"\0" and len(buf) == 512:
            digits, checksum = buf[124:136].rstrip(b"\0 "), buf[148:156].strip(b"\0 ")
            octal = digits and checksum and not (digits + checksum).strip(b"01234567")
            if octal and int(checksum, 8) == 256 + sum(buf) - sum(buf[148:156]):
                header = cls(bytes(buf[:100]).partition(b"\0")[0].decode(encoding, errors))
                header.size = int(digits, 8)
                return header
        header = super().frombuf(buf, encoding, errors)
        too_large = header.type not in tarfile.REGULAR_TYPES and header.size > MAX_HEADER_BYTES
        if not 0 <= header.size < MAX_ARCHIVE_BYTES or too_large:  # tarfile would go backwards, for ever, or read it whole
            raise tarfile.HeaderError(f"a header of {header.size} bytes")  # pyright: ignore
        if header.type == tarfile.GNUTYPE_SPARSE and buf[482]:
            raise tarfile.HeaderError("a sparse member in many parts")  # pyright: ignore
        return header

    def _proc_pax(self, archive: Any) -> tarfile.TarInfo:
        """Take name and size from a pax header; in the place of tarfile's.

        That one needs time with the square of the header's length (before Python 3.11.10), lets the size be negative, keeps
        all global headers to apply them to every member, and reads a sparse member's map of any length.
        """
        fields = _pax_fields(archive.fileobj.read(self.size + -self.size % tarfile.BLOCKSIZE)[:self.size])
        try:
            member = self.fromtarfile(archive)
        except tarfile.HeaderError as error:  # pyright: ignore
            raise tarfile.SubsequentHeaderError(str(error)) from None  # pyright: ignore
        if self.type == tarfile.XGLTYPE:
            return member
        if b"path" in fields:
            member.name = fields[b"path"].decode("utf-8", "surrogateescape").rstrip("/")
        if b"size" in fields and member.isreg():
            if not fields[b"size"].isdigit() or len(fields[b"size"]) > len(str(MAX_ARCHIVE_BYTES)):
                raise tarfile.HeaderError(f"a size of {fields[b'size'][:20]!r}")  # pyright: ignore
            member.size = int(fields[b"size"])
            archive.offset = member.offset_data + member.size + -member.size % tarfile.BLOCKSIZE
        if any(field.startswith(b"GNU.sparse.") for field in fields):
            member.sparse = []  # pyright: ignore[reportAttributeAccessIssue] -- its bytes are no file as they stand: passed over as tarfile's own sparse members
        return member


class Archive(tarfile.TarFile):
    """A tar being read.

    Attributes:
      ended_by: the error that ended it, of a regular end too; None before.
    """

    ended_by: Exception | None = None
    tarinfo = _Header


def open_archive(file: IO[bytes]) -> Archive:
    """Open a tar, compressed or not, by its content.

    Args:
      file: buffered, at its start; need not be seekable.

    Raises:
      tarfile.TarError, EOFError, zlib.error, lzma.LZMAError: it is none.
    """
    start = file.peek(6)[:6]  # pyright: ignore[reportAttributeAccessIssue]
    decompressor = next((one for magic, one in DECOMPRESSORS.items() if start.startswith(magic)), None)
    mode = "r:" if file.seekable() and decompressor is None else "r|"
    source: Any = _Expanded(file, decompressor) if decompressor else file
    return cast(Archive, Archive.open(fileobj=source, mode=mode, bufsize=READ_BUFFER_BYTES))


class _Expanded:
    """The bytes in a compressed file, a buffer at a time. tarfile's own stream expands 64 KiB at once, be it to 60 GB."""

    def __init__(self, file: IO[bytes], decompressor: Callable[[Any], Any]) -> None:
        self.compressed, self.num_read, self.num_given = file, 0, 0
        self.decompressed = decompressor(_Reads(self))

    def read(self, size: int) -> bytes:
        try:
            data = self.decompressed.read1(size)  # what came before a cut is given before its error
        except OSError as error:  # gzip's and bz2's word for damage; an error of the connection has a number or its own class
            if type(error) in (OSError, gzip.BadGzipFile) and error.errno is None:
                raise tarfile.ReadError(str(error)) from error
            raise
        self.num_given += len(data)
        if self.num_given > SAFE_EXPANSION_BYTES + MAX_EXPANSION * self.num_read:
            raise tarfile.ReadError(f"a decompression bomb: {self.num_given:,} bytes came out of {self.num_read:,}")
        return data


class _Reads:
    """What a decompressor reads from, counted."""

    def __init__(self, expanded: _Expanded) -> None:
        self.expanded = expanded

    def read(self, size: int = -1) -> bytes:
        data = self.expanded.compressed.read(size)
        self.expanded.num_read += len(data)
        return data

    def seekable(self) -> bool:
        return False

    def readable(self) -> bool:
        return True


def _pax_fields(data: bytes) -> dict[bytes, bytes]:
    """The fields of a pax header: each is "<its length> <name>=<value>" and a line feed."""
    fields, at = {}, 0
    while at < len(data) and data[at]:
        digits, _, _ = data[at:at + 20].partition(b" ")
        end = at + int(digits) if digits.isdigit() else at
        name, equals, value = data[at + len(digits) + 1:end].partition(b"=")
        if not equals or data[end - 1:end] != b"\n":
            raise tarfile.HeaderError("a damaged pax header")  # pyright: ignore
        fields[name] = value[:-1]
        at = end
    return fields
