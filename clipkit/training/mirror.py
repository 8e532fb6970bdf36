"""A run's checkpoints copied to an object store, and taken from there where the disk lacks them. fsspec does the transport.

A checkpoint counts as there once its manifest is, which is copied last; its files are compared with it when they come back.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec

from clipkit.training.atomic_files import remove_quietly
from clipkit.training.checkpoint_folders import STEP_FOLDER, UNFINISHED, step_folders
from clipkit.training.manifest import MANIFEST, find_damage

RUN_FILES = ("config.yaml", "metrics.jsonl")
PLAIN_NAME = re.compile(r"[\w-][\w.-]*")  # of a file; nothing that leads to another folder


def copy_out(run_dir: Path, url: str) -> None:
    """Copy the newest checkpoint of a run to <url>/<name of the run>/, and drop there what the run has dropped.

    Raises:
      Exception: as the file system's own class raises it; the store may hold a part, without its manifest.
    """
    filesystem, place = _open(url, run_dir.name)
    folders = {folder.name: folder for _, folder in step_folders(run_dir)}
    name, folder = next(iter(folders.items()))
    filesystem.makedirs(f"{place}/checkpoints/{name}", exist_ok=True)
    files = [path for path in sorted(folder.iterdir()) if path.name != MANIFEST] + [folder / MANIFEST]
    for path in files:
        filesystem.put_file(str(path), f"{place}/checkpoints/{name}/{path.name}")
    for file in RUN_FILES:
        if (run_dir / file).exists():
            filesystem.put_file(str(run_dir / file), f"{place}/{file}")
    for old in set(_steps(filesystem, place)) - set(folders):
        filesystem.rm_file(f"{place}/checkpoints/{old}/{MANIFEST}")
        filesystem.rm(f"{place}/checkpoints/{old}", recursive=True)


def copy_in(run_dir: Path, url: str, warn: Callable[[str], None]) -> None:
    """Take the newest whole checkpoint of a run from <url>/<name of the run>/, if it is newer than those on disk.

    Raises:
      OSError: the store cannot be read; one line.
    """
    newest = next((step for step, _ in step_folders(run_dir)), -1)
    try:
        filesystem, place = _open(url, run_dir.name)
        for name in sorted(_steps(filesystem, place), reverse=True):
            if int(name.removeprefix("step-")) <= newest:
                return
            fault = _fetch(filesystem, f"{place}/checkpoints/{name}", run_dir / "checkpoints" / name)
            if fault is None:
                break
            warn(f"the checkpoint {name} in {url} is damaged ({fault}); looking for an older one")
        for file in RUN_FILES:
            if not (run_dir / file).exists() and filesystem.exists(f"{place}/{file}"):
                run_dir.mkdir(parents=True, exist_ok=True)
                filesystem.get_file(f"{place}/{file}", str(run_dir / file))
    except Exception as error:  # fsspec's backends raise classes of their own (botocore, aiohttp, ...)
        raise OSError(f"checkpoint.mirror is {url}, and cannot be read ({type(error).__name__}: {error}); check the address "
                      "and your access to it, or set checkpoint.mirror=null") from error


def _fetch(filesystem: Any, source: str, folder: Path) -> str | None:
    """Bring a checkpoint's folder; returns what is wrong with it, or None."""
    unfinished = folder.with_name(UNFINISHED + folder.name)
    remove_quietly(unfinished)
    unfinished.mkdir(parents=True)
    for path in filesystem.ls(source, detail=False):
        name = str(path).rstrip("/").rpartition("/")[2]
        if PLAIN_NAME.fullmatch(name):
            filesystem.get_file(f"{source}/{name}", str(unfinished / name))
    fault = find_damage(unfinished, ("state.json",))
    if fault is None:
        unfinished.rename(folder)
    else:
        remove_quietly(unfinished)
    return fault


def _open(url: str, name: str) -> tuple[Any, str]:
    filesystem, root = fsspec.url_to_fs(url)
    return filesystem, f"{str(root).rstrip('/')}/{name}"


def _steps(filesystem: Any, place: str) -> list[str]:
    """Names of the checkpoints there that have their manifest."""
    filesystem.invalidate_cache()
    if not filesystem.exists(f"{place}/checkpoints"):
        return []
    found = [str(path).rstrip("/") for path in filesystem.ls(f"{place}/checkpoints", detail=False)]
    names = [path.rpartition("/")[2] for path in found if filesystem.exists(f"{path}/{MANIFEST}")]
    return [name for name in names if STEP_FOLDER.fullmatch(name)]
