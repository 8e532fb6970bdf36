"""The order of the samples: lanes, endless streams that are a function of the seed and never of processes or workers.

What is in a shard is tars.py; decoding is samples.py; lanes to batches is loader.py.
"""

import random
from array import array
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import islice
from typing import Any, NamedTuple, Protocol

from clipkit.data.tars import BadSample, DataError, RawSample, read_numbered

MAX_DEFAULT_LANES = 64


class Cursor(NamedTuple):
    """The place of a lane in one of its sources: what comes next."""

    epoch: int = 0  # passes over the source; when shards are drawn with replacement, the number of the draw
    shard: int = 0  # place in the lane's shards of this epoch
    block: int = 0
    offset: int = 0  # samples given of this block


def default_lanes(num_shards: int) -> int:
    """The largest power of two that is at most num_shards, and at most 64."""
    return min(MAX_DEFAULT_LANES, 1 << max(0, num_shards.bit_length() - 1))


def check_lanes(lanes: int, global_batch_size: int, world_size: int) -> None:
    """Make sure that every global batch takes as many samples from each lane, and that ranks own whole lanes.

    Raises:
      ValueError: lanes does not divide global_batch_size, or world_size does not divide lanes.
    """
    if lanes < 1 or global_batch_size < 1:
        raise ValueError(f"data.lanes is {lanes}, train.global_batch_size {global_batch_size}; both must be positive")
    if lanes % world_size == 0 and global_batch_size % lanes == 0:
        return
    fitting = [n for n in range(world_size, global_batch_size + 1, world_size) if global_batch_size % n == 0]
    nearest = [n for n in fitting if n < lanes][-1:] + [n for n in fitting if n > lanes][:1]
    options = [f"data.lanes={n}" for n in nearest]
    if lanes % world_size == 0:
        below = global_batch_size // lanes * lanes
        options += [f"train.global_batch_size={size}" for size in (below, below + lanes) if size]
    raise ValueError(f"data.lanes is {lanes}, train.global_batch_size {global_batch_size}, processes {world_size}; "
                     "lanes must be a multiple of the processes and divide the batch: set "
                     + (" or ".join(options) or f"train.global_batch_size to a multiple of {world_size}"))


def shards_met(cursor: Sequence[int], *, num_shards: int, lanes: int, resampled: bool) -> float:
    """How many shards of a source a lane has begun, to judge the share of those that fail by.

    Of a shard that lanes share, each has its part; where lanes don't divide the shards, it is the mean over the lanes.
    """
    epoch, place, _, _ = cursor
    if resampled:
        return epoch + 1
    share = lanes if num_shards < lanes else 1
    return epoch * num_shards / lanes + (place + 1) / share


@lru_cache(maxsize=32)  # the lanes of a process share it: shuffling 100,000 shards takes 50 ms
def _everyones_order(seed: int, source: int, epoch: int, num_shards: int) -> array:
    order = array("i", range(num_shards))
    _rng(seed, source, "shards", epoch).shuffle(order)
    return order


def _rng(*parts: object) -> random.Random:
    return random.Random("/".join(map(str, parts)))


class Reader(Protocol):
    """Reads the samples of one shard, as tars.read_numbered."""

    def __call__(self, url: str, *, keep: Callable[[int], bool]) -> Iterator[tuple[int, RawSample | BadSample | None]]:
        """Yield (number in the shard, item), None for those not kept."""
        ...


