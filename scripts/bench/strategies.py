"""Is a run the same under every strategy, on any number of processes, and resumed on another?

    python -m scripts.bench.strategies [--steps 50] [--out docs/benchmarks/strategies.json] [--only fsdp]

Trains the tiny model on the embedded emoji set over gloo processes of this machine, and compares each run's loss, step by step,
and its last weights with those of one process, whose loss is the plain one over the whole batch. In `levers` the tiled loss,
micro-batches, a tight gradient clip and an average of the weights are on. A resumed run goes on from the middle checkpoint of
another one. Expected: all within 1e-5 (fp32; sums in another order). Takes about 10 minutes on 2 cores.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

TOLERANCE = 1e-5
LEVERS = ("loss.block_size=8", "train.micro_batch_size=3", "train.ema_decay=0.9", "optim.max_grad_norm=0.5")
RUNS = [("ddp", 2), ("ddp", 4), ("fsdp", 2), ("fsdp", 4), ("hsdp", 4)]
RESUMED = [(("fsdp", 4), ("ddp", 1)), (("fsdp", 4), ("fsdp", 2)), (("fsdp", 4), ("hsdp", 4)), (("hsdp", 4), ("fsdp", 4)),
           (("hsdp", 4), ("ddp", 2)), (("ddp", 4), ("fsdp", 2)), (("ddp", 1), ("fsdp", 4))]


class Row(NamedTuple):
    settings: str  # plain or levers
    strategy: str
    processes: int
    resumed_from: str  # strategy and processes of the first half; "" = one run
    largest_loss_difference: float
    largest_weight_difference: float
    equal: bool


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", choices=("ddp", "fsdp", "hsdp"), help="leave the other strategies out")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, extra in (("plain", ()), ("levers", LEVERS)):
            for row in compare(Path(folder) / name, name, extra, steps=options.steps, only=options.only):
                print(describe(row), flush=True)
                rows.append(row)
    if options.out:
        options.out.write_text(json.dumps([row._asdict() for row in rows], indent=1) + "\n")
    sys.exit(not all(row.equal for row in rows))


def describe(row: Row) -> str:
    before = f"from {row.resumed_from}" if row.resumed_from else ""
    return (f"{row.settings:7} {row.strategy:5} x {row.processes}  {before:14} loss {row.largest_loss_difference:.1e}  "
            f"weights {row.largest_weight_difference:.1e}  {'equal' if row.equal else 'DIFFERENT'}")


def compare(folder: Path, name: str, extra: Sequence[str], *, steps: int, only: str | None = None) -> Iterator[Row]:
    """Run every strategy under some settings; yield a Row each as it ends."""
    one = train(folder / "ddp1", "ddp", 1, extra, steps)
    runs = {("ddp", 1): one}
    for strategy, processes in RUNS:
        if only in (None, strategy):
            runs[strategy, processes] = train(folder / f"{strategy}{processes}", strategy, processes, extra, steps)
            yield make_row(name, strategy, processes, "", runs[strategy, processes], one)
    for (before, half), (strategy, processes) in RESUMED:
        if (before, half) in runs and only in (None, strategy):
            target = folder / f"{before}{half}-{strategy}{processes}"
            forget_after(runs[before, half], target, steps // 2)
            resumed = train(target, strategy, processes, extra, steps)
            yield make_row(name, strategy, processes, f"{before} x {half}", resumed, one)


def train(folder: Path, strategy: str, processes: int, extra: Sequence[str], steps: int, batch: int = 24) -> Path:
    """Run `clipkit pretrain` on some processes; returns its run folder.

    Raises:
      RuntimeError: a process failed; the text is what it said last.
    """
    arguments = ["model=tiny", "data.train=emoji", "name=run", f"runs_dir={folder}", f"train.samples={steps * batch}",
                 "train.epochs=null", f"train.global_batch_size={batch}", "train.precision=fp32", "data.lanes=12",
                 "data.workers=0", "log.every=1", "log.to=[]", "device=cpu", "train.threads=1", "evaluation.tasks=[]",
                 "evaluation.final_tasks=[]", f"checkpoint.every_steps={steps // 2}", "checkpoint.keep=9",
                 "parallel.timeout_seconds=120", f"parallel.strategy={strategy}", "parallel.processes_per_copy=2", *extra]
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    folder.mkdir(parents=True, exist_ok=True)
    fork = multiprocessing.get_context("fork")  # what is imported here is imported once
    ranks = [fork.Process(target=one_rank, args=(rank, processes, port, arguments, folder / f"rank{rank}.log"))
             for rank in range(processes)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    if any(process.exitcode for process in ranks):
        raise RuntimeError("\n".join((folder / f"rank{rank}.log").read_text()[-800:] for rank in range(processes)))
    return folder / "run"


def one_rank(rank: int, processes: int, port: int, arguments: list[str], log: Path) -> None:
    import torch

    from clipkit.commands.pretrain import main as pretrain

    torch.set_num_threads(1)
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "RANK": str(rank),
                       "WORLD_SIZE": str(processes), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(processes)})
    with log.open("w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        pretrain(arguments)


def forget_after(run_dir: Path, target: Path, step: int) -> None:
    """Copy a run as it was after a step, when its checkpoint was the newest."""
    shutil.copytree(run_dir, target / "run")
    for path in (target / "run" / "checkpoints").glob("step-*"):
        if int(path.name.removeprefix("step-")) > step:
            shutil.rmtree(path)
    (target / "run" / "checkpoints" / "latest").write_text(f"step-{step:08d}\n")


def make_row(settings: str, strategy: str, processes: int, resumed_from: str, run_dir: Path, one: Path) -> Row:
    from safetensors.torch import load_file

    losses, wanted = losses_of(run_dir), losses_of(one)
    assert losses.keys() == wanted.keys(), f"{run_dir} has the steps {sorted(losses)}"
    weights, whole = (load_file(path / "model" / "open_clip_model.safetensors") for path in (run_dir, one))
    assert weights.keys() == whole.keys()
    loss = max(abs(losses[step] - wanted[step]) for step in wanted)
    weight = max(float((weights[name].double() - whole[name].double()).abs().max()) for name in whole)
    return Row(settings, strategy, processes, resumed_from, loss, weight, loss <= TOLERANCE)


def losses_of(run_dir: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


if __name__ == "__main__":
    main()
