"""Lanes to parts of batches: each lane's good examples decoded in turn, the bad ones counted. Runs in the workers."""

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from clipkit.data.lanes import Lane, Reader
from clipkit.data.samples import Example, Examples
from clipkit.data.tars import BadSample, DataError, RawSample

if TYPE_CHECKING:
    from clipkit.config.data import DataConfig

MAX_BAD_RUN = 1000  # bad samples in a row after which a lane judges their share without waiting for a batch
MAX_LEFT_OUT_RUN = 1000  # samples in a row that are not to be trained on
MAX_UNREADABLE_RUN = 5  # unreadable shards likewise: each may have taken minutes of retries
UNREADABLE = "unreadable shard"


class Part(NamedTuple):
    """What one worker adds to a batch: the rows of its lanes, in lane order. Legend: P rows of the part."""

    images: Tensor  # (P, 3, H, W) uint8, channels last, or what `LaneStreams.examples` makes in its place
    tokens: Tensor  # (P, L) int32
    group_ids: Tensor  # (P,) int64
    teacher_ids: Tensor  # (P, 2) int64, or (P, 0)
    positions: dict[str, dict[str, Any]]  # of each lane after these rows
    bad: dict[str, BadSample]  # by cause, the last one met on the way
    failure: str  # why a lane gave up, else ""; the rows are then not complete


def empty_rows(num: int, shape: Sequence[int], dtype: torch.dtype, *, pin_memory: bool = False) -> Tensor:
    """Memory for `num` rows; pictures (uint8) are channels last in it, as they are decoded: a transpose would cost a pass."""
    layout = torch.channels_last if dtype == torch.uint8 else torch.contiguous_format
    return torch.empty((num, *shape), dtype=dtype, memory_format=layout, pin_memory=pin_memory)


@dataclass(frozen=True, kw_only=True)
class LaneStreams:
    """What the samples of any lane are made with."""

    data: "DataConfig"
    shards: Sequence[Sequence[str]]  # of each source
    num_lanes: int
    tokenize: Callable[[list[str]], Tensor]
    examples: Examples
    read: Reader
    fetch_ahead: Callable[[str], None]  # told the shard that a lane will read next
    seed: int
    rows_per_lane: int  # of each batch
    leave_out: Callable[[RawSample], bool] | None = None  # samples that are not this run's to train on

    def parts(self, positions: dict[str, dict[str, Any]]) -> Iterator[Part]:
        """Endless parts of the given lanes, from the given positions; a part with a failure is the last."""
        lanes = [GoodExamples(self, int(lane), position) for lane, position in positions.items()]
        failure = ""
        while not failure:
            num_rows = len(lanes) * self.rows_per_lane
            images = empty_rows(num_rows, self.examples.shape, self.examples.dtype)  # (P, 3, H, W)
            captions, group_ids, teacher_ids = [], [], []
            try:
                for row in range(num_rows):
                    example = next(lanes[row // self.rows_per_lane])
                    images[row] = example.image
                    captions.append(example.caption)
                    group_ids.append(example.group_id)
                    teacher_ids.append(example.teacher_ids)
            except DataError as error:
                failure = str(error)
            tokens = self.tokenize(captions) if captions else torch.zeros((0, 1), dtype=torch.int32)  # (P, L)
            yield Part(images, tokens, torch.tensor(group_ids, dtype=torch.int64), torch.tensor(teacher_ids, dtype=torch.int64),
                       {str(lane.number): lane.state() for lane in lanes},
                       {cause: sample for lane in lanes for cause, sample in lane.take_bad().items()}, failure)


class GoodExamples:
    """The good examples of one lane, without end; the bad ones are counted."""

    def __init__(self, streams: LaneStreams, number: int, position: dict[str, Any]) -> None:
        data = streams.data
        self.number, self.streams = number, streams
        self.lane = Lane(streams.shards, lane=number, lanes=streams.num_lanes, seed=streams.seed,
                         block_samples=data.block_samples, weights=data.weights, resampled=data.resampled,
                         read=streams.read, fetch_ahead=streams.fetch_ahead, state=position)
        self.bad = Counter(position["bad"])
        # A checkpoint written before these were counted lacks them: they then count from there on.
        self.drawn_by_source = Counter(position.get("drawn_by_source", {}))
        self.bad_by_source = Counter(position.get("bad_by_source", {}))
        self.last_bad: dict[str, BadSample] = {}

    def state(self) -> dict[str, Any]:
        state = self.lane.state() | {"bad": dict(self.bad)}
        if self.streams.data.weights is None:
            return state
        return state | {"drawn_by_source": dict(self.drawn_by_source), "bad_by_source": dict(self.bad_by_source)}

    def take_bad(self) -> dict[str, BadSample]:
        """By cause, the last BadSample since the last call."""
        taken, self.last_bad = self.last_bad, {}
        return taken

    def __next__(self) -> Example:
        data, run, unreadable_run, left_out_run, begun = self.streams.data, 0, 0, 0, self.lane.epochs
        while True:
            rng = random.Random(f"{self.streams.seed}/{self.number}/{self.lane.position}")
            item = next(self.lane)
            if self.streams.leave_out and isinstance(item, RawSample) and self.streams.leave_out(item):
                left_out_run += 1
                if left_out_run == MAX_LEFT_OUT_RUN:
                    raise DataError(f"lane {self.number} finds only samples that are set aside; set data.lanes lower")
                continue
            source = data.train[self.lane.last_source]
            self.drawn_by_source[source] += 1
            if isinstance(item, RawSample):
                item = self.streams.examples(item, rng)
            if isinstance(item, Example):
                return item
            self.bad[item.cause] += 1
            self.bad_by_source[source] += 1
            self.last_bad[item.cause] = item
            run += 1
            too_many = self.bad.total() > data.max_bad_fraction * self.lane.position
            if run >= MAX_BAD_RUN and (too_many or self.lane.epochs >= begun + 2):
                raise DataError(f"lane {self.number} met {run} bad samples in a row")
            unreadable_run = unreadable_run + 1 if item.cause == UNREADABLE else 0
            allowed = data.max_bad_shards_fraction * self.lane.shards_met
            if unreadable_run >= MAX_UNREADABLE_RUN and self.bad[UNREADABLE] > allowed:
                raise DataError(f"lane {self.number} met {unreadable_run} unreadable shards in a row "
                                f"(data.max_bad_shards_fraction is {data.max_bad_shards_fraction:g})")
