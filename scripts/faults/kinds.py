"""The kinds of faults. Each draws when and where from a generator, plays itself on a stage, and says what it did."""

import functools
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from scripts.faults import hooks
from scripts.faults.ranks import CHECKPOINT_EVERY, RANKS, SHARDS, STEPS, Job, with_settings
from scripts.faults.stage import Stage
from scripts.faults.store import Server, Trouble, damage_shard

NAN_STEPS = (6, 13)  # few, as each needs a reference of its own
TIMEOUT_SECONDS = 6
STEP_SECONDS = 0.08  # about; a fault comes at any moment of a step and of a save


class Scene(NamedTuple):
    """What the faults of a campaign share."""

    shards: Path
    server: Server
    half_done: Path  # a run folder that stopped in the middle, with two checkpoints
    wait_seconds: float  # for a run to come to its step


class Outcome(NamedTuple):
    detail: str
    reference: str = "unbroken"  # which run's weights are to be found at the end
    but_step: int | None = None


Play = Callable[[Stage, random.Random, Scene], Outcome]


class Kind(NamedTuple):
    play: Play
    number: int  # in a whole campaign
    error_will_do: bool = False  # a clear error at the end is right, too


def reach(stage: Stage, job: Job, rng: random.Random, scene: Scene, *, first: int = 1) -> str:
    """Wait until a drawn moment of a run; at a third of them it is saving."""
    step = rng.randrange(first, STEPS)
    if rng.random() < 1 / 3:
        step = max(CHECKPOINT_EVERY, step // CHECKPOINT_EVERY * CHECKPOINT_EVERY)
    delay = rng.uniform(0, 2 * STEP_SECONDS)
    if not job.wait_for_step(step, seconds=scene.wait_seconds):
        stage.problems.append(f"did not come to step {step}")
    time.sleep(delay)
    return f"{1000 * delay:.0f} ms after step {step}"


def rank_killed(stage: Stage, rng: random.Random, scene: Scene) -> Outcome:
    job, rank = stage.start(), f"rank {rng.randrange(RANKS)}"
    when = reach(stage, job, rng, scene)
    job.signal(rank, signal.SIGKILL)
    stage.end(job, killed=(rank,))
    return Outcome(f"SIGKILL of {rank} {when}")


def worker_killed(stage: Stage, rng: random.Random, scene: Scene) -> Outcome:
    job, rank = stage.start(), rng.randrange(RANKS)
    when = reach(stage, job, rng, scene)
    worker = rng.randrange(len(job.workers[rank]))
    try:
        os.kill(job.workers[rank][worker], signal.SIGKILL)
    except ProcessLookupError:
        when += " (the run had ended)"
    stage.end(job)
    return Outcome(f"SIGKILL of worker {worker} of rank {rank} {when}")


def launcher_killed(stage: Stage, rng: random.Random, scene: Scene) -> Outcome:
    job = stage.start(launcher=True)
    when = reach(stage, job, rng, scene)
    job.signal("launcher", signal.SIGKILL)
    stage.end(job)
    return Outcome(f"SIGKILL of the launcher {when}")


def rank_restarted(stage: Stage, rng: random.Random, scene: Scene) -> Outcome:
    """The launcher itself starts the ranks again."""
    job, rank = stage.start(launcher=True, max_restarts=2), f"rank {rng.randrange(RANKS)}"
    when = reach(stage, job, rng, scene)
    job.signal(rank, signal.SIGKILL)
    ended = stage.end(job, killed=tuple(f"rank {number}" for number in range(RANKS)))
    if ended.codes["launcher"]:
        stage.problems.append(f"the launcher ended with {ended.codes['launcher']}")
    return Outcome(f"SIGKILL of {rank} {when} under max_restarts=2")


def sigterm(stage: Stage, rng: random.Random, scene: Scene) -> Outcome:
    whom = rng.choice(["rank 0", "rank 1", "all", "all and their workers", "launcher"])
    job = stage.start(launcher=whom == "launcher")
    when = reach(stage, job, rng, scene)
    targets = [name for name in job.pids if whom.startswith("all") or name == whom]
    for name in targets:
        job.signal(name, signal.SIGTERM)
    for worker in (pid for pids in job.workers.values() for pid in pids) if whom == "all and their workers" else ():
        try:
            os.kill(worker, signal.SIGTERM)
        except ProcessLookupError:
            continue
    ended = stage.end(job, killed=tuple(f"rank {number}" for number in range(RANKS)) if whom == "launcher" else ())
    if whom != "launcher" and any(code not in (0, 75) for code in ended.codes.values()):
        stage.problems.append(f"SIGTERM ended the ranks with {ended.codes}")
    return Outcome(f"SIGTERM to {whom} {when}")


def disk_full(stage: Stage, rng: random.Random, scene: Scene) -> Outcome:
    """A small file system (tmpfs) fills up under the run; a person makes space, and starts it again."""
    runs = stage.folder / "runs"
    runs.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "clipkit-faults", str(runs)], check=True, capture_output=True)
    job = stage.start()
    when = reach(stage, job, rng, scene)
    left = rng.choice([0, rng.randrange(100_000), rng.randrange(12_000_000)])
    ballast = runs / "ballast"
    with ballast.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(2**20))
        except OSError:
            file.truncate(max(0, file.tell() - left))
    stage.end(job)
    stage.heal = ballast.unlink
    return Outcome(f"{left:,} bytes left on the disk {when}")


