"""Run the order of samples, the split of shards and the resume of 4,096 ranks and 100,000 shards, in one process.

    python -m scripts.simulate_ranks [--shards 100000 --lanes 4096 --ranks 1 2 64 4096 --steps 8]

The loaders are those of training, one a simulated rank; only the shards are made up: a reader that numbers their samples.
Any broken promise is an AssertionError. Expected: about 30 CPU seconds and 0.6 GB of memory.
"""

import argparse
import json
import random
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clipkit.config.data import DataConfig
from clipkit.data.lanes import Lane
from clipkit.data.loader import TrainLoader, make_train_loader, merge_states
from clipkit.data.samples import Example
from clipkit.data.tars import BadSample, RawSample

SEED = 1
ROWS_PER_LANE = 1


class Numbers:
    """Examples whose picture is the number of the shard and that of the sample in it."""

    shape: tuple[int, ...] = (2,)
    dtype = torch.int64
    reads_npy = False

    def __call__(self, raw: RawSample, rng: random.Random) -> Example | BadSample:
        return Example(torch.tensor((int(raw.url), int(raw.key))), raw.key, 0)


def num_samples(shard: int) -> int:
    """Shards are small and of different sizes."""
    return 2 + shard % 5


def read_numbers(url: str, *, keep: Callable[[int], bool]) -> Iterator[tuple[int, RawSample | BadSample | None]]:
    """Stand in for tars.read_numbered."""
    for number in range(num_samples(int(url))):
        yield number, RawSample(str(number), url, b"", "png", b"", None, None) if keep(number) else None


def no_tokens(texts: list[str]) -> Tensor:
    return torch.zeros((len(texts), 1), dtype=torch.int32)


def check_epochs(shards: Sequence[str], *, lanes: int, block_samples: int, epochs: int = 2) -> int:
    """Walk all lanes through whole epochs; every sample comes once in each, in all lanes together.

    Returns:
      How many samples came.
    """
    sizes = np.array([num_samples(shard) for shard in range(len(shards))])
    first = np.concatenate([[0], np.cumsum(sizes)])  # of each shard's samples among all
    seen = np.zeros((epochs, first[-1]), dtype=np.uint8)
    for number in range(lanes):
        lane = Lane([shards], lane=number, lanes=lanes, seed=SEED, block_samples=block_samples, read=read_numbers)
        source = lane.sources[0]
        while True:
            item = next(lane)
            epoch = source.cursor.epoch  # of the sample just given
            if epoch == epochs:
                break
            seen[epoch, first[int(item.url)] + int(item.key or 0)] += 1
    assert (seen == 1).all(), "a sample came twice in an epoch, or never"
    return int(seen.sum())


def make_ranks(data: DataConfig, shards: Sequence[str], *, lanes: int, world_size: int,
               state: dict[str, Any] | None = None) -> list[TrainLoader]:
    make = partial(make_train_loader, data, shards=[shards], lanes=lanes, tokenize=no_tokens, examples=Numbers(), seed=SEED,
                   global_batch_size=lanes * ROWS_PER_LANE, world_size=world_size, state=state, read=read_numbers)
    return [make(rank=rank) for rank in range(world_size)]


def global_batch(ranks: Sequence[TrainLoader]) -> Tensor:
    """The rows of all ranks' next batches, (G, 2); every rank has as many."""
    parts = [next(rank).images for rank in ranks]
    assert len({len(part) for part in parts}) == 1, "ranks have batches of different sizes"
    return torch.cat(parts)


def check_ranks(data: DataConfig, shards: Sequence[str], expected: Sequence[Tensor], *, lanes: int, world_size: int,
                resumed_on: int, rng: random.Random) -> None:
    """Run so many ranks, and from a random step on another number of them; the batches are the expected ones."""
    ranks = make_ranks(data, shards, lanes=lanes, world_size=world_size)
    stop = rng.randrange(1, len(expected))
    state = None
    for step, batch in enumerate(expected):
        if step == stop:
            state = json.loads(json.dumps(merge_states([rank.state() for rank in ranks])))
        assert torch.equal(global_batch(ranks), batch), f"{world_size} ranks have another batch at step {step}"
    resumed = make_ranks(data, shards, lanes=lanes, world_size=resumed_on, state=state)
    for step, batch in enumerate(expected[stop:], stop):
        assert torch.equal(global_batch(resumed), batch), f"{resumed_on} ranks resumed at {stop} differ at step {step}"


def simulate(data: DataConfig, *, num_shards: int, lanes: int, worlds: Sequence[int], num_steps: int,
             say: Callable[[str], None] = lambda line: None) -> None:
    """Check everything, and say a line of a table for each part."""
    rng = random.Random(SEED)
    shards = [str(shard) for shard in range(num_shards)]
    row = "{:>36} {:>8} {:>12} {:>9} {:>9}".format
    say(row("checked", "shards", "samples", "CPU s", "peak GB"))

    def timed(name: str, check: Callable[[], int | None]) -> None:
        begin = time.process_time()
        samples = check() or 0
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e9 if sys.platform == "darwin" else 1e6)
        say(row(name, f"{num_shards:,}", f"{samples:,}", f"{time.process_time() - begin:.1f}", f"{peak:.2f}"))

    timed(f"2 epochs of {lanes:,} lanes", lambda: check_epochs(shards, lanes=lanes, block_samples=data.block_samples))
    one = make_ranks(data, shards, lanes=lanes, world_size=worlds[0])
    expected = [global_batch(one) for _ in range(num_steps)]
    for world_size, resumed_on in zip(worlds, [*worlds[1:], worlds[0]], strict=True):
        def check(world_size: int = world_size, resumed_on: int = resumed_on) -> int:
            check_ranks(data, shards, expected, lanes=lanes, world_size=world_size, resumed_on=resumed_on, rng=rng)
            return num_steps * lanes * ROWS_PER_LANE

        timed(f"{world_size:,} ranks, resumed on {resumed_on:,}", check)


def simulated_data() -> DataConfig:
    """The settings of data=shards, with small blocks and no workers."""
    from omegaconf import OmegaConf

    from clipkit.config import parse
    from clipkit.config.command_line import conf_dir

    settings: Any = OmegaConf.to_container(OmegaConf.load(conf_dir() / "pretrain" / "data" / "shards.yaml"))
    return parse(DataConfig, settings | {"train": ["simulated"], "workers": 0, "block_samples": 4})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=100_000)
    parser.add_argument("--lanes", type=int, default=4096)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 64, 4096])
    parser.add_argument("--steps", type=int, default=8)
    given = parser.parse_args()
    torch.set_num_threads(1)
    simulate(simulated_data(), num_shards=given.shards, lanes=given.lanes, worlds=given.ranks, num_steps=given.steps,
             say=partial(print, flush=True))


if __name__ == "__main__":
    main()
