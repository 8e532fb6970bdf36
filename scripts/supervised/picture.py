"""The picture of the comparison: bars with 95 % intervals, seen concepts on the left, unseen ones on the right.

    python -m scripts.supervised.picture runs/emoji_supervised/comparison.json docs/images/supervised.png
"""

import io
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipkit.training.atomic_files import write_bytes_atomically
from clipkit.training.curves import COLOURS, STYLE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOUR_OF = {"CLIP, by text": COLOURS[0], "supervised softmax": COLOURS[1], "nearest training picture": COLOURS[7],
             "probe on CLIP's tower": COLOURS[5], "probe on the supervised tower": COLOURS[4],
             "probe on an ImageNet tower": COLOURS[2]}
SEEN_GROUPS = {"emoji_val": "pictures set aside", "emoji_test_style, seen concepts": "a style never seen"}
UNSEEN = "emoji_test_concept"
GROUP_WIDTH = 0.86  # of the distance of two groups
Group = tuple[str, list[dict[str, Any]]]  # what stands below, rows of the report


def draw(report: dict[str, Any], path: Path) -> None:
    """Write the PNG of a report, as comparison.json holds it."""
    import matplotlib
    from matplotlib.figure import Figure

    seen: list[Group] = [(f"{title}\n({column.partition(',')[0]})", [row for row in report["table"] if row["column"] == column])
                         for column, title in SEEN_GROUPS.items()]
    unseen: list[Group] = [("no label", [row for row in report["table"] if row["column"] == UNSEEN])]
    for k in sorted({row["labels_per_concept"] for row in report["labels"]}):
        unseen.append((f"{k} labelled picture{'s' * (k > 1)}\nof each concept",
                       [row for row in report["labels"] if row["labels_per_concept"] == k]))
    with matplotlib.rc_context(STYLE):  # pyright: ignore[reportArgumentType]
        figure = Figure(figsize=(11, 4.4), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True, width_ratios=(len(seen), len(unseen)))
        draw_groups(left, seen)
        draw_groups(right, unseen)
        left.set_title("concepts of the training set")
        right.set_title(f"concepts never seen ({UNSEEN})")
        left.set_ylabel("share of right answers")
        figure.legend(handles=_handles(report), loc="outside lower center", ncols=len(COLOUR_OF) // 2)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
    write_bytes_atomically(path, buffer.getvalue())


def draw_groups(axes: "Axes", groups: list[Group]) -> None:
    """Draw a bar a row with its interval; words where a method has no answer."""
    for place, (_, rows) in enumerate(groups):
        width = GROUP_WIDTH / len(rows)
        for number, row in enumerate(rows):
            x = place + (number - (len(rows) - 1) / 2) * width
            colour, value = COLOUR_OF[row["method"]], row["value"]
            if value is None:
                axes.text(x, 0.008, "no answer", rotation=90, ha="center", va="bottom", fontsize=8, color=colour)
                continue
            errors = [[value - row["ci_low"]], [row["ci_high"] - value]]
            axes.bar(x, value, 0.92 * width, color=colour, yerr=errors, error_kw={"elinewidth": 1, "ecolor": "#222222"})
            axes.text(x, row["ci_high"] + 0.008, f"{100 * value:.0f}", ha="center", va="bottom", fontsize=8)
    axes.set_xticks(range(len(groups)), [title for title, _ in groups])
    axes.tick_params(axis="x", length=0)
    axes.grid(axis="x", visible=False)
    axes.set_axisbelow(True)


def _handles(report: dict[str, Any]) -> list[Any]:
    from matplotlib.patches import Patch

    shown = {row["method"] for row in (*report["table"], *report["labels"])}
    return [Patch(color=colour, label=method) for method, colour in COLOUR_OF.items() if method in shown]


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), Path(sys.argv[2]))
