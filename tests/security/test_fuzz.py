"""The fuzzer: a quick run finds nothing, and what it would find ends it with code 1 and is kept."""

import json
import sys

import pytest

from scripts import fuzz

pytest.importorskip("hypothesis")


def run(monkeypatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["fuzz", *arguments])
    return fuzz.main()


@pytest.mark.slow
def test_a_quick_run_finds_no_crash_no_hang_and_no_stray_file(place, monkeypatch, capsys):
    assert run(monkeypatch, "--minutes", "0.05", "--seed", "7", "--json", "table.json") == 0
    table = json.loads((place / "table.json").read_text())
    assert sum(table["inputs"].values()) > 20 and table["failures"] == table["files_outside"] == []
    assert not (place / "fuzz-failures").exists()


def test_a_crash_and_a_slow_input_are_kept_and_counted(place, monkeypatch):
    def crash(data, tokenize):
        if data == b"slow":
            yield "picture"
        else:
            raise KeyError("x")

    seconds = iter((0.0, 0.1, 0.0, 6.0))
    monkeypatch.setitem(fuzz.READERS, "picture", crash)
    monkeypatch.setattr(fuzz.time, "process_time", lambda: next(seconds))
    tally = fuzz.Tally()
    for data in (b"bad", b"slow"):
        fuzz.try_one("picture", data, tally, place, len)
    assert tally.failures == ["picture-0: KeyError: 'x'", "picture-1: took 6.0 s"]
    assert [(place / f"picture-{number}").read_bytes() for number in (0, 1)] == [b"bad", b"slow"]
    assert tally.slowest == (6.0, "picture")
