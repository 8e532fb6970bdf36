"""The folders of a run's checkpoints: whole or not there, and the old ones dropped. What is in one: checkpoint.py."""

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from clipkit.training.atomic_files import fsync_folder, one_line_os_error, remove_quietly, write_text_atomically
from clipkit.training.manifest import write_manifest

STEP_FOLDER = re.compile(r"step-(\d{8,})")
REPLACED, UNFINISHED = ".replaced-", ".tmp-"


@contextlib.contextmanager
def unfinished_checkpoint(run_dir: Path, step: int) -> Iterator[Path]:
    """Have an empty folder to write a checkpoint to: at the end it takes its name, or, after an error, is removed.

    Raises:
      OSError: as `save_checkpoint`.
    """
    folder = run_dir / "checkpoints" / f"step-{step:08d}"
    unfinished = folder.with_name(f"{UNFINISHED}{folder.name}")
    try:
        remove_quietly(unfinished)
        unfinished.mkdir(parents=True)
        yield unfinished
        write_manifest(unfinished)
        fsync_folder(unfinished)
        _replace_folder(unfinished, folder)
        write_text_atomically(folder.parent / "latest", folder.name + "\n")
    except Exception as error:
        remove_quietly(unfinished)
        if isinstance(error, OSError) or type(error).__name__ == "SafetensorError":
            good = next(iter(step_folders(run_dir)), None)
            after = f"the last good checkpoint is {good[1].name}" if good else "there is no earlier checkpoint"
            raise one_line_os_error(error, folder, after) from error
        raise


def step_folders(run_dir: Path) -> list[tuple[int, Path]]:
    """The (step, folder) of all checkpoints, the newest first; whole or not."""
    checkpoints = run_dir / "checkpoints"
    found = checkpoints.iterdir() if checkpoints.is_dir() else ()
    steps = [(int(match.group(1)), path) for path in found if (match := STEP_FOLDER.fullmatch(path.name))]
    return sorted(steps, reverse=True)


def prune_checkpoints(run_dir: Path | str, keep: int, keep_every_steps: int | None = None) -> list[Path]:
    """Remove old checkpoints: the newest `keep` stay, and those whose step is a multiple of `keep_every_steps`.

    Returns:
      The folders removed.
    """
    if keep < 1:
        raise ValueError(f"keep is {keep}; keep at least 1 checkpoint")
    removed = []
    for step, folder in step_folders(Path(run_dir))[keep:]:
        if not keep_every_steps or step % keep_every_steps:
            hidden = folder.with_name(UNFINISHED + folder.name)  # renamed first: a removal may be cut off
            remove_quietly(hidden)
            folder.rename(hidden)
            remove_quietly(hidden)
            removed.append(folder)
    return removed


def remove_leftovers(checkpoints: Path) -> None:
    if not checkpoints.is_dir():
        return
    for path in list(checkpoints.iterdir()):
        if path.name.startswith(REPLACED):
            original = path.with_name(path.name.removeprefix(REPLACED))
            if not original.exists():
                os.rename(path, original)
        if path.name.startswith((UNFINISHED, REPLACED)):
            remove_quietly(path)


def _replace_folder(new: Path, folder: Path) -> None:
    """Rename `new` to `folder`; if one is there, it is set aside first, where `remove_leftovers` would find it."""
    replaced = folder.with_name(REPLACED + folder.name)
    if folder.exists():
        remove_quietly(replaced)
        os.rename(folder, replaced)
    try:
        os.rename(new, folder)
    except OSError:
        if replaced.exists() and not folder.exists():
            os.rename(replaced, folder)
        raise
    fsync_folder(folder.parent)
    remove_quietly(replaced)
