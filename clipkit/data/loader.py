"""Lanes to batches, in this process or in worker processes: the same batches bit for bit with any number of either.

The order of samples is lanes.py's; what is done to one is samples.py's.
"""

import ctypes
import os
import signal
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from clipkit.data.batch import Batch
from clipkit.data.lanes import Reader, check_lanes, shards_met, start_of_lane
from clipkit.data.parts import UNREADABLE, LaneStreams, Part, empty_rows
from clipkit.data.remote import remote_shards
from clipkit.data.samples import Examples
from clipkit.data.tars import BadSample, DataError, RawSample, read_numbered

if TYPE_CHECKING:
    from clipkit.config.data import DataConfig

MAX_DEFAULT_WORKERS = 8
MIN_SEEN = 100  # samples before a share of bad ones is judged
MIN_SHARDS_MET = 20  # shards before a share of unreadable ones is judged
SIGTERM_GRACE_SECONDS = 30  # what Slurm and torchrun leave between SIGTERM and SIGKILL
PR_SET_PDEATHSIG = 1  # <sys/prctl.h>
PARTS_AHEAD = 2  # parts of batches that each worker prepares ahead


def default_workers(local_world_size: int = 1) -> int:
    """Loader processes for one rank: one less than its share of the cores, between 1 and 8."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(MAX_DEFAULT_WORKERS, cores // local_world_size - 1))


def make_train_loader(data: "DataConfig", *, shards: Sequence[Sequence[str]], lanes: int,
                      tokenize: Callable[[list[str]], Tensor], examples: Examples, seed: int,
                      global_batch_size: int, rank: int = 0, world_size: int = 1, local_world_size: int = 1,
                      pin_memory: bool = False, state: dict[str, Any] | None = None,
                      read: Reader | None = None, leave_out: Callable[[RawSample], bool] | None = None) -> "TrainLoader":
    """Build the endless loader of one rank.

    Args:
      data: what says how samples are found, not what is done to one; that is in `examples`.
      shards: the shards of each source.
      lanes: number of streams that the order is made of; a multiple of world_size that divides global_batch_size.
      tokenize: texts to (N, L) int32; picklable where workers are not forked (macOS, Windows).
      examples: what a batch holds of each sample; `PictureExamples` for pictures.
      seed: of order, captions and augmentation.
      global_batch_size: over all ranks.
      rank, world_size, local_world_size: of this process; the last only for the default number of workers.
      pin_memory: give batches in page-locked memory.
      state: where to go on: merge_states() of what all ranks' loaders gave, from any number of ranks and workers.
      read: reads a shard; None = tars.read_numbered. Simulations give their own.
      leave_out: says of a sample that it is not to be trained on; picklable. None = all are.

    Raises:
      ValueError: lanes do not fit, a source has no shards, or the state is of other lanes or sources.
    """
    check_lanes(lanes, global_batch_size, world_size)
    for number, source in enumerate(shards):
        if not source:
            raise ValueError(f"source {number} of {len(shards)} has no shards; give each source at least one")
    if data.weights is None and len(shards) > 1:
        shards = [list(chain.from_iterable(shards))]  # joined here, once for all lanes
    own = [str(lane) for lane in range(rank * lanes // world_size, (rank + 1) * lanes // world_size)]
    if state is None:
        start = start_of_lane(len(shards)) | {"bad": {}}
        positions = dict.fromkeys(own, start)
    elif len(state["lanes"]) != lanes or not state["lanes"].keys() >= set(own):
        raise ValueError(f"the saved position has {len(state['lanes'])} lanes, this run {lanes}; resume with "
                         f"data.lanes={len(state['lanes'])}")
    else:
        positions = {lane: state["lanes"][lane] for lane in own}
    workers = default_workers(local_world_size) if data.workers is None else data.workers
    if workers > len(own):
        if data.workers is not None and rank == 0:
            warnings.warn(f"data.workers is {workers}, but a rank has {len(own)} lanes and a lane is not divided: "
                          f"using {len(own)} workers", stacklevel=2)
        workers = len(own)
    remote = remote_shards(data)
    read = read or partial(read_numbered, allow_pipe=data.allow_pipe, with_npy=examples.reads_npy, remote=remote)
    streams = LaneStreams(data=data, shards=shards, num_lanes=lanes, tokenize=tokenize, examples=examples, read=read,
                          fetch_ahead=remote.fetch_ahead, seed=seed, rows_per_lane=global_batch_size // lanes,
                          leave_out=leave_out)
    return TrainLoader(streams, positions, workers=workers, pin_memory=pin_memory)


def merge_states(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Join the states of all ranks' loaders into that of the whole run.

    Raises:
      ValueError: two of them hold the same lane.
    """
    lanes = {lane: position for state in states for lane, position in state["lanes"].items()}
    if len(lanes) != sum(len(state["lanes"]) for state in states):
        raise ValueError("two loader states hold the same lane; merge one state a rank")
    return _run_state(lanes)


