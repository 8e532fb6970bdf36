"""`make bench-gpu`: steps of ViT-B/32, B/16 and L/14 on a GPU, clipkit beside open_clip_train, and the share of its peak.

  python -m scripts.bench.gpu --peer-python .venv-open-clip/bin/python [--models ViT-B-32] [--scale 8]

amp_bf16, alt-text captions, a resident batch; open_clip_train once as it comes and once with --torchcompile: the better one
counts. MFU counts the products of useful tokens alone (captions at their own length), forward and twice that backward, nothing
for what is computed again; against the GPU's nominal rate and against a product of 8192 x 8192 matrices timed in the same run.
Writes docs/benchmarks/gpu.json and, for each model, the kernels that take the most time. --device cpu --scale 512 tries it out.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from scripts.bench.make_shards import make_captions, make_shards
from scripts.bench.rounds import Arm, Figure, make_figure, save_figures, take_turns
from scripts.bench.step import TOLERANCE, Case, assert_equal, write_start

BATCH_SIZES = {"ViT-B-32": 4096, "ViT-B-16": 1024, "ViT-L-14": 512}
STEPS, ROUNDS = 10, 3
NOMINAL_TFLOPS = 989  # H100 and H200, dense bfloat16, NVIDIA's data sheet
EQUAL_ROWS = 16  # gradients are compared in fp32 on a small batch
LEAST_BATCH = 8  # one of each lane, of which there are as many as shards


def main() -> None:
    options = arguments()
    figures = []
    with tempfile.TemporaryDirectory() as scratch:
        shards = make_shards(Path(scratch) / "shards", pixels=64, num=256)
        rate = matrix_rate(options.device) if options.device == "cuda" else None
        for name in options.models:
            folder = Path(scratch) / name
            folder.mkdir()
            case = Case("step", name, "alt-text", max(LEAST_BATCH, BATCH_SIZES[name] // options.scale))
            equal = compare_gradients(case, folder, shards, options)
            figures += [one_model(case, folder, shards, options, compiles=compiles, equal=equal, rate=rate)
                        for compiles in (False, True)]
            for figure in figures[-2:]:
                print(f"{figure.case} beside {figure.peer_version}: {figure.ratio_median:.2f} x less time, "
                      f"{json.dumps(figure.notes['memory_gb'])} GB, MFU {figure.notes['mfu']}", flush=True)
            save_figures(options.out, figures[-2:])


def compare_gradients(case: Case, folder: Path, shards: list[str], options: argparse.Namespace) -> float:
    """Loss and gradients of both arms on a few rows, in fp32; raises ValueError where they differ."""
    start = write_start(case._replace(batch_size=EQUAL_ROWS), folder) | {"device": options.device, "precision": "fp32"}
    with arms(options) as (ours, peer):
        ours.ask(task="start", shards=shards, **start)
        peer.ask(task="start", **start)
        return assert_equal({"ours": ours, "peer": peer}, folder, "loss", TOLERANCE)


def one_model(case: Case, folder: Path, shards: list[str], options: argparse.Namespace, *, compiles: bool, equal: float,
              rate: float | None) -> Figure:
    """Steps in turn; clipkit compiles where open_clip_train does."""
    start = write_start(case, folder) | {"device": options.device, "compile_model": compiles,
                                         "precision": "amp_bf16" if options.device == "cuda" else "fp32"}
    memory: dict[str, float] = {}
    with arms(options) as (ours, peer):
        ours.ask(task="start", shards=shards, **start)
        version = peer.ask(task="start", **start)["version"]

        def turn(name: str, arm: Arm) -> float:
            answer = arm.ask(task="steps", number=options.steps)
            memory[name] = answer["memory"] / 1e9
            return answer["wall"] / options.steps

        turns = take_turns({"ours": lambda: turn("ours", ours), "peer": lambda: turn("peer", peer)}, rounds=options.rounds)
        table = ours.ask(task="profile", to=str(options.out.with_name(f"kernels_{case.model}.txt")))
    flops = useful_flops(case)
    seconds = sorted(ours for ours, _ in turns)[len(turns) // 2]
    mfu = {"nominal": flops / seconds / NOMINAL_TFLOPS / 1e12, "measured_rate": flops / seconds / rate if rate else None}
    return make_figure("gpu step", f"{case.model}, {case.mix} captions, B = {case.batch_size}", turns, unit="s", threads=1,
                       peer_version=version, device=device_name(options.device), memory_gb=memory, mfu=mfu, compiled=compiles,
                       matrix_tflops=rate and rate / 1e12, largest_relative_difference=equal, kernels=table["kernels"])


@contextmanager
def arms(options: argparse.Namespace) -> Iterator[tuple[Arm, Arm]]:
    """clipkit's arm and open_clip_train's, each in a process of its own."""
    with (Arm([sys.executable, "-m", "scripts.bench.own_step", "1"], threads=1) as ours,
          Arm([options.peer_python, "-m", "scripts.bench.peer_step", "1"], threads=1) as peer):
        yield ours, peer


def useful_flops(case: Case) -> float:
    """Of a step: three forward passes of all pictures, and of all captions at their own length."""
    import open_clip
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    cfg: Any = open_clip.get_model_config(case.model)
    tokens = open_clip.get_tokenizer("ViT-B-32")(make_captions(case.mix, case.batch_size))  # (B, L)
    length = (tokens.argmax(dim=-1) + 1).float().mean().item()
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        towers: Any = open_clip.model.CLIP(**cfg)  # pyright: ignore[reportAttributeAccessIssue]
        size = cfg["vision_cfg"]["image_size"]
        towers.encode_image(torch.empty(1, 3, size, size))
        image = counter.get_total_flops()
        towers.encode_text(torch.zeros(1, 77, dtype=torch.int64))
    text = (counter.get_total_flops() - image) * length / 77
    return 3 * case.batch_size * (image + text)


def matrix_rate(device: str, size: int = 8192, times: int = 20) -> float:
    """FLOP/s of a bfloat16 matrix product, the best of some."""
    import torch

    left, right = torch.randn(2, size, size, device=device, dtype=torch.bfloat16)
    best = float("inf")
    for _ in range(times):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        torch.mm(left, right)
        torch.cuda.synchronize()
        best = min(best, time.perf_counter() - begin)
    return 2 * size**3 / best


def device_name(device: str) -> str | None:
    import torch

    return torch.cuda.get_device_name() if device == "cuda" else None


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", type=Path, required=True, help="Python of the environment of open_clip_train")
    parser.add_argument("--models", nargs="*", default=tuple(BATCH_SIZES), choices=tuple(BATCH_SIZES))
    parser.add_argument("--scale", type=int, default=1, help="divide the batches by this")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks/gpu.json"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
