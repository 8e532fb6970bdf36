"""Draw docs/benchmarks.md and its plots from the figures in docs/benchmarks/: cpu.json, mathematics.json and those of SECTIONS.

  python -m scripts.bench.page
"""

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

from scripts.bench.mathematics_page import mathematics_section

Figures = dict[tuple[str, str], dict[str, Any]]


class Row(NamedTuple):
    """A line of the table: what is compared, and the ratios that it is held against."""

    what: str
    bench: str
    case: str  # how the figure's case begins
    floor: float
    goal: float


class Section(NamedTuple):
    """A second table of the page, from a file of its own."""

    file: str  # in docs/benchmarks
    title: str
    words: str  # before the table; {version} and {device} are those of the figures


ROWS = (
    Row("loader, 256 px JPEGs", "loader", "256 px", 3, 5),
    Row("loader, 512 px JPEGs", "loader", "512 px", 3, 4.5),
    Row("loader, 1024 px JPEGs", "loader", "1024 px", 3, 4),
    Row("text tower of ViT-B/32, alt-text captions", "text tower", "ViT-B-32, alt-text", 2.5, 4.5),
    Row("text tower of ViT-B/32, long captions", "text tower", "ViT-B-32, long", 1.0, 1.15),
    Row("text tower of ViT-B/32, all captions at 77 tokens", "text tower", "ViT-B-32, full", 1.0, 1.15),
    Row("whole step of ViT-B/32, alt-text captions", "step", "ViT-B-32, alt-text", 1.3, 1.7),
    Row("whole step of ViT-B/32, all captions at 77 tokens", "step", "ViT-B-32, full", 1.0, 1.15),
    Row("end to end from 512 px shards, 20 M parameters, 112 px", "end to end", "20 M", 1.7, 2.5),
    Row("four micro-batches, 20 M parameters, all captions at 77 tokens", "gradient caching", "20 M parameters, 112 px, full",
        1.1, 1.3),
    Row("four micro-batches, 20 M parameters, alt-text captions", "gradient caching", "20 M parameters, 112 px, alt-text",
        1.1, 1.3),
    Row("loss, B = 16,384, D = 512: time", "loss", "clip, B = 16384", 1.0, 1.5),
    Row("loss, B = 16,384, D = 512: memory", "loss memory", "clip, B = 16384", 10, 25),
)
GPU_ROWS = ("step of ViT-B/32", "step of ViT-L/14", "end to end, ViT-B/32, 16 cores", "peak memory at equal batch",
            "largest batch of ViT-B/32 on one GPU", "MFU on useful tokens, B/32, B/16, L/14")
