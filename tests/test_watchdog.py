"""The watchdog names who is lost or late; a clear line ends each process that waits."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch.distributed as dist
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from clipkit.training.process import first_line, is_of_the_network, worker_errors
from clipkit.training.watchdog import Beat, Watchdog, blame, moved, where_is

WAITING, AT_WORK = Beat(5, 17, "gather (gather.py:22)", True), Beat(5, 17, "read (tars.py:9)", False)


def later(beat: Beat) -> Beat:
    return beat._replace(number=beat.number + 1)


def told(before: dict[int, Beat], after: dict[int, Beat], cause: str = "the step took too long") -> str:
    line = blame(before, after, world_size=3, own_rank=0, cause=cause, timeout_seconds=60)
    assert "\n" not in line
    return line


def test_the_rank_that_does_not_wait_for_others_is_late():
    before = {0: WAITING, 1: AT_WORK, 2: WAITING}
    line = told(before, {rank: later(beat) for rank, beat in before.items()})
    assert line.startswith("rank 1 is late: step 17 was not done in 60 s (parallel.timeout_seconds; rank 1 is in read (tars.py")
    assert "run the same command again" in line


def test_the_rank_with_fewest_steps_is_late_where_hosts_run_ahead():
    before = {0: AT_WORK._replace(step=20), 1: AT_WORK._replace(step=20), 2: AT_WORK}
    assert told(before, {rank: later(beat) for rank, beat in before.items()}).startswith("rank 2 is late: step 17")


def test_the_rank_whose_beat_stands_still_is_gone():
    before = {0: WAITING, 1: WAITING, 2: WAITING}
    assert told(before, before | {0: later(WAITING), 2: later(WAITING)}).startswith("rank 1 is gone at step 17 (killed")
    assert told({0: WAITING}, {0: later(WAITING)}).startswith("ranks 1, 2 are gone at step 17")


def test_the_last_words_of_a_rank_are_handed_on_and_the_first_ones_count(free_port):
    store = TCPStore("127.0.0.1", free_port, 1, is_master=True)
    one, other, third = (Watchdog(rank=rank, world_size=3, timeout_seconds=60, store=store) for rank in range(3))
    one.step_done(16, pause=False)
    one.fail(ValueError("3 of 100\nsamples are bad"))
    other.fail(RuntimeError("Connection closed by peer"))
    assert third.explain("Connection closed") == "rank 0 failed at step 17: 3 of 100 samples are bad"


def test_ranks_that_all_live_lost_each_other():
    before = {rank: WAITING for rank in range(3)}
    line = told(before, {rank: later(beat) for rank, beat in before.items()}, cause="Connection reset by peer")
    assert line.startswith("the processes lost each other at step 17 (Connection reset by peer)")


def test_waiting_ends_when_all_had_a_beat():
    before = {0: WAITING, 1: WAITING}
    assert not moved(before, before, 2)
    assert not moved(before, {0: later(WAITING)}, 2)
    assert moved(before, {0: later(WAITING), 1: later(WAITING)}, 2)


def test_a_place_is_outside_of_torch_and_waiting_is_seen():
    place, waits = where_is(sys._getframe())
    assert place.startswith("test_a_place_is_outside_of_torch_and_waiting_is_seen (test_watchdog.py:") and not waits
    assert where_is(None) == ("torch", False)


def test_a_step_has_a_time_limit_but_after_a_pause(free_port):
    store = TCPStore("127.0.0.1", free_port, 1, is_master=True)
    watchdog = Watchdog(rank=0, world_size=1, timeout_seconds=60, store=store)
    assert watchdog.deadline is None  # the first step compiles, and waits for the workers' start
    watchdog.step_done(1, pause=False)
    assert watchdog.step == 2 and watchdog.deadline == pytest.approx(time.monotonic() + 60, abs=5)
    watchdog.step_done(2, pause=True)
    assert watchdog.deadline is None
    watchdog.start()
    watchdog.stop()
    assert "watchdog" not in {thread.name for thread in threading.enumerate()}


def test_a_rank_that_meets_an_error_counts_as_waiting(free_port):
    store = TCPStore("127.0.0.1", free_port, 1, is_master=True)
    watchdog = Watchdog(rank=0, world_size=1, timeout_seconds=60, store=store)

    def beat_of_a_thread() -> Beat:
        thread = threading.Thread(target=watchdog._beat)
        thread.start()
        thread.join()
        return watchdog._beats()[0]

    assert not beat_of_a_thread().waits
    try:
        raise RuntimeError("Connection closed by peer")
    except RuntimeError:
        assert beat_of_a_thread().waits


def test_a_rank_whose_launcher_is_gone_stops_as_after_sigterm(free_port, monkeypatch, capfd):
    store = TCPStore("127.0.0.1", free_port, 1, is_master=True)
    sent, ended = [], threading.Event()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setattr("clipkit.training.watchdog.BEAT_SECONDS", 0.01)
    watchdog = Watchdog(rank=0, world_size=1, timeout_seconds=60, store=store)
    monkeypatch.setattr(os, "kill", lambda *signal: (sent.append(signal), ended.set()))
    monkeypatch.setattr(os, "getppid", lambda: 1)
    watchdog.start()
    assert ended.wait(30)
    watchdog.stop()
    assert sent == [(os.getpid(), signal.SIGTERM)]
    assert capfd.readouterr().err == "clipkit: the launcher of rank 0 is gone: stopping\n"


def test_a_worker_that_died_is_one_line():
    for error in (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. \nmore"),
                  MemoryError("Caught MemoryError in DataLoader worker process 0.\nOriginal Traceback ...")):
        with pytest.raises(ChildProcessError, match=r"^a loader worker failed .*lower data.workers") as caught, worker_errors():
            raise error
        assert "\n" not in str(caught.value)
    with pytest.raises(RuntimeError, match="shapes"), worker_errors():
        raise RuntimeError("shapes differ")


def test_errors_of_the_network_are_told_from_others():
    assert is_of_the_network(dist.DistNetworkError("x"))
    assert is_of_the_network(RuntimeError("[/pytorch/gloo/gloo/transport/tcp/pair.cc:538] Connection closed by peer"))
    assert not is_of_the_network(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert first_line(RuntimeError("")) == "RuntimeError"


MEET = """
import sys, time
from clipkit.config.launch import one_line_errors
from clipkit.training.process import training_process
with one_line_errors(), training_process("cpu", timeout_seconds=2, threads=1) as process:
    process.watchdog.step_done(16, pause=False)
    if process.rank == 1:
        time.sleep(1000)
    import torch, torch.distributed as dist
    dist.all_reduce(torch.ones(1))
"""


@pytest.mark.multiprocess
def test_a_rank_that_never_comes_ends_all_with_a_line_that_names_it(free_port):
    environment = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port)}
    ranks = [subprocess.Popen([sys.executable, "-c", MEET], stderr=subprocess.PIPE, text=True,
                              env={**environment, "RANK": str(rank)}) for rank in range(2)]
    for process in ranks:
        error = process.communicate(timeout=120)[1]
        assert process.returncode == 75, error
        line, = (line for line in error.splitlines() if line.startswith("clipkit: "))
        assert line.startswith("clipkit: rank 1 is late: step 17 was not done in 2 s"), line
        assert "Traceback" not in error
