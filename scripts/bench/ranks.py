"""A step on several gloo processes of this machine, for growth.py: each arm forks its ranks from what it has imported."""

import multiprocessing
import os
import signal
import socket
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any


def on_ranks(make: Callable[..., Any], *, processes: int, steps: int, **start: Any) -> dict[str, Any]:
    """Train on ranks that share the batch; ask this before the arm has trained anything itself.

    Args:
      make: Makes the step_arm.Trainer of a rank; RANK and WORLD_SIZE stand in its environment.
      processes: Number of ranks.
      steps: To measure, one by one, after one that is left out.
      start: What `make` takes.

    Returns:
      seconds: of each step, in processor time, summed over the ranks; memory: the most bytes of a rank; version.

    Raises:
      RuntimeError: a rank failed.
    """
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    receivers, ranks = [], []
    for rank in range(processes):
        receiver, sender = fork.Pipe(duplex=False)
        environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(processes),
                       "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(processes)}
        ranks.append(fork.Process(target=one_rank, args=(make, environment, steps, start, sender)))
        ranks[-1].start()
        sender.close()  # or the end of the rank would not be seen
        receivers.append(receiver)
    try:
        answers = [receiver.recv() for receiver in receivers]
    except EOFError as error:
        raise RuntimeError(f"one of {processes} ranks ended; its error stands above") from error
    finally:
        for process in reversed(ranks):  # rank 0 last: the others watch it
            process.kill()
            process.join()
    found = [one for answer in answers for one in answer["found"]]
    return {"seconds": [sum(answer["found"][step]["seconds"] for answer in answers) for step in range(steps)],
            "memory": max(one["memory"] for one in found), "version": answers[0]["version"]}


def one_rank(make: Callable[..., Any], environment: dict[str, str], steps: int, start: dict[str, Any],
             sender: Connection) -> None:
    os.environ.update(environment)
    trainer = make(**start)
    found = []
    for _ in range(steps + 1):
        trainer.steps(1)
        found.append(trainer.clock.found())
    sender.send({"found": found[1:], "version": trainer.version})
    signal.pause()  # until all have answered: rank 0 keeps the others' meeting place