def _run_state(lanes: dict[str, dict[str, Any]]) -> dict[str, Any]:
    bad = sum((Counter(position["bad"]) for position in lanes.values()), Counter())
    samples = sum(position["position"] for position in lanes.values()) - bad.total()
    ordered = {lane: lanes[lane] for lane in sorted(lanes, key=int)}
    return {"lanes": ordered, "bad": dict(sorted(bad.items())), "samples": samples}


class TrainLoader:
    """Iterate for this rank's Batches, without end. Make it with make_train_loader.

    Iterating raises DataError (a ValueError) when there is nothing to read, or when, after the first 100 samples of
    this rank, more than data.max_bad_fraction of them are bad, or, after its first 20 shards, more than
    data.max_bad_shards_fraction of those unreadable; and RuntimeError when a worker process died.

    Attributes:
      last_bad: by cause, the last BadSample that this process met.
    """

    def __init__(self, streams: "LaneStreams", positions: dict[str, dict[str, Any]], *, workers: int,
                 pin_memory: bool) -> None:
        self.last_bad: dict[str, BadSample] = {}
        self.workers = workers
        self._streams, self._positions, self._pin_memory = streams, positions, pin_memory
        self._parts: Iterator[Part] | None = None

    @property
    def bad(self) -> dict[str, int]:
        """Bad samples by cause, of this rank's lanes, since the run began (also before it was resumed)."""
        return self.state()["bad"]

    @property
    def by_source(self) -> dict[str, dict[str, int]]:
        """Samples drawn and bad ones by entry of data.train, counted as `bad` is; {} where the sources are joined."""
        if self._streams.data.weights is None:
            return {}
        return {name: dict(sum((Counter(position.get(name)) for position in self._positions.values()), Counter()))
                for name in ("drawn_by_source", "bad_by_source")}

    def state(self) -> dict[str, Any]:
        """Where to go on after the last batch given, whatever workers have prepared beyond it.

        Returns:
          For JSON, of this rank's lanes: {"lanes": {lane: {"position", "cursors", "bad"}}, "bad": {cause: count},
          "samples": good samples given}.
        """
        return _run_state(self._positions)

    def __iter__(self) -> "TrainLoader":
        return self

    def __next__(self) -> Batch:
        if self._parts is None:
            self._parts = _read_ahead(self._streams, self._positions, self.workers)
        try:
            parts = [next(self._parts) for _ in range(max(1, self.workers))]
        except (ConnectionError, EOFError, FileNotFoundError) as error:  # as torch meets a worker that dies while it sends
            raise RuntimeError(f"a DataLoader worker died ({error!r}); it may have run out of memory, main or shared: "
                               "lower data.workers or data.block_samples") from error
        self._positions = {lane: position for part in parts for lane, position in part.positions.items()}
        for part in parts:
            self.last_bad.update(part.bad)
        self._check_bad("; ".join(part.failure for part in parts if part.failure))
        return _join(parts, self._pin_memory)

    def close(self) -> None:
        """End the workers. If it is iterated again, it goes on after the last batch given."""
        self._parts = None

    def _check_bad(self, failure: str) -> None:
        bad = Counter(self.bad)
        seen = sum(position["position"] for position in self._positions.values())
        allowed = self._streams.data.max_bad_fraction
        trouble = self._unreadable_shards(bad[UNREADABLE])
        few = seen < MIN_SEEN and allowed > 0  # where none is allowed, the first stops the run
        if not failure and not trouble and (few or bad.total() <= allowed * seen):
            return
        self.close()
        causes = ", ".join(f"{count} {cause}" for cause, count in bad.most_common())
        shown = "; ".join(f"{cause}: {sample.url} key {sample.key}: {sample.detail}" if sample.key else
                          f"{cause}: {sample.url}: {sample.detail}" for cause, sample in self.last_bad.items())
        trouble = trouble or f"{bad.total()} of {seen} samples are bad, allowed are {allowed:.0%} (data.max_bad_fraction)"
        raise DataError(trouble
                        + (f"; by cause: {causes}" if causes else "") + (f"; for instance {shown}" if shown else "")
                        + (f"; {failure}" if failure else "") + "; look with: clipkit shards check data=<shards>")

    def _unreadable_shards(self, unreadable: int) -> str:
        """What is wrong where too many of the shards met are unreadable, else ""."""
        data, lanes = self._streams.data, self._streams.num_lanes
        met = sum(shards_met(cursor, num_shards=len(source), lanes=lanes, resampled=data.resampled)
                  for position in self._positions.values()
                  for cursor, source in zip(position["cursors"], self._streams.shards, strict=True))
        if met < MIN_SHARDS_MET or unreadable <= data.max_bad_shards_fraction * met:
            return ""
        return (f"{unreadable} of about {met:.0f} shards are unreadable, allowed are {data.max_bad_shards_fraction:.0%} "
                "(data.max_bad_shards_fraction)")


