"""torchrun's elastic rendezvous on one machine: an agent is killed, training goes on; it comes back, and both go on."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

LIMIT_SECONDS = 240  # of each wait; on a busy machine a start takes half a minute


def agent(port: int, shards: str, log: Path) -> subprocess.Popen:
    """Start one of up to two machines, with one process."""
    settings = ["model=tiny", f"data.train={shards}", "name=elastic", "train.samples=64000", "train.epochs=null",
                "train.global_batch_size=16", "train.precision=fp32", "train.threads=1", "data.workers=0", "log.every=5",
                "log.to=[]", "device=cpu", "checkpoint.every_steps=10", "parallel.timeout_seconds=60"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=1:2", "--nproc-per-node=1", "--max-restarts=3",
               "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=test", "--local-addr=127.0.0.1",
               "--rdzv-conf=last_call_timeout=5,keep_alive_interval=1,keep_alive_max_attempt=3", "--monitor-interval=0.5",
               "-m", "clipkit", "pretrain", *settings]
    # Without the second variable torch's agent (2.15) goes on with the address of the store of before, and they do not meet.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    with log.open("w") as file:
        return subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)


def wait_for(pattern: str, log: Path) -> re.Match[str]:
    end = time.monotonic() + LIMIT_SECONDS
    while time.monotonic() < end:
        if found := re.search(pattern, log.read_text() if log.exists() else "", re.DOTALL):
            return found
        time.sleep(0.2)
    raise AssertionError(f"no {pattern!r} in {LIMIT_SECONDS} s; {log} ends in {log.read_text()[-1500:]}")


@pytest.mark.multiprocess
def test_an_agent_is_killed_and_comes_back_and_training_goes_on(shards, free_port, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, second, again = tmp_path / "first.log", tmp_path / "second.log", tmp_path / "again.log"
    agents = [agent(free_port, shards, first)]
    try:
        time.sleep(1)  # the first keeps the store in which they meet
        agents.append(agent(free_port, shards, second))
        wait_for("2 processes on cpu.*step +[2-9]", first)
        os.killpg(agents[1].pid, signal.SIGKILL)
        killed_at = time.monotonic()
        alone = wait_for(r"one process on cpu.*goes on   at step ([\d,]+).*?step ", first)
        print(f"alone after {time.monotonic() - killed_at:.1f} s, from step {alone[1]}")
        agents.append(agent(free_port, shards, again))
        both = wait_for(r"one process on cpu.*2 processes on cpu.*goes on   at step ([\d,]+).*?step ", first)
        assert int(both[1].replace(",", "")) > int(alone[1].replace(",", "")) >= 10
    finally:
        for one in agents:
            if one.poll() is None:
                os.killpg(one.pid, signal.SIGTERM)
        for one in agents:
            one.wait(timeout=60)
    steps = [json.loads(line) for line in (tmp_path / "runs" / "elastic" / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in steps if "loss" in line]
    assert steps == sorted(set(steps))  # none twice, none missing between the log lines of a start
