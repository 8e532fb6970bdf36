"""What holds in every case here: no process starts, and no file appears outside the test's own folder."""

import os
import subprocess
import tempfile
import tracemalloc
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def nothing_else_happens(tmp_path, monkeypatch):
    """Processes are refused; afterwards the folder of all temporary files and the one above the test's hold what they did."""
    def refuse(*arguments, **options):
        raise AssertionError(f"a process was started: {arguments}")

    place = tmp_path / "work"
    place.mkdir()
    monkeypatch.chdir(place)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("Popen", "run", "call", "check_output"):
        monkeypatch.setattr(subprocess, name, refuse)
    for name in ("system", "popen", "posix_spawn", "execv", "execve"):
        monkeypatch.setattr(os, name, refuse)
    watched = (tmp_path, tmp_path.parent, Path(tempfile.gettempdir()), Path("/"))
    before = [{path.name for path in folder.iterdir()} for folder in watched]
    yield
    for folder, names in zip(watched, before, strict=True):
        appeared = {path.name for path in folder.iterdir()} - names
        assert not [name for name in appeared if "evil" in name], appeared


@pytest.fixture
def place(tmp_path) -> Path:
    """The test's own folder: what is hostile would have to leave it."""
    return tmp_path / "work"


@pytest.fixture
def peak_megabytes():
    """Call a function; what it returned, and the most that Python's allocator held at once beyond what was there, in MB."""
    def measure(function):
        tracemalloc.start()
        try:
            return function(), tracemalloc.get_traced_memory()[1] / 1e6
        finally:
            tracemalloc.stop()

    return measure


class Evil:
    """Makes a folder where it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("../evil",)