def checkpoint_damaged(stage: Stage, rng: random.Random, scene: Scene) -> Outcome:
    shutil.copytree(scene.half_done, stage.run_dir)
    checkpoints = stage.run_dir / "checkpoints"
    newest = max(checkpoints.glob("step-*"))
    files = sorted(path for path in newest.rglob("*") if path.is_file())
    path = rng.choice([*files, checkpoints / "latest"])
    return Outcome(damage_file(path, rng))


def all_checkpoints_damaged(stage: Stage, rng: random.Random, scene: Scene) -> Outcome:
    shutil.copytree(scene.half_done, stage.run_dir)
    done = [damage_file(rng.choice(sorted(path for path in folder.rglob("*.*") if path.is_file())), rng, certain=True)
            for folder in sorted((stage.run_dir / "checkpoints").glob("step-*"))]
    return Outcome("; ".join(done))


def damage_file(path: Path, rng: random.Random, *, certain: bool = False) -> str:
    """Cut a file, flip one of its bits, or remove it. `certain`: no bit flip, which a manifest's white space bears."""
    where = f"{path.parent.name}/{path.name}"
    data = bytearray(path.read_bytes())
    how = rng.choice(["cut", "removed"] if certain else ["cut", "flipped", "flipped", "removed"])
    if how == "removed":
        path.unlink()
        return f"{where} removed"
    place = rng.randrange(len(data))
    if how == "cut":
        path.write_bytes(data[:place])
        return f"{where} cut to {place} of {len(data)} bytes"
    data[place] ^= 1 << rng.randrange(8)
    path.write_bytes(data)
    return f"{where}: a bit of byte {place} flipped"


def shard_damaged(stage: Stage, rng: random.Random, scene: Scene) -> Outcome:
    """A shard changes under the run, and is put back before the second start."""
    (stage.folder / "shards").unlink()
    shutil.copytree(scene.shards, stage.folder / "shards")
    job = stage.start()
    when = reach(stage, job, rng, scene)
    path = stage.folder / "shards" / f"{rng.randrange(8):02d}.tar"
    what = damage_shard(path, rng)
    stage.end(job)
    stage.heal = functools.partial(shutil.copy, scene.shards / path.name, path)
    return Outcome(f"{what}, {when}")


def object_store(stage: Stage, rng: random.Random, scene: Scene) -> Outcome:
    """A loopback server fails for some requests; it is well again at the second start."""
    trouble = Trouble(rng.choice(["500", "403", "slow", "half"]), rng.randrange(1, 60), rng.choice([1, 2, 5, 20]))
    scene.server.start(trouble)
    stage.config = with_settings(stage.config, data={"train": [f"{scene.server.url}/{SHARDS}"]})
    stage.end(stage.start())
    stage.heal = lambda: scene.server.start(None)
    return Outcome(f"{trouble.kind} for {trouble.count} requests from the {trouble.first}th")