AXES = ("batch size", "caption length", "image size", "processes")
WORDS = """# Benchmarks

clipkit beside open_clip_train {version}, its own unpatched code in an environment of its own, on the same pictures, captions,
weights, batch, precision and threads. Before a time is taken, loss and gradients (of the loader: pixels and tokens) are
compared. The arms take turns; a ratio is taken within a round, and the median of the rounds is shown with the lowest and the
highest. Above 1: clipkit needs less. Times are processor seconds of one thread, which other programs on the machine change
least; loader and end to end read in the process that trains.

    make bench                    # all of it, a quarter of an hour, this page redrawn
    make bench ARGS="--only step" # loader, step, loss or growth alone
    make bench ARGS=--full        # larger batches, all sizes

Machine: {device}. The raw figures with every round: [cpu.json](benchmarks/cpu.json).

{table}

![ratios](images/benchmarks.png)

{sections}## What makes the difference

- **Loader.** JPEGs are decoded by libjpeg-turbo (simplejpeg) and resized in uint8; batches stay uint8, channels last, and are
  normalised on the device; words are encoded once. The pictures are made by seed, with as many bytes as web photographs (27, 79
  and 241 KiB at 256, 512 and 1024 px of the shorter side). Half of the time at 256 px and three quarters at 1024 px is
  libjpeg-turbo's decoding, which the peer's Pillow uses too, so the ratio falls as pictures grow. Shards resized once to 256 px
  speed up any loader by more than all of this.
- **Text.** In a causal tower that pools at the end of text, nothing after it reaches the features: captions are laid end to
  end without padding (on GPUs sorted into a few groups), attention takes those of one length together, and of the last block
  only what is pooled is computed.
- **Image.** Of the last block of a ViT that pools its class token, only that token is computed. Attention is one call.
- **Loss.** Tiles of the logits in four matrix products; B x G is never held ([the code](../clipkit/losses/blockwise.py)).
- **Large batches.** `train.micro_batch_size` takes the loss once over all features ([the
  code](../clipkit/training/gradient_cache.py)); open_clip's accumulation takes it once for each micro-batch, and its
  temperature gradient comes out multiplied by their number.

All of these are exact: equal to open_clip's towers and losses up to the order of sums, value and gradients, in
tests/test_attention.py, test_blockwise_losses.py and test_gradient_cache.py. What remains is matrix products: 80 % of the time
of the text tower at 77 tokens, at 80 of about 100 possible GFLOP/s of a core.

## How it grows

One step of the model of 20 M parameters on a resident batch, and the exponent b of time ~ value^b and memory ~ value^b.
Memory is that of the whole process, with libraries, weights and what earlier sizes left behind, so that it hardly grows at
these sizes. Over processes (gloo, a global batch of 64, one thread each) the seconds are summed over the ranks, so that an
exponent of 0 would be free of cost, and memory is the most of one rank; what is added is each rank's own optimizer step, the
exchange of gradients, and products of fewer rows. Time by the clock is left out: it needs a core for each process.

{growth}

![growth](images/benchmarks_growth.png)

## Changes the mathematics

{mathematics}

## On a GPU

`make bench-gpu` runs the steps of ViT-B/32, B/16 and L/14, timed when the GPU has finished. {gpu}
"""
SECTIONS = (
    Section("cpu_amx.json", "On a processor with matrix units", """\
The first table's cases, fp32, on another machine: {device} (AVX-512, AMX).

    make bench ARGS="--out docs/benchmarks/cpu_amx.json"
"""),
    Section("cpu_open_clip_4.json", "Beside open_clip_train 4", """\
The same beside {version}, on {device}; of two tables of one machine the lower
ratio counts. The environment is yours to make: any Python with open_clip_train 4 and webdataset 0.2.86. Its texts of variable
length need another text tower than ViT-B/32's, and a tokenizer with a token of its own for padding, so that they are no setting
of the same model.

    python -m scripts.bench --peer-python <python> --only loader step loss --out docs/benchmarks/cpu_open_clip_4.json
"""),
    Section("cpu_amx_bf16.json", "In bfloat16", """\
Both under bfloat16 autocast, on the same machine, whose matrix units multiply it.

    python -m scripts.bench.step --peer-python <python> --precision amp_bf16 --out docs/benchmarks/cpu_amx_bf16.json
"""),
)


def write_page(folder: Path, page: Path) -> str:
    """Write the page and its plots; return the table."""
    figures = read(folder / "cpu.json")
    table = table_of(figures)
    first = next(iter(figures.values()))
    images = page.parent / "images"
    page.write_text(WORDS.format(version=versions_of(figures), device=first["device"], table=table,
                                 sections="".join(section_text(section, folder) for section in SECTIONS),
                                 growth=growth_table(figures),
                                 mathematics=mathematics_section(folder / "mathematics.json",
                                                                 images / "benchmarks_mathematics.png"),
                                 gpu=f"Not measured yet: {'; '.join(GPU_ROWS)}."))
    draw_ratios(figures, images / "benchmarks.png")
    draw_growth(figures, images / "benchmarks_growth.png")
    return table


def section_text(section: Section, folder: Path) -> str:
    """The section with its table, or nothing where it has not been measured."""
    if not (folder / section.file).exists():
        return ""
    figures = read(folder / section.file)
    words = section.words.format(version=versions_of(figures), device=next(iter(figures.values()))["device"])
    return f"## {section.title}\n\n{words}\n{table_of(figures, all_rows=False)}\n\n"


def versions_of(figures: Figures) -> str:
    """The versions of open_clip_train that stand in the figures."""
    name, peers = "open_clip_train ", {figure["peer_version"] for figure in figures.values()}
    return ", ".join(sorted(peer.removeprefix(name) for peer in peers if name in peer))


def read(path: Path) -> Figures:
    return {(figure["bench"], figure["case"]): figure for figure in json.loads(path.read_text())}


def figures_of(figures: Figures, row: Row) -> list[dict[str, Any]]:
    return [figure for (bench, case), figure in figures.items() if bench == row.bench and case.startswith(row.case)]


