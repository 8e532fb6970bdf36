"""The benchmark page: figures in, table and plots out; a line that was not measured says so."""

import json
from dataclasses import replace

import pytest

from scripts.bench.page import exponent, write_page
from scripts.bench.rounds import make_figure, save_figures, take_turns


def growth(axis: str, value: int):
    return make_figure("growth", f"{axis} {value}", [(value * 0.5, value**2.0)], unit="CPU s",
                       peer_version="open_clip_train 3.3.0", threads=1, axis=axis, value=value,
                       memory_bytes={"ours": value, "peer": value**3})


def test_figures_become_a_page(tmp_path):
    figures = [make_figure("loader", "512 px (79 KiB)", [(400, 100), (300, 100), (600, 100)], unit="samples/CPU s", threads=1,
                           peer_version="open_clip_train 3.3.0", more_is_better=True),
               make_figure("loss memory", "clip, B = 16384", [(10, 300)], unit="MiB", threads=1,
                           peer_version="open_clip 3.3.0"),
               *(growth(axis, value) for axis in ("batch size", "caption length", "image size") for value in (8, 16, 32)),
               *(growth("processes", value) for value in (1, 2))]
    path = tmp_path / "docs" / "benchmarks" / "cpu.json"
    save_figures(path, figures[:1])
    save_figures(path, figures)  # the first again: it is replaced
    assert len(json.loads(path.read_text())) == len(figures)
    (tmp_path / "docs" / "images").mkdir()
    table = write_page(path.parent, tmp_path / "docs" / "benchmarks.md")
    assert "| loader, 512 px JPEGs | 400 | 100 | samples/CPU s | **4.00** (3.00 to 6.00) | 3 | 4.5 |" in table
    assert "memory | 10 | 300 | MiB | **30.00**" in table
    assert "| loader, 256 px JPEGs | | | | not measured | 3 | 5 |" in table
    page = (tmp_path / "docs" / "benchmarks.md").read_text()
    assert "| batch size | 8, 16, 32 | 1.00 | 2.00 | 1.00 | 3.00 |" in page
    assert "| processes | 1, 2 | 1.00 | 2.00 | 1.00 | 3.00 |" in page
    assert "## Changes the mathematics\n\nNot measured yet: " in page
    assert "open_clip_train 4" not in page
    save_figures(path.with_name("cpu_open_clip_4.json"), [replace(figures[0], peer_version="open_clip_train 4.2.0")])
    assert write_page(path.parent, tmp_path / "docs" / "benchmarks.md") == table
    newer = (tmp_path / "docs" / "benchmarks.md").read_text()
    assert newer.count("**4.00** (3.00 to 6.00)") == 2 and "The same beside 4.2.0, on " in newer
    assert (tmp_path / "docs" / "images" / "benchmarks.png").stat().st_size > 1000
    assert (tmp_path / "docs" / "images" / "benchmarks_growth.png").stat().st_size > 1000


def test_the_exponent_is_the_slope_of_the_logarithms():
    assert exponent([1, 2, 4], [3, 3 * 2**1.5, 3 * 4**1.5]) == pytest.approx(1.5)


def test_arms_take_turns_and_the_first_round_is_left_out():
    called = []

    def arm(name: str) -> float:
        called.append(name)
        return len(called)

    turns = take_turns({"ours": lambda: arm("ours"), "peer": lambda: arm("peer")}, rounds=2)
    assert called == ["ours", "peer", "peer", "ours", "ours", "peer"]
    assert turns == [(4, 3), (5, 6)]