def out_of_memory(stage: Stage, rng: random.Random, scene: Scene) -> Outcome:
    rank, worker, sample = rng.randrange(RANKS), rng.randrange(2), rng.randrange(1, STEPS * 4)
    how = rng.choice(sorted(hooks.OUT_OF_MEMORY))
    stage.end(stage.start(hooks.worker_out_of_memory(rank, worker, sample, how)))
    return Outcome(f"worker {worker} of rank {rank} at its sample {sample}: {how}")


def not_finite(stage: Stage, rng: random.Random, scene: Scene) -> Outcome:
    rank, step = rng.randrange(RANKS), rng.choice(NAN_STEPS)
    stage.end(stage.start(hooks.loss_is_nan(rank, step)))
    return Outcome(f"the loss of rank {rank} is NaN in step {step}", reference=f"step {step} left out", but_step=step)


def never_finite(stage: Stage, rng: random.Random, scene: Scene) -> Outcome:
    rank, step = rng.randrange(RANKS), rng.randrange(2, 8)
    stage.expected_lines = ["not finite in 5 steps in a row"]
    stage.config = with_settings(stage.config, train={"max_skipped_steps": 5})
    stage.end(stage.start(hooks.loss_is_nan(rank, step, for_ever=True)))
    return Outcome(f"the loss of rank {rank} is NaN from step {step} on", reference="none")


def late(stage: Stage, rng: random.Random, scene: Scene) -> Outcome:
    rank, step, seconds = rng.randrange(RANKS), rng.randrange(1, STEPS), rng.choice([2, 3, 4])
    if rng.random() < 0.1:
        seconds = 30
        stage.config = with_settings(stage.config, parallel={"timeout_seconds": 60})
    stage.end(stage.start(hooks.sleeps(rank, step, seconds)))
    return Outcome(f"rank {rank} is {seconds} s late in step {step}")


def never_comes(stage: Stage, rng: random.Random, scene: Scene) -> Outcome:
    rank, step = rng.randrange(RANKS), rng.randrange(2, STEPS)
    stage.config = with_settings(stage.config, parallel={"timeout_seconds": TIMEOUT_SECONDS})
    stopped = rng.random() < 0.3
    job = stage.start(None if stopped else hooks.sleeps(rank, step, 10_000))
    if stopped:
        job.wait_for_step(step - 1, seconds=scene.wait_seconds)
        job.signal(f"rank {rank}", signal.SIGSTOP)
        other = f"rank {1 - rank}"
        until = time.monotonic() + stage.seconds / 2
        while other in job.pids and time.monotonic() < until:
            job.look(0.05)
        job.signal(f"rank {rank}", signal.SIGKILL)  # as its machine's scheduler does
        stage.expected_lines = [f"rank {rank} "]
    else:
        stage.expected_lines = [f"rank {rank} is late: step {step} "]
    stage.end(job, killed=(f"rank {rank}",) if stopped else ())
    return Outcome(f"rank {rank} {'is stopped (SIGSTOP) at' if stopped else 'sleeps for ever in'} step {step}")


KINDS: dict[str, Kind] = {
    "SIGKILL of a rank": Kind(rank_killed, 24),
    "SIGKILL of a loader worker": Kind(worker_killed, 18),
    "SIGKILL of the launcher": Kind(launcher_killed, 12),
    "SIGKILL of a rank, launcher restarts": Kind(rank_restarted, 6),
    "SIGTERM": Kind(sigterm, 22),
    "disk full": Kind(disk_full, 18),
    "checkpoint damaged": Kind(checkpoint_damaged, 30),
    "all checkpoints damaged": Kind(all_checkpoints_damaged, 6, error_will_do=True),
    "shard damaged": Kind(shard_damaged, 20, error_will_do=True),
    "object store": Kind(object_store, 18, error_will_do=True),
    "out of memory in a worker": Kind(out_of_memory, 14),
    "NaN in one batch": Kind(not_finite, 8),
    "NaN for ever": Kind(never_finite, 2, error_will_do=True),
    "rank late": Kind(late, 10),
    "rank never comes": Kind(never_comes, 10),
}