def _join(parts: Sequence[Part], pin_memory: bool) -> Batch:
    """One batch of the workers' rows, copied once; one worker's rows are the batch as they are."""
    if len(parts) == 1 and not pin_memory:
        return Batch(parts[0].images, parts[0].tokens, parts[0].group_ids, parts[0].teacher_ids)
    columns = []
    for name in Batch._fields:
        pieces = [getattr(part, name) for part in parts]
        rows = empty_rows(sum(map(len, pieces)), pieces[0].shape[1:], pieces[0].dtype, pin_memory=pin_memory)
        columns.append(torch.cat(pieces, out=rows))
    return Batch(*columns)


def _read_ahead(streams: "LaneStreams", positions: dict[str, dict[str, Any]], workers: int) -> Iterator[Part]:
    """Parts in turn from worker 0, 1, ..., 0, 1, ...; without workers, whole batches made in this process."""
    if workers == 0:
        return streams.parts(positions)
    # Forked workers start at once and share what is loaded; they never touch the accelerator. macOS cannot fork safely.
    context = "fork" if sys.platform == "linux" else None
    own_generator = torch.Generator().manual_seed(0)  # else a number is drawn from the global one, with workers only
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*multi-threaded, use of fork", category=DeprecationWarning)
        warnings.filterwarnings("ignore", message="This DataLoader will create", category=UserWarning)
        return iter(DataLoader(_WorkerParts(streams, positions), batch_size=None, num_workers=workers,
                               prefetch_factor=PARTS_AHEAD, multiprocessing_context=context,
                               worker_init_fn=_start_worker, generator=own_generator))


def _start_worker(_worker: int) -> None:
    """Leave Ctrl-C and SIGTERM, which schedulers send to all processes, to the main process: it saves, then ends these."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _end_later)
    if hasattr(signal, "SIGUSR1"):
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    if sys.platform == "linux":  # end with the main process, and at once: a worker holds its connections open
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _end_later(_signal: int, _frame: FrameType | None) -> None:
    """Work on for a while after the first SIGTERM; a second one ends the process, and so does the alarm."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.alarm(SIGTERM_GRACE_SECONDS)


class _WorkerParts(IterableDataset):
    """In each worker process, the parts of its contiguous share of the lanes."""

    def __init__(self, streams: "LaneStreams", positions: dict[str, dict[str, Any]]) -> None:
        self.streams, self.positions = streams, positions

    def __iter__(self) -> Iterator[Part]:
        info = get_worker_info()
        assert info is not None
        lanes = list(self.positions)
        share = lanes[len(lanes) * info.id // info.num_workers:len(lanes) * (info.id + 1) // info.num_workers]
        return self.streams.parts({lane: self.positions[lane] for lane in share})
