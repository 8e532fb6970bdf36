"""A campaign of faults against `clipkit pretrain`: two ranks with two loader workers each, 20 steps, a checkpoint every 5.

    python -m scripts.faults                               # all kinds; docs/benchmarks/faults.json, docs/reliability.md
    python -m scripts.faults --kind "disk full" --num 3    # one kind, printed only

Each fault is drawn from a seed; afterwards the same command is started again until it finishes. Its weights must be those of
a run never broken, bit for bit, or it must have ended with one clear line; nothing may hang or be left behind. Linux only;
"disk full" mounts a small tmpfs and needs to be root. A whole campaign goes on after the faults that faults.json holds already;
remove it to begin anew.
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from scripts.faults.hooks import step_left_out
from scripts.faults.kinds import KINDS, NAN_STEPS, Scene
from scripts.faults.page import save_rows, saved_rows, table
from scripts.faults.ranks import SHARDS, compose, get_ready
from scripts.faults.stage import Stage, metrics, shared_memory, weights
from scripts.faults.store import Server, write_shards

TEMPLATE_STEP = 12  # the half-done run is killed after it: checkpoints of steps 5 and 10


def main() -> None:
    parser = argparse.ArgumentParser("python -m scripts.faults", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", action="append", choices=sorted(KINDS), help="only this kind; may be given again")
    parser.add_argument("--num", type=int, help="faults of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--time-limit", type=float, default=90, help="seconds that a start of a run may take")
    parser.add_argument("--minutes", type=float, help="begin no further fault after so long")
    parser.add_argument("--keep", action="store_true", help="keep the folders of failed faults")
    options = parser.parse_args()
    print("faults: getting ready", flush=True)
    rows = campaign(options)
    print("\n" + table(rows))
    sys.exit(any(row["outcome"] == "failed" for row in rows))


def campaign(options: Any) -> list[dict[str, Any]]:
    """Play the faults in an order drawn from the seed; kinds take turns, so that a campaign cut short has all of them."""
    get_ready()
    started, whole = time.monotonic(), not (options.kind or options.num)
    rows = saved_rows() if whole else []
    root = Path(tempfile.mkdtemp(prefix="clipkit-faults-"))
    kinds = options.kind or list(KINDS)
    faults = [(number, name) for name in kinds for number in range(options.num or KINDS[name].number)]
    random.Random(options.seed).shuffle(faults)
    played = {row["seed"] for row in rows}
    scene, references = prepare(root, options.time_limit, nan="NaN in one batch" in kinds)
    try:
        for index, (number, name) in enumerate(faults):
            if options.minutes and time.monotonic() - started > 60 * options.minutes:
                print(f"{len(faults) - index} faults are left out after {options.minutes:g} minutes", flush=True)
                break
            seed = f"{options.seed}/{name}/{number}"
            if seed in played:
                continue
            row = play(name, seed, root / f"{index:03d}", scene, references, options)
            rows.append(row)
            if whole:
                save_rows(rows)
            print(f"{index + 1:3d}/{len(faults)}  {row['outcome']:<11} {row['seconds']:5.1f} s  {name}: {row['detail']}"
                  + "".join(f"\n         {problem}" for problem in row["problems"]), flush=True)
    finally:
        scene.server.stop()
        if not options.keep:
            shutil.rmtree(root, ignore_errors=True)
    return rows


def prepare(root: Path, seconds: float, *, nan: bool) -> tuple[Scene, dict[str, Any]]:
    """Write the shards, run what the faults are compared with, and a run that stops half way."""
    write_shards(root / "shards")
    config = compose(f"data.train=shards/{SHARDS}")
    references: dict[str, Any] = {}
    wanted = {"unbroken": None} | ({f"step {step} left out": step_left_out(step) for step in NAN_STEPS} if nan else {})
    for name, hook in wanted.items():
        stage = Stage(root / name.replace(" ", "-"), config, root / "shards", seconds=seconds)
        ended = stage.end(stage.start(hook))
        if stage.problems or set(ended.codes.values()) != {0}:
            raise RuntimeError(f"the {name} run did not end well: {stage.problems}, {ended}")
        references[name] = weights(stage.run_dir), dict(metrics(stage.run_dir))
        print(f"faults: {name}: {ended.seconds:.1f} s", flush=True)
    stage = Stage(root / "half-done", config, root / "shards", seconds=seconds)
    job = stage.start()
    job.wait_for_step(TEMPLATE_STEP, seconds=seconds)
    for name in list(job.pids):
        job.signal(name, signal.SIGKILL)
    job.end(seconds=seconds)
    return Scene(root / "shards", Server(root / "shards"), stage.run_dir, seconds), references


def play(name: str, seed: str, folder: Path, scene: Scene, references: dict[str, Any], options: Any) -> dict[str, Any]:
    """One fault, from its start to the last look for leftovers."""
    kind, started, memory = KINDS[name], time.monotonic(), shared_memory()
    stage = Stage(folder, compose(f"data.train=shards/{SHARDS}"), scene.shards, seconds=options.time_limit)
    outcome = kind.play(stage, random.Random(seed), scene)
    lines = [line for start in stage.starts for told in start["lines"].values() for line in told]
    stage.problems += [f"no line says {words!r}" for words in stage.expected_lines if not any(words in line for line in lines)]
    done = bool(stage.starts) and set(stage.starts[-1]["codes"].values()) == {0}
    finished = outcome.reference != "none" and (done or stage.go_on())
    if finished:
        weights_wanted, losses = references[outcome.reference]
        stage.judge(weights_wanted, losses, but_step=outcome.but_step)
    elif not kind.error_will_do:
        stage.problems.append("did not finish")
    stage.tidy({scene.server.pid})
    stage.problems += [f"left shared memory {name}" for name in sorted(shared_memory() - memory)]
    runs = folder / "runs"
    if os.path.ismount(runs):
        subprocess.run(["umount", str(runs)], check=True)
    if not (stage.problems and options.keep):
        stage.remove()
    result = "failed" if stage.problems else "equal" if finished else "clear error"
    return {"kind": name, "seed": seed, "detail": outcome.detail, "outcome": result, "problems": stage.problems,
            "seconds": round(time.monotonic() - started, 1), "starts": stage.starts}


if __name__ == "__main__":
    main()
