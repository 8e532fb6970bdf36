"""One fault's folder: the run in it is started, started again as a scheduler would, and judged at the end."""

import fcntl
import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scripts.faults.ranks import STEPS, STOPPED, Ended, Hook, Job, children

MAX_STARTS = 3  # of one run, the one with the fault among them
LEFTOVER_SECONDS = 12  # torch's loader workers look for their parent every 5 s


class Stage:
    """A folder with shards and a run, and what went wrong there."""

    def __init__(self, folder: Path, config: Any, shards: Path, *, seconds: float) -> None:
        """
        Args:
          folder: Is made.
          config: The run's settings.
          shards: Linked into the folder.
          seconds: Time limit of each start.
        """
        self.folder, self.config, self.seconds = folder, config, seconds
        self.starts: list[dict[str, Any]] = []
        self.problems: list[str] = []
        self.heal: Callable[[], object] | None = None  # what a person would mend before the second start
        self.expected_lines: list[str] = []  # words that the error lines must hold
        folder.mkdir(parents=True)
        (folder / "shards").symlink_to(shards)
        self.run_dir = folder / "runs" / "run"

    def start(self, hook: Hook | None = None, *, launcher: bool = False, max_restarts: int = 0) -> Job:
        return Job(self.folder, self.config, hook=hook, launcher=launcher, max_restarts=max_restarts)

    def end(self, job: Job, *, killed: tuple[str, ...] = ()) -> Ended:
        """Wait for a job's end and judge it; `killed` names the processes whose end by a signal is the fault itself."""
        ended = job.end(seconds=self.seconds)
        lines = {name: clear_lines(lines) for name, lines in ended.errors.items()}
        self.starts.append({"codes": ended.codes, "seconds": round(ended.seconds, 2),
                            "lines": {name: found for name, found in lines.items() if found}})
        if ended.hung:
            self.problems.append(f"still there after {self.seconds:g} s")
        for name, code in ended.codes.items():
            if name == "launcher" or name in killed:
                continue  # torchrun's own report, as it is
            told = lines.get(name, [])
            if code not in (0, STOPPED) and len(told) != 1:
                self.problems.append(f"{name} ended with {code} and {len(told)} lines in the place of one clear line")
        for name, text in ended.errors.items():
            if name != "launcher" and any(line.startswith("Traceback") for line in text):
                self.problems.append(f"{name} printed a traceback: {text[-1][:200]}")
        return ended

    def go_on(self) -> bool:
        """Start the same command until it finishes; False if it ends with an error to the last."""
        if self.heal:
            self.heal()
        while len(self.starts) < MAX_STARTS:
            ended = self.end(self.start())
            if set(ended.codes.values()) == {0}:
                return True
            if ended.hung:
                return False
        return False

    def judge(self, reference: dict[str, bytes], losses: dict[int, float | None], *, but_step: int | None = None) -> None:
        """Compare a finished run with the unbroken one.

        Args:
          reference: Files of weights, as `weights` gives them.
          losses: Of each step.
          but_step: Step whose loss may differ: the one that was not finite.
        """
        found = weights(self.run_dir)
        self.problems += [f"{name} differs from the unbroken run's" for name in sorted({*reference, *found})
                          if found.get(name) != reference.get(name)]
        steps = metrics(self.run_dir)
        if [step for step, _ in steps] != list(range(1, STEPS + 1)):
            self.problems.append(f"metrics.jsonl has the steps {[step for step, _ in steps]}")
        elif any(losses[step] != loss for step, loss in steps if step != but_step):
            self.problems.append("metrics.jsonl has other losses than the unbroken run's")

    def tidy(self, spared: set[int]) -> None:
        """Look for what was left behind: processes, shared memory, temporary files, the lock."""
        until = time.monotonic() + LEFTOVER_SECONDS
        while (left := children() - spared) and time.monotonic() < until:
            time.sleep(0.05)
        for pid in left:
            command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            self.problems.append(f"left a process: {command[:80]}")
            os.kill(pid, signal.SIGKILL)
        if self.run_dir.exists():
            temporary = [path.name for path in self.run_dir.rglob("*") if path.name.startswith(".") and path.name != ".lock"]
            self.problems += [f"left {name}" for name in temporary]
            lock = self.run_dir / ".lock"
            if lock.exists() and not lock_is_free(lock):
                self.problems.append("kept the lock")

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def clear_lines(lines: list[str]) -> list[str]:
    """Of a standard error, clipkit's own lines."""
    return [line for line in lines if line.startswith("clipkit: ")]


def weights(run_dir: Path) -> dict[str, bytes]:
    """All tensors of the newest checkpoint and of the model folder: {file: bytes}."""
    newest = max((run_dir / "checkpoints").glob("step-*"))
    return {path.name: path.read_bytes() for folder in (newest, run_dir / "model") for path in sorted(folder.rglob("*"))
            if path.suffix in (".safetensors", ".distcp")}


def metrics(run_dir: Path) -> list[tuple[int, float | None]]:
    """(step, loss) of the training lines, in their order."""
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [(record["step"], record["loss"]) for record in records if "loss" in record]


def lock_is_free(path: Path) -> bool:
    with path.open("a") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
    return True


def shared_memory() -> set[str]:
    """Names of torch's shared memory whose maker is dead."""
    found = set()
    for path in Path("/dev/shm").glob("torch_*"):
        maker = path.name.split("_")[1]
        if maker.isdigit() and not Path(f"/proc/{maker}").exists():
            found.add(path.name)
    return found
