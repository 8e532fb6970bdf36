"""The script that rebuilds the emoji set, without the packages that it downloads."""

import csv
import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

from clipkit.data.emoji.pack import PACK_FOLDER

SCRIPT = Path(__file__).parents[1] / "scripts" / "build_emoji.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("build_emoji", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_order_and_seen_of_the_shipped_table_follow_from_the_rules(script: ModuleType) -> None:
    text = (PACK_FOLDER / "emoji.csv").read_text(encoding="utf-8")
    shipped = list(csv.DictReader(text.splitlines()))
    names = {row["concept"]: {} for row in shipped}
    mixed = [row | {"index": "?", "seen": "?"} for row in sorted(shipped, key=lambda row: (row["style"], row["label"]))]
    styles = list(dict.fromkeys(row["style"] for row in shipped))
    mixed.sort(key=lambda row: styles.index(row["style"]))
    assert script.csv_text(script.rebuild_rows(mixed, names)) == text


def test_names_come_from_the_top_level_entries_of_emojibase(script: ModuleType) -> None:
    entries = [
        {"hexcode": "1F1F3-1F1F4", "emoji": "🇳🇴", "label": "flag: Norway", "tags": ["NO", "flag"], "group": 9, "subgroup": 3},
        {"hexcode": "0023-FE0F-20E3", "emoji": "#️⃣", "label": "keycap: #", "tags": ["#"], "group": 8, "subgroup": 46},
        {"hexcode": "1F3FB", "emoji": "🏻", "label": "light skin tone", "tags": ["tone"], "group": 2, "subgroup": 1},
        {"hexcode": "1F1E6", "emoji": "🇦", "label": "regional indicator A"},
    ]
    members = {
        "en/data.json": json.dumps(entries).encode(),
        "en/messages.json": b'{"groups": [{"order": 8, "message": "symbols"}, {"order": 9, "message": "flags"}]}',
        "meta/groups.json": b'{"subgroups": {"3": "country-flag", "46": "another"}}',
    }
    assert script.concept_table(members) == {
        "1f1f3-1f1f4": {"emoji": "🇳🇴", "label": "flag of Norway", "tags": "NO;flag", "group": "flags",
                        "subgroup": "country-flag"},
        "23-20e3": {"emoji": "#️⃣", "label": "keycap, #", "tags": "#", "group": "symbols", "subgroup": "food-sweet"},
    }
    assert script.plain_label("man walking: facing right") == "man walking facing right"


def test_a_sheet_survives_writing_and_a_changed_drawing_is_reported(script: ModuleType, tmp_path: Path) -> None:
    drawings = [Image.new("RGB", (64, 64), (0, 8 * number, 255)) for number in range(42)]
    for name in ("a", "b", "c"):
        if name == "c":
            drawings[41] = Image.new("RGB", (64, 64), (9, 255, 255))
        script.write_sheet(tmp_path / name, [script.round_levels(drawing) for drawing in drawings], lossy=False)
    assert script.compare_sheets(tmp_path / "a", tmp_path / "b") == "identical drawings"
    report = script.compare_sheets(tmp_path / "a", tmp_path / "c")
    assert report.startswith("1 drawings differ (the first has index 41), by at most")


def test_levels_are_rounded_to_33(script: ModuleType) -> None:
    ramp = Image.new("RGB", (256, 1))
    ramp.putdata([(value, value, value) for value in range(256)])
    assert len(script.round_levels(ramp).getcolors()) == 33
