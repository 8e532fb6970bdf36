"""The section of docs/benchmarks.md on levers that change what is learned, from docs/benchmarks/mathematics.json."""

import json
from pathlib import Path
from typing import Any

COMMAND = "`python -m scripts.bench.mathematics` (about 2,400 CPU seconds a seed)"
TASKS = {"emoji_val": "val", "emoji_test_style": "test_style", "emoji_test_concept": "test_concept"}
WORDS = """Nothing above changes what is learned. These levers do, so they stand apart: each is held against the same tower
without it, on the embedded emoji set, one thread, loader included. All runs have one constant learning rate and are measured by
an average of their weights, so that an accuracy does not depend on when the run was to end. The rule was set before: the target
is 95 % of the val top-1 that the baseline ends with, and the time is that of training until val top-1 first reaches it, on the
straight line between two evaluations. Every arm may take about as long as its baseline. val has {num_val} pictures, so a
difference within its interval says little; {seeds}.
These are runs of minutes on drawings, and no promise for photographs.

{table}

Top-1 at the end of all its training, with 95 % intervals; the prompts are the mean of label, label with keywords, and keywords:

{ends}

Machine: {device}; {commit}. Raw figures with every evaluation: [mathematics.json](benchmarks/mathematics.json), by
{command}.

![time to accuracy](images/benchmarks_mathematics.png)"""


def mathematics_section(path: Path, picture: Path) -> str:
    """Draw the curves to `picture`; return the text."""
    if not path.exists():
        return f"Not measured yet: {COMMAND}."
    figures: list[dict[str, Any]] = json.loads(path.read_text())
    draw_curves(figures, picture)
    seeds = {figure["notes"]["seed"] for figure in figures}
    return WORDS.format(
        table=time_table(figures), ends=end_table(figures), command=COMMAND, num_val=figures[0]["notes"]["num_val"],
        seeds="how far seeds differ was not measured: it is one" if len(seeds) == 1 else f"there are {len(seeds)} seeds",
        device=figures[0]["device"], commit=f"commit {', '.join(sorted({figure['commit'] for figure in figures}))}")


def time_table(figures: list[dict[str, Any]]) -> str:
    lines = ["| lever | tower | seed | target | CPU s without | CPU s with | times faster |", "|---|---|---|---|---|---|---|"]
    for figure in figures:
        notes, took, ratio = figure["notes"], f"{figure['ours']:.0f}", f"{figure['ratio_median']:.2f}"
        if not notes["reached"]:
            took, ratio = f"not reached in {took}", f"below {ratio}"
        lines.append(f"| {notes['lever']} | {notes['tower']} | {notes['seed']} | {notes['target']:.3f} | "
                     f"{figure['peer']:.0f} | {took} | **{ratio}** |")
    return "\n".join(lines)


def end_table(figures: list[dict[str, Any]]) -> str:
    runs = {}
    for notes in sorted((figure["notes"] for figure in figures), key=lambda notes: (notes["seed"], notes["tower"])):
        for arm, lever in (("peer", "none"), ("ours", notes["lever"])):
            run = notes[arm]
            cells = ["{:.3f} [{:.3f}, {:.3f}]".format(*run["final"][task]) for task in TASKS]
            runs[notes["tower"], notes["seed"], lever] = [f"{run['samples']:,}", f"{run['training_cpu_seconds']:.0f}", *cells]
    lines = [f"| tower | seed | lever | samples | CPU s | {' | '.join(TASKS.values())} |", "|---|---|---|---|---|---|---|---|"]
    return "\n".join(lines + ["| " + " | ".join([tower, str(seed), lever, *cells]) + " |"
                              for (tower, seed, lever), cells in runs.items()])


def draw_curves(figures: list[dict[str, Any]], path: Path) -> None:
    """val top-1 over CPU seconds, a panel a lever."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(1, len(figures), figsize=(3 * len(figures), 2.8), layout="constrained", squeeze=False)
    for panel, figure in zip(axes[0], figures, strict=True):
        for arm, name, colour in (("peer", "without", "#8a8a8a"), ("ours", "with", "#3b6fb6")):
            panel.plot(*zip(*figure["notes"][arm]["val"], strict=True), "o-", color=colour, markersize=3, label=name)
        panel.axhline(figure["notes"]["target"], color="#d1495b", linewidth=1)
        panel.set_title("{lever}\n{tower}\nseed {seed}".format(**figure["notes"]), fontsize=7)
        panel.set_xlabel("CPU seconds of training", fontsize=8)
        panel.tick_params(labelsize=8)
    axes[0, 0].set_ylabel("val top-1 (red: target)", fontsize=8)
    axes[0, 0].legend(fontsize=8)
    fig.savefig(path, dpi=110)
    plt.close(fig)
