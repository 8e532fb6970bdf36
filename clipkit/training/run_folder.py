"""runs/<name>/: config.yaml, environment.json and the lock; a run goes on under the settings that made it."""

import errno
import json
import os
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from clipkit.training.atomic_files import one_line_os_error, write_text_atomically
from clipkit.training.environment import describe_environment

MISSING = object()
UNUSED = (None, False, 0)  # values by which a setting that is younger than the run changes nothing in it


class Run(NamedTuple):
    path: Path
    name: str
    resumed: bool  # the folder was there, with the same identity settings
    lock: TextIO | None  # held until the process ends; None where the file system has no locks

    def close(self) -> None:
        """Give the lock back (the end of the process does it too)."""
        if self.lock is not None:
            self.lock.close()


def open_run_folder(root: Path | str, name: str, *, config: Mapping[str, Any], identity: Mapping[str, Any]) -> Run:
    """Make runs/<name>/, or open it again, and lock it against other processes. Call it on one rank only.

    Args:
      root: The folder of all runs.
      name: The run's name: one folder name.
      config: All settings, nested, of plain values (tuples and paths are written as lists and texts).
      identity: {dotted key: value} of the settings that may not change; see `clipkit.config.schema.identity`. All
        others are runtime settings: config.yaml takes their new values.

    Returns:
      The run. `resumed` says that the folder was there; whether it has a checkpoint is another question.

    Raises:
      ValueError: the name is no folder name; the run has other identity settings (all are listed); another process
        writes this run.
      OSError: the folder cannot be made or written; one line.
    """
    path = Path(root) / check_run_name(name)
    config_file = path / "config.yaml"
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = _lock(path)
    except FileExistsError as error:
        raise NotADirectoryError(f"{path} is a file, and the run needs a folder there; choose another name") from error
    except OSError as error:
        raise one_line_os_error(error, path) from error
    try:
        resumed = config_file.exists()
        if resumed:
            _check_identity(path, _read_config(config_file), identity)
        write_text_atomically(config_file, _to_yaml(config))
        _write_environment(path / "environment.json")
    except BaseException:
        if lock is not None:
            lock.close()
        raise
    return Run(path, name, resumed, lock)


def check_run_name(name: str) -> str:
    """Return the name if it can be one folder's name.

    Raises:
      ValueError: it cannot.
    """
    bad = not name or name in (".", "..") or len(name.encode()) > 200 or name != name.strip()
    if bad or any(letter in "/\\" or not letter.isprintable() for letter in name):
        raise ValueError(f"name is {name!r}; give a folder name without / or \\, such as name=my_run (the runs' folder "
                         "is another setting)")
    return name


def _check_identity(path: Path, saved: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    """Raise ValueError that lists every identity setting whose value is not the run's."""
    differences = []
    for key, value in identity.items():
        before, given = _look_up(saved, key), _plain(value)
        if isinstance(before, dict) and isinstance(given, dict):
            pairs = [(f"{key}.{inner}", before.get(inner, MISSING), given.get(inner, MISSING))
                     for inner in [*given, *(inner for inner in before if inner not in given)]]
        else:
            pairs = [(key, before, given)]
        differences += [f"{inner}: run has {_show(old)}, given {_show(new)}" for inner, old, new in pairs
                        if old != new and not (old is MISSING and new in UNUSED)]
    if differences:
        raise ValueError(f"the run {path} was started with other settings ({'; '.join(differences)}); give the run's "
                         "values to go on with it, or another name=... to start a new run")


def _look_up(config: Mapping[str, Any], key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return MISSING
        value = value[part]
    return value


def _show(value: Any) -> str:
    return "no value" if value is MISSING else json.dumps(value)


def _read_config(path: Path) -> dict[str, Any]:
    import yaml

    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not readable as YAML ({' '.join(str(error).split())}); put it right, or choose "
                         "another name") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds no settings; put it right, or choose another name")
    return config


def _to_yaml(config: Mapping[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(_plain(config), sort_keys=False, allow_unicode=True)


def _plain(value: Any) -> Any:
    """What YAML gives back: tuples as lists, paths as texts."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _write_environment(path: Path) -> None:
    """Write this session's environment; those of earlier sessions stay in its field `earlier`, where they differ."""
    environment = describe_environment()
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        earlier = before.pop("earlier", [])
        if before != environment:
            earlier.append(before)
    except (FileNotFoundError, ValueError, AttributeError):
        earlier = []
    record = {**environment, "earlier": earlier} if earlier else environment
    write_text_atomically(path, json.dumps(record, indent=1) + "\n")


def _lock(path: Path) -> TextIO | None:
    """Take the run's lock. It is this process's alone: loader workers that outlive a killed run do not hold it."""
    if sys.platform == "win32":
        return None
    import fcntl

    file = (path / ".lock").open("a+", encoding="utf-8")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            file.close()  # ENOLCK, ENOSYS, ENOTSUP: a network file system without locks
            return None
        file.seek(0)
        holder = file.read().strip() or "another process"
        file.close()
        raise ValueError(f"{holder} is writing the run {path}; wait until it ends, stop it, or choose another "
                         "name") from error
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    return file
