"""A folder that appears whole or not at all: made hidden beside its place, then renamed."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from clipkit.training.atomic_files import fsync_file, fsync_folder, one_line_os_error, remove_quietly

PROVENANCE = "clipkit_export.json"  # an export has it; only folders that have it are replaced


def refuse_taken(out: Path, *, overwrite: bool, marker: str = PROVENANCE) -> None:
    """Raise ValueError if something is at `out` that may not be replaced: only a folder with the marker in it may."""
    if not os.path.lexists(out):
        return
    if not overwrite:
        raise ValueError(f"out is {out}, which exists; give another folder, or overwrite=true to replace an export")
    if not (out / marker).is_file():
        raise ValueError(f"out is {out}, which is no folder that clipkit wrote (it has no {marker}); nothing else is replaced: "
                         "give another folder")


@contextlib.contextmanager
def whole_folder(out: Path, *, overwrite: bool, marker: str = PROVENANCE) -> Iterator[Path]:
    """Yield an empty hidden folder; at the end it is moved to `out`, or, after an error, removed.

    Raises:
      ValueError: `out` is taken.
      OSError: the disk refuses; one line. What was at `out` is as it was.
    """
    from safetensors import SafetensorError

    refuse_taken(out, overwrite=overwrite, marker=marker)
    hidden = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        hidden.mkdir()
        yield hidden
        for path in hidden.rglob("*"):
            if path.is_file():
                path.chmod(hidden.stat().st_mode & 0o666)  # safetensors makes files that only their owner reads
            (fsync_folder if path.is_dir() else fsync_file)(path)
        _move(hidden, out)
        fsync_folder(out.parent)
    except (OSError, SafetensorError) as error:
        if isinstance(error, OSError) and error.errno is None:
            raise
        raise one_line_os_error(error, out) from error
    finally:
        remove_quietly(hidden)


def _move(hidden: Path, out: Path) -> None:
    """Rename; an older export goes out of the way first, and comes back if that fails."""
    before = out.with_name(f"{hidden.name}.before")
    if out.exists():
        out.rename(before)
    try:
        hidden.rename(out)
    except OSError:
        if before.exists():
            before.rename(out)
        raise
    remove_quietly(before)
