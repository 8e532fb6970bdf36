"""docs/clip.md sets the method beside the code: the lines that it quotes stand in the files that it names."""

import re
from pathlib import Path

PAGE = Path(__file__).resolve().parents[1] / "docs" / "clip.md"


def test_the_lines_beside_the_method_stand_in_the_source():
    quoted = re.findall(r"^\| [^|]* \| `([^`|]+)` \| \[[^|]*\]\(([^|]+)\) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(quoted) == 13
    for line, link in quoted:
        source = (PAGE.parent / link).read_text(encoding="utf-8").splitlines()
        assert line in {one.split("  #")[0].strip() for one in source}, f"{line} is not in {link}"
