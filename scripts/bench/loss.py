"""The contrastive losses alone: clipkit's in tiles beside open_clip's ClipLoss and SigLipLoss.

  python -m scripts.bench.loss --peer-python .venv-open-clip/bin/python --out loss.json

One process, fp32, D = 512, value and gradients of features, temperature and bias. Each arm first computes all of it once,
and its value and gradients must equal the other's to 1e-5; then come CPU seconds in turn, and peak memory above the
features. On a GPU: seconds, and the memory that torch allocates. Expected on a CPU: 1.5 to 1.7 times less time (clip:
four products in the place of six; both: no copies of the logits), and at B = 16384 36 (clip) and 29 (siglip) times less
memory, more as B grows.
"""

import argparse
import ctypes
import gc
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from scripts.bench.rounds import (
    ROUNDS,
    Arm,
    Figure,
    Stopwatch,
    answer,
    forget_peak_memory,
    make_figure,
    peak_memory_bytes,
    save_figures,
    take_turns,
)

EMBED_DIM = 512
LOSSES = ("clip", "siglip")
TOLERANCE = 1e-5
LEAVES = ("image_features", "text_features", "logit_scale", "logit_bias")
QUICK = (("clip", 4096, ROUNDS), ("siglip", 4096, ROUNDS), ("clip", 16384, 1))


def bench(peer_python: Path | str, out: Path | None, *, quick: bool, sizes: tuple[int, ...] = (4096, 8192, 16384),
          rounds: int = ROUNDS, device: str = "cpu") -> list[Figure]:
    """Measure both losses at each size.

    Args:
      peer_python: of an environment with open_clip_torch 3.3.
      out: JSON file of figures to add to.
      quick: measure what stands in QUICK, about two minutes, in the place of `sizes` and `rounds`.
      sizes: of the batch.
      rounds: of turns.
      device: of both arms.

    Raises:
      ValueError: a value or gradient differs between the arms.
    """
    figures = []
    with (tempfile.TemporaryDirectory() as folder,
          Arm([sys.executable, "-m", "scripts.bench.loss", "--arm", "--device", device], threads=1) as ours,
          Arm([peer_python, "-m", "scripts.bench.peer_loss", device], threads=1) as peer):
        arms = {"ours": ours, "peer": peer}
        for name, size, num in QUICK if quick else [(name, size, rounds) for size in sizes for name in LOSSES]:
            figures += compare(arms, name, size, rounds=num, device=device, folder=Path(folder))
            for figure in figures[-2:]:
                print(f"{figure.bench}, {figure.case}: {figure.ours:.2f} {figure.unit}, {figure.peer_version} "
                      f"{figure.peer:.2f}: {figure.ratio_median:.2f} [{figure.ratio_min:.2f}, {figure.ratio_max:.2f}] x less",
                      flush=True)
    if out:
        save_figures(out, figures)
    return figures


def compare(arms: dict[str, Arm], name: str, size: int, *, rounds: int, device: str, folder: Path) -> list[Figure]:
    """One loss at one size: figures of time and of memory; the left-out round is the one that shows equality."""
    answers: dict[str, list[dict[str, Any]]] = {arm: [] for arm in arms}

    def turn(arm: str) -> float:
        to = None if answers[arm] else str(folder / arm)
        answers[arm].append(arms[arm].ask(name=name, size=size, to=to))
        return answers[arm][-1]["seconds"]

    turns = take_turns({arm: lambda arm=arm: turn(arm) for arm in arms}, rounds=rounds)
    gaps = differences(folder / "ours", folder / "peer")
    if max(gaps.values()) > TOLERANCE:
        raise ValueError(f"{name} at B = {size} differs by {gaps} (relative), above {TOLERANCE}: times are not comparable")
    peaks = [(ours["mib"], peer["mib"]) for ours, peer in zip(answers["ours"], answers["peer"], strict=True)][1:]
    peer = answers["peer"][0]["version"]
    shared: dict[str, Any] = {
        "peer_version": peer, "threads": 1, "equal_to": gaps, "torch": torch.__version__,
        "device": answers["ours"][0]["device"] if device != "cpu" else None}
    case = f"{name}, B = {size}"
    return [make_figure("loss", case, turns, unit="CPU s" if device == "cpu" else "s", **shared),
            make_figure("loss memory", case, peaks, unit="MiB", **shared)]