def table_of(figures: Figures, *, all_rows: bool = True) -> str:
    lines = ["| | clipkit | open_clip | unit | ratio (lowest to highest) | floor | goal |", "|---|---|---|---|---|---|---|"]
    for row in ROWS:
        for figure in figures_of(figures, row):
            size = f", {figure['case'].rpartition(', ')[2]}" if "B = " in figure["case"] and "B = " not in row.what else ""
            lines.append(f"| {row.what}{size} | {number(figure['ours'])} | {number(figure['peer'])} | {figure['unit']} | "
                         f"**{figure['ratio_median']:.2f}** ({figure['ratio_min']:.2f} to {figure['ratio_max']:.2f}) | "
                         f"{row.floor:g} | {row.goal:g} |")
        if all_rows and not figures_of(figures, row):
            lines.append(f"| {row.what} | | | | not measured | {row.floor:g} | {row.goal:g} |")
    return "\n".join(lines)


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def along(figures: Figures, axis: str) -> list[dict[str, Any]]:
    found = [figure for (bench, _), figure in figures.items() if bench == "growth" and figure["notes"]["axis"] == axis]
    return sorted(found, key=lambda figure: figure["notes"]["value"])


def exponent(values: list[float], costs: list[float]) -> float:
    """Slope of the least-squares line through the logarithms."""
    x, y = [math.log(value) for value in values], [math.log(cost) for cost in costs]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    return (sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x))


def growth_table(figures: Figures) -> str:
    lines = ["| against | values | time, clipkit | time, open_clip | memory, clipkit | memory, open_clip |",
             "|---|---|---|---|---|---|"]
    for axis in AXES:
        points = along(figures, axis)
        if len(points) < 2:
            lines.append(f"| {axis} | not measured | | | | |")
            continue
        values = [point["notes"]["value"] for point in points]
        cells = [exponent(values, [point[arm] for point in points]) for arm in ("ours", "peer")]
        cells += [exponent(values, [point["notes"]["memory_bytes"][arm] for point in points]) for arm in ("ours", "peer")]
        lines.append(f"| {axis} | {', '.join(map(str, values))} | " + " | ".join(f"{cell:.2f}" for cell in cells) + " |")
    return "\n".join(lines)


def draw_ratios(figures: Figures, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = [(row, figure) for row in ROWS for figure in figures_of(figures, row)]
    fig, axes = plt.subplots(figsize=(9, 0.36 * len(found) + 1.2), layout="constrained")
    for place, (row, figure) in enumerate(reversed(found)):
        ratio = figure["ratio_median"]
        axes.barh(place, ratio, color="#3b6fb6", height=0.62)
        axes.plot([figure["ratio_min"], figure["ratio_max"]], [place, place], color="#1a1a1a", linewidth=1)
        axes.plot([row.goal, row.goal], [place - 0.4, place + 0.4], color="#d1495b", linewidth=2)
        axes.text(max(ratio, figure["ratio_max"], row.goal) * 1.04, place, f"{ratio:.2f}", va="center", fontsize=8)
    axes.set_yticks(range(len(found)), [row.what for row, _ in reversed(found)], fontsize=8)
    axes.set_xscale("log")
    axes.axvline(1, color="#999999", linewidth=1)
    axes.set_xlabel("times less than open_clip_train (line: lowest to highest; red: the goal)", fontsize=8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    fig.savefig(path, dpi=110)
    plt.close(fig)


def draw_growth(figures: Figures, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(2, len(AXES), figsize=(11, 5), layout="constrained")
    for column, axis in enumerate(AXES):
        points = along(figures, axis)
        values = [point["notes"]["value"] for point in points]
        for arm, name, colour in (("ours", "clipkit", "#3b6fb6"), ("peer", "open_clip_train", "#e08a3c")):
            axes[0, column].plot(values, [point[arm] for point in points], "o-", color=colour, label=name)
            axes[1, column].plot(values, [point["notes"]["memory_bytes"][arm] / 1e9 for point in points], "o-", color=colour)
        axes[0, column].set_title(f"against {axis}", fontsize=9)
        for row, label in enumerate(("CPU s a step", "peak memory, GB")):
            axes[row, column].set_ylim(bottom=0)
            axes[row, column].tick_params(labelsize=8)
            if column == 0:
                axes[row, column].set_ylabel(label, fontsize=9)
    axes[0, 0].legend(fontsize=8)
    fig.savefig(path, dpi=110)
    plt.close(fig)


if __name__ == "__main__":
    print(write_page(Path("docs/benchmarks"), Path("docs/benchmarks.md")))
