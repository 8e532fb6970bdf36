"""The ranks of a run, forked from this process, in which everything is imported already: a start takes no seconds.

What is watched is real: each rank is a process with its own settings, signals, sockets and loader workers.
"""

import atexit
import ctypes
import dataclasses
import functools
import multiprocessing
import os
import select
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

RANKS, WORKERS, STEPS, CHECKPOINT_EVERY, BATCH = 2, 2, 20, 5, 16
SHARDS = "{00..07}.tar"
SETTINGS = ("model=tiny", "model.config.embed_dim=8", "model.config.text_cfg.width=8", "model.config.text_cfg.layers=1",
            "model.config.vision_cfg.layers=1", "name=run", "device=cpu", f"train.global_batch_size={BATCH}",
            f"train.samples={STEPS * BATCH}", "train.epochs=null", "train.precision=fp32", "train.threads=1",
            f"data.workers={WORKERS}", "data.block_samples=8", "data.max_bad_fraction=0", "log.every=1", "log.to=[]",
            f"checkpoint.every_steps={CHECKPOINT_EVERY}", "evaluation.tasks=[]", "evaluation.final_tasks=[]")
STOPPED = 75  # clipkit's exit code after a signal
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h
Hook = Callable[[int], None]  # called in each rank, with its number, before it begins


class Ended(NamedTuple):
    """How the processes of a job ended."""

    codes: dict[str, int]  # of the launcher and of each rank; minus a signal's number
    errors: dict[str, list[str]]  # the lines of their standard error
    seconds: float
    hung: bool  # some were still there at the time limit


def get_ready() -> None:
    """Import what a run needs, and become the parent of processes whose own parent dies."""
    import torch

    torch.set_num_threads(1)
    import matplotlib.pyplot
    import open_clip
    import pandas
    import timm
    import torch.distributed.launcher.api

    from clipkit.data import loader
    from clipkit.evaluation import outcome, zero_shot
    from clipkit.model import folder
    from clipkit.training import curves, resume, watchdog

    assert all((matplotlib.pyplot, open_clip, pandas, timm, loader, outcome, zero_shot, folder, resume, watchdog))
    # Drawing and reading CLIP's 48,894 merges take longer than the run, and no fault is injected there.
    curves.plot_curves = lambda run_dir, *_, **__: Path(run_dir) / "curves.png"
    first = open_clip.tokenizer.SimpleTokenizer(context_length=24)  # of model=tiny
    open_clip.tokenizer.SimpleTokenizer.__init__ = lambda self, *_, **__: vars(self).update(vars(first))
    libc().prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def libc() -> Any:
    return ctypes.CDLL(None, use_errno=True)


@functools.cache
def compose(*changes: str) -> Any:
    """The settings of `clipkit pretrain`, as the command itself composes them."""
    from clipkit.commands.pretrain import IMPLIED
    from clipkit.config import PretrainConfig
    from clipkit.config.launch import launch

    found: list[Any] = []
    launch("pretrain", PretrainConfig, lambda config: found.append(config), [*SETTINGS, *changes], IMPLIED)
    return found[0]