def differences(ours: Path, peer: Path) -> dict[str, float]:
    """Distance of value and gradients, relative to the peer's norm."""
    found = {}
    with np.load(f"{ours}.npz") as ours_saved, np.load(f"{peer}.npz") as peer_saved:
        for key in peer_saved:
            expected = peer_saved[key].astype(np.float64)
            gap = np.linalg.norm(ours_saved[key] - expected)
            found[key] = float(gap / max(np.linalg.norm(expected), 1e-30))
    return found


def serve(make: Callable[[str], Callable[..., Tensor]], *, version: str, device: str) -> None:
    """Be an arm: `make` gives the loss of a name, a function of (image_features, text_features, scale, bias)."""
    torch.set_num_threads(1)

    def respond(name: str, size: int, to: str | None) -> dict[str, Any]:
        leaves = dict(zip(LEAVES, make_leaves(name, size, device), strict=True))
        seconds, mib, value = measured(make(name), list(leaves.values()), device)
        if to:
            gradients: dict[str, Any] = {key: leaf.grad.cpu().numpy() for key, leaf in leaves.items() if leaf.grad is not None}
            np.savez(to, value=value.item(), **gradients)
        return {"seconds": seconds, "mib": mib, "version": version,
                "device": torch.cuda.get_device_name() if device == "cuda" else device}

    answer(respond)


def make_leaves(name: str, size: int, device: str) -> list[Tensor]:
    """Features whose partners are near, (B, D) each, and the scale and bias that training starts from."""
    generator = torch.Generator().manual_seed(0)
    image_features, noise = (F.normalize(torch.randn(size, EMBED_DIM, generator=generator), dim=-1) for _ in range(2))
    text_features = F.normalize(noise.add_(image_features, alpha=0.2), dim=-1)
    scale, bias = (1 / 0.07, 0.0) if name == "clip" else (10.0, -10.0)
    return [tensor.to(device).requires_grad_() for tensor in
            (image_features, text_features, torch.tensor(scale), torch.tensor(bias))]


def measured(loss: Callable[..., Tensor], leaves: list[Tensor], device: str) -> tuple[float, float, Tensor]:
    """Forward and backward: (CPU) seconds, MiB at the peak above what was held before, value."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before, begin = torch.cuda.memory_allocated(), time.perf_counter()
        value = loss(*leaves)
        value.backward()
        torch.cuda.synchronize()
        return time.perf_counter() - begin, (torch.cuda.max_memory_allocated() - before) / 2**20, value.detach()
    ctypes.CDLL(None).malloc_trim(0)  # or memory that was freed earlier would count as held before
    forget_peak_memory()
    before = peak_memory_bytes()
    with Stopwatch() as watch:
        value = loss(*leaves)
        value.backward()
    return watch.cpu_seconds, (peak_memory_bytes() - before) / 2**20, value.detach()


def main() -> None:
    parser = argparse.ArgumentParser(description="The contrastive losses alone, beside open_clip's.")
    parser.add_argument("--peer-python", type=Path, default=Path(".venv-open-clip/bin/python"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--sizes", default="4096,8192,16384", help="of the batch, with commas")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="about two minutes: fewer sizes")
    parser.add_argument("--arm", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.arm:
        from clipkit import __version__
        from clipkit.losses import BLOCKWISE_LOSSES

        serve(BLOCKWISE_LOSSES.__getitem__, version=f"clipkit {__version__}", device=options.device)
    else:
        bench(options.peer_python, options.out, quick=options.quick, rounds=options.rounds, device=options.device,
              sizes=tuple(int(size) for size in options.sizes.split(",")))


if __name__ == "__main__":
    main()
