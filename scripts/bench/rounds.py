"""What all benchmarks share: arms that take turns in processes of their own, and the form of a figure.

An arm is a program that prints one JSON line for each JSON line it reads. clipkit's arms run in this environment, the
others' in an environment with their own versions. The one whose turn it is works; the other waits.
"""

import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

ROUNDS = 5


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A comparison. `ours` and `peer` are medians; a ratio above 1 says that clipkit is better."""

    bench: str  # loader, text, step, ...
    case: str
    ours: float
    peer: float
    peer_version: str
    ratio_median: float
    ratio_min: float
    ratio_max: float
    unit: str  # of ours and peer
    device: str
    threads: int
    commit: str
    rounds: list[dict[str, float]]  # of each round: ours, peer
    notes: dict[str, Any]  # what else was seen: memory, wall time, versions, ...


def make_figure(bench: str, case: str, rounds: Sequence[tuple[float, float]], *, unit: str, peer_version: str, threads: int,
                more_is_better: bool = False, device: str | None = None, **notes: Any) -> Figure:
    """Sum up rounds of (ours, peer) measured side by side; ratios are taken within a round."""
    ratios = [ours / peer if more_is_better else peer / ours for ours, peer in rounds]
    return Figure(bench=bench, case=case, unit=unit, peer_version=peer_version, device=device or processor(), threads=threads,
                  ours=statistics.median(ours for ours, _ in rounds), peer=statistics.median(peer for _, peer in rounds),
                  ratio_median=statistics.median(ratios), ratio_min=min(ratios), ratio_max=max(ratios), commit=commit(),
                  rounds=[{"ours": ours, "peer": peer} for ours, peer in rounds],
                  notes={**notes, "load": os.getloadavg()[0]})


def save_figures(path: Path, figures: Sequence[Figure]) -> None:
    """Put figures into a JSON file, in the place of earlier ones of the same bench and case."""
    kept = json.loads(path.read_text()) if path.exists() else []
    new = {(figure.bench, figure.case) for figure in figures}
    kept = [figure for figure in kept if (figure["bench"], figure["case"]) not in new]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(kept + [asdict(figure) for figure in figures], indent=1) + "\n")


class Arm:
    """A program that answers JSON lines with JSON lines."""

    def __init__(self, command: Sequence[str | Path], *, threads: int) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(Path.cwd())}
        self.command = [str(part) for part in command]
        self.process = subprocess.Popen(self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)

    def ask(self, **request: Any) -> dict[str, Any]:
        """Send a request and wait for its answer.

        Raises:
          RuntimeError: the program ended.
        """
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{' '.join(self.command)} ended with code {self.process.wait()}; its error stands above")
        return json.loads(line)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        with self.process:  # waits for it, and closes its pipes
            pass


def answer(respond: Callable[..., dict[str, Any]]) -> None:
    """Be an arm: answer each request on the standard input until it ends. What libraries print goes to the standard error."""
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    for line in sys.stdin:
        replies.write(json.dumps(respond(**json.loads(line))) + "\n")
        replies.flush()


def take_turns(arms: dict[str, Callable[[], float]], *, rounds: int = ROUNDS) -> list[tuple[float, float]]:
    """Measure "ours" and "peer" in turn, the first of a round in turn too; a round before the first is left out."""
    measured = []
    for number in range(rounds + 1):
        order = sorted(arms, reverse=number % 2 == 1)
        found = {name: arms[name]() for name in order}
        if number:
            measured.append((found["ours"], found["peer"]))
    return measured


class Stopwatch:
    """Seconds by the clock and in processor time (child processes that ended included) of a `with` block."""

    def __enter__(self) -> Self:
        self._begin, self._cpu_begin = time.perf_counter(), cpu_seconds()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds, self.cpu_seconds = time.perf_counter() - self._begin, cpu_seconds() - self._cpu_begin


def cpu_seconds() -> float:
    own, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def peak_memory_bytes() -> int:
    """The most main memory that this process has held since the last `forget_peak_memory` (Linux)."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return int(fields["VmHWM"].split()[0]) * 1024


def forget_peak_memory() -> None:
    """Let the peak begin anew at what is held now (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return f"{line.split(':', 1)[1].strip()}, {os.cpu_count()} cores"
    return f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def commit() -> str:
    found = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True,
                           cwd=Path(__file__).parent)
    return found.stdout.strip() or "unknown"
