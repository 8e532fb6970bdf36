"""Training steps: clipkit beside open_clip_train, from the same weights and batch.

  python -m scripts.bench.step --peer-python .venv-open-clip/bin/python --out step.json [--only text] [--full]

Each arm runs its own training loop; only where its batches come from is timed. First the loss and every gradient of the
whole model must be equal to 1e-5 (fp32), then times are taken in turn: of the text tower (forward and backward, three
mixes of caption lengths), of a whole step on a resident batch, of a step in four micro-batches, and of a step from shards
of 512 px pictures (loader included, in the same process).

Expected on one CPU thread, ViT-B/32: text tower 5 to 6 times faster with alt-text captions, 1.1 with all 77 tokens;
whole step 1.5 times.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from scripts.bench.make_shards import make_captions, make_shards
from scripts.bench.rounds import ROUNDS, Arm, Figure, make_figure, save_figures, take_turns

TOLERANCE = 1e-5  # of a tensor's norm; fp32, sums in another order
SMALL = {"embed_dim": 256,  # 20 M parameters
         "vision_cfg": {"image_size": 112, "layers": 6, "width": 256, "patch_size": 16, "head_width": 64},
         "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 256, "heads": 4, "layers": 3}}
SHARD_PIXELS, SHARD_SAMPLES = 512, 1024


class Case(NamedTuple):
    bench: str
    model: str  # a name of open_clip, or "20 M parameters, 112 px"
    mix: str  # of caption lengths
    batch_size: int
    steps: int = 1  # in one turn
    micro_batches: int = 1


SMALL_NAME = "20 M parameters, 112 px"
QUICK = (Case("text tower", "ViT-B-32", "alt-text", 64), Case("text tower", "ViT-B-32", "full", 16),
         Case("text tower", "ViT-B-32", "long", 16), Case("step", "ViT-B-32", "alt-text", 32),
         Case("step", "ViT-B-32", "full", 8), Case("gradient caching", SMALL_NAME, "full", 128, 1, 4),
         Case("gradient caching", SMALL_NAME, "alt-text", 128, 1, 4), Case("end to end", SMALL_NAME, "alt-text", 64, 4))
FULL = (Case("text tower", "ViT-B-32", "alt-text", 256), Case("text tower", "ViT-B-32", "full", 64),
        Case("text tower", "ViT-B-32", "long", 64), Case("step", "ViT-B-32", "alt-text", 64),
        Case("step", "ViT-B-32", "full", 32), Case("gradient caching", "ViT-B-32", "alt-text", 64, 1, 4), *QUICK[5:])


def bench(peer_python: Path | str, out: Path | None, *, quick: bool, only: Sequence[str] = (), rounds: int = ROUNDS,
          device: str = "cpu", precision: str = "fp32", peer_compiles: bool = False) -> list[Figure]:
    """Measure the cases of QUICK or FULL.

    Args:
      peer_python: of an environment with open_clip_torch 3.3 and webdataset 0.2.86.
      out: JSON file of figures to add to.
      quick: smaller batches.
      only: benches to run; none = all.
      rounds: of turns.
      device, precision: of both arms.
      peer_compiles: run open_clip_train with --torchcompile.

    Raises:
      ValueError: a loss or gradient differs between the arms.
    """
    figures = []
    with tempfile.TemporaryDirectory() as scratch:
        shards = make_shards(Path(scratch) / "shards", pixels=SHARD_PIXELS, num=SHARD_SAMPLES)
        for number, case in enumerate(one for one in (QUICK if quick else FULL) if not only or one.bench in only):
            folder = Path(scratch) / str(number)
            folder.mkdir()
            with (Arm([sys.executable, "-m", "scripts.bench.own_step", "1"], threads=1) as ours,
                  Arm([peer_python, "-m", "scripts.bench.peer_step", "1"], threads=1) as peer):
                figures.append(compare(case, {"ours": ours, "peer": peer}, folder, shards, rounds=rounds, device=device,
                                       precision=precision, peer_compiles=peer_compiles))
            figure = figures[-1]
            print(f"{figure.bench}, {figure.case}: {figure.ours:.2f} {figure.unit}, {figure.peer_version} {figure.peer:.2f}: "
                  f"{figure.ratio_median:.2f} [{figure.ratio_min:.2f}, {figure.ratio_max:.2f}] x less", flush=True)
            if out:
                save_figures(out, [figure])
    return figures


def compare(case: Case, arms: dict[str, Arm], folder: Path, shards: list[str], *, rounds: int, device: str, precision: str,
            peer_compiles: bool) -> Figure:
    """Start both arms from one state, compare their gradients, and let them take turns."""
    start = write_start(case, folder) | {"device": device, "precision": precision, "micro_batches": case.micro_batches}
    versions = {"ours": arms["ours"].ask(task="start", shards=shards, **start),
                "peer": arms["peer"].ask(task="start", compile_model=peer_compiles, **start)}
    is_text = case.bench == "text tower"
    equal = assert_equal(arms, folder, "text" if is_text else "loss", TOLERANCE)  # in fp32, whatever is timed
    request: dict[str, Any] = {"task": "text", "precision": precision} if is_text else {"task": "steps", "number": case.steps}
    if case.bench == "end to end":
        request["shards"] = shards
    found: dict[str, list[dict[str, float]]] = {name: [] for name in arms}

    def turn(name: str) -> float:
        found[name].append(arms[name].ask(**request))
        return found[name][-1]["seconds"] / case.steps

    turns = take_turns({name: lambda name=name: turn(name) for name in arms}, rounds=rounds)
    return make_figure(
        case.bench, f"{case.model}, {case.mix} captions, B = {case.batch_size}", turns,
        unit="CPU s" if device == "cpu" else "s", peer_version=versions["peer"]["version"], threads=1,
        device=None if device == "cpu" else device, precision=precision, largest_relative_difference=equal,
        micro_batches=case.micro_batches, torch=versions["ours"]["torch"],
        wall_seconds={name: [one["wall"] / case.steps for one in answers[1:]] for name, answers in found.items()},
        peak_memory_gb={name: max(one["memory"] for one in answers[1:]) / 1e9 for name, answers in found.items()})


def write_start(case: Case, folder: Path) -> dict[str, str]:
    """Write weights and a batch for both arms."""
    import open_clip
    import torch
    from safetensors.torch import save_file

    cfg: Any = SMALL if case.model == SMALL_NAME else open_clip.get_model_config(case.model)
    torch.manual_seed(0)
    weights = open_clip.model.CLIP(**cfg).state_dict()  # pyright: ignore[reportAttributeAccessIssue]
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / "weights.safetensors")
    size = cfg["vision_cfg"]["image_size"]
    images = torch.randint(0, 256, (case.batch_size, 3, size, size), dtype=torch.uint8)  # (B, 3, H, W)
    mean = torch.tensor(open_clip.OPENAI_DATASET_MEAN)[:, None, None]
    std = torch.tensor(open_clip.OPENAI_DATASET_STD)[:, None, None]
    tokens = open_clip.get_tokenizer("ViT-B-32")(make_captions(case.mix, case.batch_size))  # (B, L)
    save_file({"images": images, "normalised": (images.float() / 255 - mean) / std, "tokens": tokens.int()},
              folder / "batch.safetensors")
    return {"model_cfg": json.dumps(cfg), "weights": str(folder / "weights.safetensors"),
            "batch": str(folder / "batch.safetensors")}


def assert_equal(arms: dict[str, Arm], folder: Path, task: str, tolerance: float) -> float:
    """Compare value and gradients of both arms; return the largest difference, of a tensor's norm.

    Raises:
      ValueError: it is above the tolerance, or a parameter has a gradient in one arm only.
    """
    from safetensors.torch import load_file

    values = {name: arm.ask(task=task, to=str(folder / f"{name}.safetensors"))["value"] for name, arm in arms.items()}
    ours, peer = (load_file(folder / f"{name}.safetensors") for name in ("ours", "peer"))
    if ours.keys() != peer.keys():
        raise ValueError(f"only one arm has gradients of {sorted(ours.keys() ^ peer.keys())}")
    found = {name: ((ours[name] - grad).norm() / grad.norm().clamp_min(1e-12)).item() for name, grad in peer.items()}
    found["value"] = abs(values["ours"] - values["peer"]) / abs(values["peer"])
    worst = max(found, key=lambda name: found[name])
    if found[worst] > tolerance:
        raise ValueError(f"{worst} differs by {found[worst]:.1e} of its norm, allowed is {tolerance}: times are not comparable")
    return found[worst]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", required=True, help="Python of the environment of open_clip_train")
    parser.add_argument("--out", type=Path, help="JSON file of figures to add to")
    parser.add_argument("--only", nargs="*", default=(), help="text tower, step, gradient caching, end to end")
    parser.add_argument("--full", action="store_true", help="larger batches")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--precision", default="fp32", choices=("fp32", "amp_bf16"))
    parser.add_argument("--peer-compiles", action="store_true", help="open_clip_train with --torchcompile")
    options = parser.parse_args()
    bench(options.peer_python, options.out, quick=not options.full, only=options.only, rounds=options.rounds,
          device=options.device, precision=options.precision, peer_compiles=options.peer_compiles)


if __name__ == "__main__":
    main()