class Job:
    """One start of the command: two ranks, or a launcher that starts them."""

    def __init__(self, folder: Path, config: Any, *, hook: Hook | None = None, launcher: bool = False,
                 max_restarts: int = 0) -> None:
        self.folder, self.config, self.hook = folder, config, hook
        self.read_end, self.write_end = os.pipe()
        self.unread, self.started, self.steps = b"", time.monotonic(), dict.fromkeys(range(RANKS), 0)
        self.workers: dict[int, list[int]] = {}
        self.statuses: dict[int, int] = {}
        self.names: dict[int, str] = {}
        for file in folder.glob("*.err"):
            file.unlink()
        port = free_port()
        if launcher:
            self.names[self._fork("launcher", lambda: self._launch(max_restarts))] = "launcher"
        else:
            for rank in range(RANKS):
                environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": RANKS, "LOCAL_WORLD_SIZE": RANKS,
                               "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
                pid = self._fork(f"rank {rank}", functools.partial(self._rank, environment))
                self.names[pid] = f"rank {rank}"
        os.close(self.write_end)

    @property
    def pids(self) -> dict[str, int]:
        """Of the living processes, by name: "launcher", "rank 0", "rank 1"."""
        living = self._living()
        return {name: pid for pid, name in self.names.items() if pid in living}

    def wait_for_step(self, step: int, *, seconds: float) -> bool:
        """Wait until rank 0 is at the end of a step; False if the job ends before, or does not come there."""
        until = time.monotonic() + seconds
        while self.steps[0] < step and time.monotonic() < until and self._living():
            self.look(0.02)
        return self.steps[0] >= step

    def signal(self, name: str, number: int) -> None:
        pid = self.pids.get(name)
        if pid:
            os.kill(pid, number)

    def end(self, *, seconds: float) -> Ended:
        """Wait until the launcher and the ranks have ended; kill what is there after `seconds`."""
        until = time.monotonic() + seconds
        while self._living() and time.monotonic() < until:
            self.look(0.02)
        hung = self._living()
        for pid in hung:
            os.kill(pid, signal.SIGKILL)
        while self._living():
            self.look(0.02)
        os.close(self.read_end)
        codes = {name: self.statuses[pid] for pid, name in self.names.items() if pid in self.statuses}
        errors = {file.stem: file.read_text(errors="replace").splitlines() for file in sorted(self.folder.glob("*.err"))}
        return Ended(codes, errors, time.monotonic() - self.started, bool(hung))

    def _living(self) -> list[int]:
        for pid in [pid for pid in self.names if pid not in self.statuses]:
            try:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    self.statuses[pid] = os.waitstatus_to_exitcode(status)
            except ChildProcessError:  # a launcher's child, while the launcher lives
                if not Path(f"/proc/{pid}").exists():
                    self.statuses[pid] = 0
        return [pid for pid in self.names if pid not in self.statuses]

    def look(self, seconds: float) -> None:
        """Read what the ranks report: a line a step, with their process and those of their workers."""
        if not select.select([self.read_end], [], [], seconds)[0]:
            return
        data = os.read(self.read_end, 65536)
        if not data:
            time.sleep(seconds)
        *lines, self.unread = (self.unread + data).split(b"\n")
        for line in lines:
            rank, done, pid, *workers = map(int, line.split())
            self.steps[rank], self.workers[rank] = done, workers
            self.names.setdefault(pid, f"rank {rank}")

    def _fork(self, name: str, body: Callable[[], None]) -> int:
        pid = os.fork()
        if pid:
            return pid
        code = 1
        try:
            libc().prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)  # a campaign that is broken off leaves nothing
            os.setsid()
            os.chdir(self.folder)
            self._redirect(name)
            body()
            code = 0
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            atexit._run_exitfuncs()  # as at the end of any program: multiprocessing waits for its workers
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def _redirect(self, name: str) -> None:
        for number, ending in ((1, "out"), (2, "err")):
            descriptor = os.open(self.folder / f"{name}.{ending}", os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o644)
            os.dup2(descriptor, number)
            os.close(descriptor)

    def _rank(self, environment: dict[str, Any]) -> None:
        """What `clipkit pretrain` does once its settings are composed."""
        from clipkit.commands.pretrain import pretrain
        from clipkit.config.launch import one_line_errors

        os.environ.update({name: str(value) for name, value in environment.items()})
        rank = int(os.environ["RANK"])
        report_steps(rank, self.write_end)
        if self.hook:
            self.hook(rank)
        with one_line_errors():
            sys.exit(pretrain(self.config) or 0)

    def _launch(self, max_restarts: int) -> None:
        """torchrun's own agent, with ranks forked in the place of new interpreters."""
        from torch.distributed.launcher.api import LaunchConfig, elastic_launch

        job = self
        # Else a restart meets the addresses that the ranks before it left in the store (torch 2.15).
        os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"

        def entry() -> None:
            libc().prctl(PR_SET_PDEATHSIG, 0, 0, 0, 0)  # torchrun's subprocesses have no such signal, nor its handlers
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            job._redirect(f"rank {os.environ['RANK']}")
            launcher = os.getppid()
            try:
                job._rank({})
            finally:
                if os.getppid() != launcher:  # torch would wait for it, to hand over a function's result
                    atexit._run_exitfuncs()
                    os._exit(STOPPED)

        elastic_launch(LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=RANKS, run_id="faults", rdzv_backend="c10d",
                                    rdzv_endpoint=f"127.0.0.1:{free_port()}", max_restarts=max_restarts, monitor_interval=0.1,
                                    start_method="fork", local_addr="127.0.0.1"), entry)()


def report_steps(rank: int, pipe: int) -> None:
    """Let a rank report the end of each step, before it looks what is due."""
    from clipkit.training.due import Timetable

    after = Timetable.after

    def tell(self: Timetable, done: int, *, stop: bool) -> Any:
        workers = [str(child.pid) for child in multiprocessing.active_children()]
        os.write(pipe, f"{rank} {done} {os.getpid()} {' '.join(workers)}\n".encode())
        return after(self, done, stop=stop)

    Timetable.after = tell


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def children() -> set[int]:
    """All children of this process, adopted ones too."""
    while True:
        try:
            if os.waitpid(-1, os.WNOHANG)[0] == 0:
                break
        except ChildProcessError:
            break
    return {int(pid) for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()}


def with_settings(config: Any, **groups: dict[str, Any]) -> Any:
    """Settings with some values changed: with_settings(config, parallel={"timeout_seconds": 6})."""
    return dataclasses.replace(config, **{name: dataclasses.replace(getattr(config, name), **values)
                                          for name, values in groups.items()})
