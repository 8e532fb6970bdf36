"""How time and memory of a step grow: with processes, batch, length of captions and size of pictures; both trainers.

  python -m scripts.bench.growth --peer-python .venv-open-clip/bin/python --out growth.json [--only processes]

The 20 M model of step.py, a whole step on a resident batch, fp32. Each figure is one value of one axis; scripts/bench/page.py
fits the exponents. Expected: linear in the batch for both; with the captions' length clipkit's time grows and
open_clip_train's does not, which pads all to 77 tokens; with the side of pictures both grow by a little under its square.

Over gloo processes of one machine the global batch stays, CPU seconds are summed over the ranks, and memory is the most that
one rank holds, with what ranks share of the libraries. Free of cost would be a sum that stays: what is added is each rank's own
optimizer step, the gradients' exchange, and smaller products. Expected: an exponent of 0.3 to 0.4 for both. Time by the clock
is not taken: it needs a core for each process.
"""

import argparse
import copy
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from scripts.bench.make_shards import make_shards
from scripts.bench.rounds import Arm, Figure, make_figure, save_figures, take_turns
from scripts.bench.step import SMALL

# Processes first: their ranks are forks of arms that have imported everything, and trained nothing.
AXES = {"processes": (1, 2, 4), "batch size": (16, 32, 64, 128), "caption length": (8, 16, 32, 77),
        "image size": (64, 112, 160, 224)}
CUT_SHORT = ("batch size", "image size")  # without their largest values if it has to be quick
DEFAULTS = {"batch size": 32, "caption length": 16, "image size": 112}
GLOBAL_BATCH_SIZE = 64  # over processes
ROUNDS = 2
STEPS = 4  # of ranks, measured one by one: four of them disturb each other


class Measured(NamedTuple):
    turns: list[tuple[float, float]]  # of each round: ours, peer
    memory: dict[str, int]  # bytes
    version: str  # of the peer


def bench(peer_python: Path | str, out: Path | None, *, quick: bool = True, device: str = "cpu",
          only: Sequence[str] = tuple(AXES)) -> list[Figure]:
    """Measure a step along each axis, the others at their defaults. `quick` leaves out the largest values."""
    figures = []
    with (tempfile.TemporaryDirectory() as scratch,
          Arm([sys.executable, "-m", "scripts.bench.own_step", "1"], threads=1) as ours,
          Arm([peer_python, "-m", "scripts.bench.peer_step", "1"], threads=1) as peer):
        arms, shards = {"ours": ours, "peer": peer}, make_shards(Path(scratch) / "shards", pixels=64, num=128)
        for axis, values in AXES.items():
            for value in (values[:-1] if quick and axis in CUT_SHORT else values) if axis in only else ():
                if axis == "processes":
                    start = write_start(DEFAULTS | {"batch size": GLOBAL_BATCH_SIZE}, Path(scratch)) | {"device": device}
                    found = on_processes(arms, value, start, shards)
                else:
                    start = write_start(DEFAULTS | {axis: value}, Path(scratch)) | {"device": device}
                    found = in_turn(arms, start, shards)
                figures.append(make_figure("growth", f"{axis} {value}", found.turns, unit="CPU s" if device == "cpu" else "s",
                                           peer_version=found.version, threads=1, device=None if device == "cpu" else device,
                                           axis=axis, value=value, memory_bytes=found.memory))
                print(f"growth, {axis} {value}: {figures[-1].ours:.2f}, {found.version} {figures[-1].peer:.2f} "
                      f"{figures[-1].unit}", flush=True)
    if out:
        save_figures(out, figures)
    return figures


def in_turn(arms: dict[str, Arm], start: dict[str, str], shards: list[str]) -> Measured:
    """One process each, step by step in turn."""
    arms["ours"].ask(task="start", shards=shards, **start)
    version = arms["peer"].ask(task="start", **start)["version"]
    memory: dict[str, int] = {}

    def turn(name: str) -> float:
        answer = arms[name].ask(task="steps", number=1)
        memory[name] = answer["memory"]
        return answer["seconds"]

    return Measured(take_turns({name: lambda name=name: turn(name) for name in arms}, rounds=ROUNDS), memory, version)


def on_processes(arms: dict[str, Arm], processes: int, start: dict[str, str], shards: list[str]) -> Measured:
    """All steps of clipkit's ranks, then all of the peer's."""
    asked: dict[str, Any] = {"task": "ranks", "processes": processes, "steps": STEPS, **start}
    ours, peer = arms["ours"].ask(shards=shards, **asked), arms["peer"].ask(**asked)
    return Measured(list(zip(ours["seconds"], peer["seconds"], strict=True)),
                    {"ours": ours["memory"], "peer": peer["memory"]}, peer["version"])


def write_start(at: dict[str, int], folder: Path) -> dict[str, str]:
    """Write weights and a batch of random pictures and of captions of one length."""
    import open_clip
    import torch
    from safetensors.torch import save_file

    cfg: dict[str, Any] = copy.deepcopy(SMALL)
    cfg["vision_cfg"]["image_size"] = at["image size"]
    torch.manual_seed(0)
    weights = open_clip.model.CLIP(**cfg).state_dict()  # pyright: ignore[reportAttributeAccessIssue]
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / "weights.safetensors")
    size, length, batch = at["image size"], at["caption length"], at["batch size"]
    images = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8)  # (B, 3, H, W)
    tokens = torch.zeros(batch, 77, dtype=torch.int32)  # (B, L)
    tokens[:, 0], tokens[:, 1:length - 1], tokens[:, length - 1] = 49406, torch.randint(1, 49000, (batch, length - 2)), 49407
    save_file({"images": images, "normalised": images.float() / 255, "tokens": tokens}, folder / "batch.safetensors")
    return {"model_cfg": json.dumps(cfg), "weights": str(folder / "weights.safetensors"),
            "batch": str(folder / "batch.safetensors")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", required=True, help="Python of the environment of open_clip_train")
    parser.add_argument("--out", type=Path, help="JSON file of figures to add to")
    parser.add_argument("--full", action="store_true", help="the largest values, too")
    parser.add_argument("--only", nargs="*", default=tuple(AXES), choices=tuple(AXES))
    options = parser.parse_args()
    bench(options.peer_python, options.out, quick=not options.full, only=options.only)


if __name__ == "__main__":
    main()
