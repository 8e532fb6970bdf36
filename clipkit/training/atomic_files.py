"""Files that are either whole or not there: write under another name, fsync, rename. And one-line errors for disks."""

import errno
import os
import re
import shutil
from pathlib import Path

CAUSES = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the disk quota is used up", errno.EFBIG: "the file is too "
          "large for this disk or process limit", errno.EROFS: "the file system is read-only",
          errno.EACCES: "no permission to write there", errno.EPERM: "no permission to write there",
          errno.ENOTDIR: "a part of that path is a file, not a folder", errno.EIO: "the disk reports an I/O error"}
CURES = {errno.ENOSPC: "free some space, or write elsewhere", errno.EDQUOT: "free some space, or write elsewhere"}


def write_text_atomically(path: Path, text: str) -> None:
    """`write_bytes_atomically` for UTF-8 text."""
    write_bytes_atomically(path, text.encode("utf-8"))


def write_bytes_atomically(path: Path, content: bytes) -> None:
    """Write a small file so that a reader, or a crash, meets the old content or the new one and nothing between.

    Raises:
      OSError: the file cannot be written (the old one stays); one line that says why.
    """
    temporary = path.with_name(f".tmp-{path.name}")
    try:
        remove_quietly(temporary)  # a link that stands there would be followed
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        fsync_folder(path.parent)
    except OSError as error:
        remove_quietly(temporary)
        raise one_line_os_error(error, path) from error


def fsync_file(path: Path) -> None:
    """Make the bytes of a file survive a power cut."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def fsync_folder(path: Path) -> None:
    """Make the names in a folder survive a power cut (file systems without this, such as some FUSE ones, pass)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(descriptor)


def remove_quietly(path: Path) -> None:
    """Remove a file or a folder if it is there and can be removed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
        return
    try:
        path.unlink(missing_ok=True)
    except OSError:
        return


def one_line_os_error(error: Exception, path: Path, after: str = "") -> OSError:
    """Say in one line what could not be written, why, and what to do.

    Args:
      error: An OSError, or an error of safetensors, which names the system's error number in its text.
      path: What was being written.
      after: A further clause, such as what is still good.

    Returns:
      The OSError to raise, with `errno` set.
    """
    number = error.errno if isinstance(error, OSError) else None
    found = re.search(r"os error (\d+)", str(error))
    if number is None and found:
        number = int(found.group(1))
    cause = CAUSES.get(number or 0) or (os.strerror(number) if number else " ".join(str(error).split()))
    cure = CURES.get(number or 0, "choose a folder that can be written")
    if number in (errno.ENOSPC, errno.EDQUOT):
        cause += _free_space(path)
    clear = OSError(f"cannot write {path}: {cause}; {cure}{'; ' + after if after else ''}")
    clear.errno = number
    return clear


def _free_space(path: Path) -> str:
    there = next((folder for folder in (path, *path.parents) if folder.exists()), None)
    return f" ({shutil.disk_usage(there).free / 1e9:.2f} GB free)" if there else ""
