"""Show that a run is a function of its settings, not of its hardware: one curve on 1, 2 and 4 processes.

The same 50 steps (tiny towers without batch statistics, fp32, one thread a process, the embedded data) run on one
process, on 2 and on 4 gloo ranks, with 0 and 3 loader workers, and killed (SIGKILL) on 4 ranks after step 20 and resumed
on 2. The losses are compared with those of one process and drawn over each other.

    python scripts/one_curve.py runs/one_curve docs/images/one_curve.png

Expected: every relative difference below 1e-5; about 10 minutes on 2 cores.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

STEPS, BATCH, KILL_AFTER = 50, 64, 20
TOLERANCE = 1e-5  # relative; sums of 64 rows in another order differ by some 1e-7
RUNS = {  # name: [(processes, loader workers), ...]; two entries: killed on the first, resumed on the second
    "1 process, 0 workers": [(1, 0)],
    "1 process, 3 workers": [(1, 3)],
    "2 ranks, 0 workers": [(2, 0)],
    "4 ranks, 3 workers": [(4, 3)],
    "killed on 4 ranks, resumed on 2": [(4, 0), (2, 3)],
}


def command(folder: Path, name: str, processes: int, workers: int) -> list[str]:
    launcher = [sys.executable, "-m"]
    if processes > 1:
        launcher += ["torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "-m"]
    return [*launcher, "clipkit", "pretrain", "model=tiny", f"name={name}", f"runs_dir={folder}", f"data.workers={workers}",
            f"train.samples={STEPS * BATCH}", f"train.global_batch_size={BATCH}", "train.threads=1", "device=cpu",
            "evaluation=shards", "log.every=1", "log.to=[]", "checkpoint.every_steps=10", "parallel.timeout_seconds=120"]


def losses(folder: Path, name: str) -> list[float]:
    """The loss of every step so far, in nats."""
    file = folder / name / "metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines() if line.endswith("}")] if file.exists() else []
    return [line["loss"] for line in lines if "loss" in line]


def run(folder: Path, label: str, hardware: list[tuple[int, int]]) -> list[float]:
    """Run one entry of RUNS; all but the last of its processes are killed after KILL_AFTER steps."""
    name = label.replace(" ", "_").replace(",", "")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for number, (processes, workers) in enumerate(hardware):
        arguments = command(folder, name, processes, workers)
        if number == len(hardware) - 1:
            subprocess.run(arguments, check=True, env=environment)
            continue
        with subprocess.Popen(arguments, env=environment, start_new_session=True) as process:
            while len(losses(folder, name)) < KILL_AFTER + 3:
                assert process.poll() is None, f"{label} ended by itself with {process.returncode}"
                time.sleep(0.05)
            _kill_tree(process.pid)
    return losses(folder, name)


def _kill_tree(pid: int) -> None:
    """SIGKILL a launcher and the ranks and loader workers below it (torchrun gives its ranks sessions of their own)."""
    listing = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    children: dict[int, list[int]] = {}
    for line in listing.splitlines():
        child, parent = map(int, line.split())
        children.setdefault(parent, []).append(child)
    waiting = [pid]
    while waiting:
        one = waiting.pop()
        waiting += children.get(one, [])
        os.kill(one, signal.SIGKILL)


def largest_difference(found: list[float], wanted: list[float]) -> float:
    assert len(found) == len(wanted) == STEPS, (len(found), len(wanted))
    return max(abs(a - b) / abs(b) for a, b in zip(found, wanted, strict=True))


def main() -> None:
    folder, picture = Path(sys.argv[1]), Path(sys.argv[2])
    curves = {label: run(folder, label, hardware) for label, hardware in RUNS.items()}
    wanted = next(iter(curves.values()))
    differences = {label: largest_difference(found, wanted) for label, found in curves.items()}
    for label, difference in differences.items():
        print(f"{label:34} largest relative difference {difference:.1e}")
    from clipkit.training.curves import overlay

    files = [folder / label.replace(" ", "_").replace(",", "") / "metrics.jsonl" for label in curves]
    overlay(files, list(curves), picture, title="One curve on any hardware")
    if max(differences.values()) > TOLERANCE:
        sys.exit(f"not one curve: {differences}")


if __name__ == "__main__":
    main()