class LaneSource:
    """One lane's endless stream over one source; exact from any Cursor.

    In an epoch all shards are put in an order drawn from (seed, source, epoch) and dealt to the lanes in turn, so that
    a lane owns whole shards and, over the epochs, each shard is seen equally often though lanes may not divide them.
    A source with fewer shards than lanes gives each lane all of its shards, and of shard i the samples j with
    (i + j) % lanes == lane. A shard is cut into blocks, which are read whole and permuted. A lane's first block of a
    shard is the shorter the lower its number, so that the lanes do not read at the same time.
    """

    def __init__(self, shards: Sequence[str], *, source: int, lane: int, lanes: int, seed: int, block_samples: int,
                 resampled: bool = False, read: Reader, fetch_ahead: Callable[[str], None], cursor: Cursor) -> None:
        self.shards, self.source, self.lane, self.lanes = shards, source, lane, lanes
        self.seed, self.block_samples, self.resampled = seed, block_samples, resampled
        self.read, self.fetch_ahead = read, fetch_ahead
        self.by_sample = len(shards) < lanes and not resampled
        self.first_block = max(1, block_samples * (lane + 1) // lanes)
        self.cursor = cursor
        self.order: Sequence[int] = self._shard_order(cursor.epoch)
        self.reader: Iterator[RawSample | BadSample] | None = None  # None: before a shard, or behind its last block
        self.block: list[RawSample | BadSample | None] = []
        self.barren = 0  # shards in a row that held nothing for this lane
        self.last_trouble: BadSample | None = None

    def __iter__(self) -> Iterator[RawSample | BadSample]:
        return self

    def __next__(self) -> RawSample | BadSample:
        while self.cursor.offset >= len(self.block):
            self._read_block()
        offset = self.cursor.offset
        item, self.block[offset] = self.block[offset], None  # frees the bytes that were given
        epoch, shard, block, _ = self.cursor
        if offset + 1 < len(self.block):
            self.cursor = Cursor(epoch, shard, block, offset + 1)
        else:
            # A shard known to be at its end is left at once: resumed behind its end, it would tell its damage twice.
            self.cursor = Cursor(epoch, shard + 1) if self.reader is None else Cursor(epoch, shard, block + 1)
            self.block = []
        assert item is not None
        return item

    def _read_block(self) -> None:
        """Fill `block` from the cursor, or move the cursor to the next shard where this one has no more blocks."""
        epoch, place, block, offset = self.cursor
        if place >= len(self.order):
            self._next_shard()
            return
        if self.reader is None:
            self.reader = self._open(self.order[place], self._block_start(block))
        size = self.first_block if block == 0 else self.block_samples
        items: list[RawSample | BadSample | None] = list(islice(self.reader, size))
        if len(items) < size or any(isinstance(item, BadSample) and item.key is None for item in items):
            self.reader = None
        if not items:
            self.barren += block == 0
            self._next_shard()
            return
        self.barren = 0
        if place + 1 < len(self.order):
            self.fetch_ahead(self.shards[self.order[place + 1]])
        trouble = [items.pop()] if isinstance(items[-1], BadSample) and items[-1].key is None else []
        _rng(self.seed, self.source, "block", self.lane, epoch, self.order[place], block).shuffle(items)
        items = [*trouble, *items]  # told before the samples, whose order it has changed
        items[:offset] = [None] * min(offset, len(items))
        self.block = items

    def _next_shard(self) -> None:
        self.reader = None
        epoch, place, _, _ = self.cursor
        if place + 1 < len(self.order):
            self.cursor = Cursor(epoch, place + 1)
            return
        if self.barren > len(self.shards):
            raise DataError(self._nothing_to_read())
        self.cursor = Cursor(epoch + 1)
        self.order = self._shard_order(epoch + 1)

    def _nothing_to_read(self) -> str:
        trouble = self.last_trouble
        cause = f" ({trouble.cause}: {trouble.url}: {trouble.detail})" if trouble else ""
        return (f"lane {self.lane} of {self.lanes} finds no sample in its {len(self.shards)} shards, such as "
                f"{self.shards[0]}{cause}; give more data, or set data.lanes to at most the number of samples")

    def _block_start(self, block: int) -> int:
        return 0 if block == 0 else self.first_block + (block - 1) * self.block_samples

    def _shard_order(self, epoch: int) -> Sequence[int]:
        """This lane's shards of an epoch, in order."""
        num_shards = len(self.shards)
        if self.resampled:
            return [_rng(self.seed, self.source, "draw", self.lane, epoch).randrange(num_shards)]
        if self.by_sample:
            order = list(range(num_shards))
            _rng(self.seed, self.source, "shards", self.lane, epoch).shuffle(order)
            return order
        order = _everyones_order(self.seed, self.source, epoch, num_shards)
        # Lanes that got one shard more pass that on, by turns, from epoch to epoch.
        return order[(self.lane + epoch * (num_shards % self.lanes)) % self.lanes::self.lanes]

    def _open(self, shard: int, start: int) -> Iterator[RawSample | BadSample]:
        """This lane's items of a shard, from its own sample `start` on (counted among the lane's samples only)."""
        first, step = ((self.lane - shard) % self.lanes, self.lanes) if self.by_sample else (0, 1)

        def keep(number: int) -> bool:
            return number >= first + start * step and (number - first) % step == 0

        for number, item in self.read(self.shards[shard], keep=keep):
            if isinstance(item, BadSample) and number < 0:
                self.last_trouble = item
                if first and item.cause != "truncated shard":
                    return  # one of the lanes that share the shard counts it; of a cut one each misses samples of its own
            if item is not None:
                yield item


def start_of_lane(num_sources: int) -> dict[str, Any]:
    """The state of a lane that has given nothing, over so many sources (1 where sources are joined)."""
    return {"position": 0, "cursors": [list(Cursor()) for _ in range(num_sources)]}


class Lane:
    """An endless stream of samples over all sources; continues exactly from `state()`.

    Args:
      sources: the shards of each source.
      lane, lanes: which lane this is, of how many.
      seed: of the run.
      block_samples: samples that are read and permuted together; as many encoded samples are held in memory.
      weights: relative frequency of each source's samples. None = the sources are joined into one.
      resampled: draw shards with replacement.
      read: reads a shard.
      fetch_ahead: told the shard that comes after the one being read, again and again.
      state: what `state()` gave. None = from the start.

    Iterating raises DataError (a ValueError) when there is nothing to read for this lane.
    """

    def __init__(self, sources: Sequence[Sequence[str]], *, lane: int, lanes: int, seed: int, block_samples: int,
                 weights: Sequence[float] | None = None, resampled: bool = False, read: Reader = read_numbered,
                 fetch_ahead: Callable[[str], None] = lambda url: None, state: dict[str, Any] | None = None) -> None:
        if weights is None and len(sources) > 1:
            sources = [[shard for source in sources for shard in source]]
        state = state or start_of_lane(len(sources))
        cursors = [Cursor(*cursor) for cursor in state["cursors"]]
        if len(cursors) != len(sources):
            raise ValueError(f"the saved position is over {len(cursors)} sources, data.train has {len(sources)}; "
                             "resume with the data that the run began with")
        self.lane, self.seed, self.weights = lane, seed, weights
        self.position: int = state["position"]  # samples given, bad ones too
        self.last_source = 0  # that of the sample given last
        self.sources = [
            LaneSource(shards, source=number, lane=lane, lanes=lanes, seed=seed, block_samples=block_samples,
                       resampled=resampled, read=read, fetch_ahead=fetch_ahead, cursor=cursor)
            for number, (shards, cursor) in enumerate(zip(sources, cursors, strict=True))
        ]

    def __iter__(self) -> Iterator[RawSample | BadSample]:
        return self

    def __next__(self) -> RawSample | BadSample:
        source = 0
        if self.weights is not None:
            draw = random.Random(f"{self.seed}/source/{self.lane}/{self.position}")
            source = draw.choices(range(len(self.sources)), self.weights)[0]
        item = next(self.sources[source])
        self.position += 1
        self.last_source = source
        return item

    @property
    def epochs(self) -> float:
        """Passes begun over the sources, summed over them."""
        return sum(source.cursor.epoch / (len(source.shards) if source.resampled else 1) for source in self.sources)

    @property
    def shards_met(self) -> float:
        return sum(shards_met(source.cursor, num_shards=len(source.shards), lanes=source.lanes, resampled=source.resampled)
                   for source in self.sources)

    def state(self) -> dict[str, Any]:
        """Everything that a Lane with the same settings needs to go on, for JSON."""
        return {"position": self.position, "cursors": [list(source.cursor) for source in self.sources]}
