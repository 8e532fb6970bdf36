"""The manifest of a folder: the size and sha256 of each file in it, by which damage is recognised later."""

import hashlib
import json
from pathlib import Path

from clipkit.training.atomic_files import fsync_file

MANIFEST = "manifest.json"


def write_manifest(folder: Path) -> None:
    """Fsync every file of a folder and write manifest.json beside them, fsynced too."""
    files = {}
    for path in sorted(folder.iterdir()):
        fsync_file(path)
        files[path.name] = {"size": path.stat().st_size, "sha256": _sha256(path)}
    (folder / MANIFEST).write_text(json.dumps({"files": files}, indent=1), encoding="utf-8")
    fsync_file(folder / MANIFEST)


def find_damage(folder: Path, required: tuple[str, ...] = ()) -> str | None:
    """Compare a folder with its manifest.

    Args:
      folder: Where manifest.json is.
      required: Files that the manifest has to list.

    Returns:
      None if every listed file is whole, else the first fault in a few words.
    """
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        listed = {str(name): (int(one["size"]), str(one["sha256"])) for name, one in files.items()}
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError):
        return f"{MANIFEST} is not readable"
    for name in (*required, *listed):
        if name not in listed:
            return f"{MANIFEST} does not list {name}"
        if Path(name).name != name:
            return f"{MANIFEST} lists {name!r}, which is no file of the folder"
        if not (folder / name).is_file():
            return f"{name} is missing"
        if (size := (folder / name).stat().st_size) != listed[name][0]:
            return f"{name} has {size} bytes in the place of {listed[name][0]}"
    for name, (_, expected) in listed.items():
        try:
            if _sha256(folder / name) != expected:
                return f"{name} has another sha256 than in {MANIFEST}"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
    return None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
