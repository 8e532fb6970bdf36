"""The pictures of an image set, preprocessed, from this process or from loader processes: the same ones in the same order."""

import signal
import sys
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from clipkit.data.tars import BadSample
from clipkit.evaluation.image_entry import SampleInfo
from clipkit.evaluation.image_sets import ALL, ImageSet, Share
from clipkit.evaluation.sample_keys import printable

if TYPE_CHECKING:
    from PIL.Image import Image

CHUNK_SAMPLES = 16  # pictures that a loader process hands over at once
CHUNKS_AHEAD = 4  # that each prepares ahead


class LoadedImage(NamedTuple):
    """One picture of an image set."""

    info: SampleInfo
    pixels: Tensor | None  # (3, H, W) preprocessed; None if it was not asked for


@dataclass(frozen=True)
class ImageReader:
    """What is read, and which share of it; picklable."""

    images: ImageSet
    transform: "Callable[[Image], Tensor]"  # a picture to (3, H, W)
    done: AbstractSet[tuple[int, int]] = frozenset()  # positions whose pixels are not needed
    share: Share = ALL


class _Chunk(NamedTuple):
    """What one stream of samples hands over."""

    stream: int
    infos: list[SampleInfo]  # n
    asked: list[bool]  # n, whether there are pixels
    pixels: Tensor | None  # (those asked for, 3, H, W): one tensor, as each takes a file descriptor between processes
    num_bad: Counter[str]
    failure: Exception | None  # ends the stream
    is_last: bool

    def loaded(self) -> Iterator[LoadedImage]:
        rows = iter(() if self.pixels is None else self.pixels)
        return (LoadedImage(info, next(rows) if asked else None) for info, asked in zip(self.infos, self.asked, strict=True))


def load_images(reader: ImageReader, num_bad: Counter[str], *, workers: int = 0) -> Iterator[LoadedImage]:
    """Load the share of an image set that falls to this process, in order.

    Args:
      reader: says which.
      num_bad: bad samples are counted here, by cause.
      workers: processes that decode and preprocess; 0 = this one.

    Raises:
      OSError, ValueError: the data cannot be read, as `ImageSet.read` raises them.
      RuntimeError: a loader process died.
    """
    streams = max(1, workers)
    waiting: list[deque[LoadedImage]] = [deque() for _ in range(streams)]
    unfinished = set(range(streams))
    for chunk in _read_stream(reader, 0, 1) if workers == 0 else _read_in_workers(reader, workers):
        num_bad.update(chunk.num_bad)
        if chunk.failure is not None:
            raise chunk.failure
        waiting[chunk.stream].extend(chunk.loaded())
        if chunk.is_last:
            unfinished.remove(chunk.stream)
        # Every stream is in order, so the first of all that wait is next once no unfinished stream has an empty queue.
        while all(waiting[stream] for stream in unfinished) and any(waiting):
            first = min((queue for queue in waiting if queue), key=lambda queue: queue[0].info.position)
            yield first.popleft()


def _read_stream(reader: ImageReader, stream: int, streams: int) -> Iterator[_Chunk]:
    """One of the equal streams that this process's share is divided into."""
    infos: list[SampleInfo] = []
    pixels: list[Tensor | None] = []
    num_bad: Counter[str] = Counter()

    def chunk(failure: Exception | None = None, *, is_last: bool = False) -> _Chunk:
        rows = [row for row in pixels if row is not None]
        asked = [row is not None for row in pixels]
        return _Chunk(stream, infos, asked, torch.stack(rows) if rows else None, num_bad, failure, is_last)

    try:
        for sample in reader.images.read(reader.share._replace(stream=stream, num_streams=streams)):
            if isinstance(sample, BadSample):
                num_bad[sample.cause] += 1
                continue
            infos.append(SampleInfo(sample.position, printable(sample.key), sample.label, sample.labels,
                                    tuple(map(printable, sample.captions))))
            pixels.append(None if sample.position in reader.done else reader.transform(sample.image))
            if len(infos) == CHUNK_SAMPLES:
                yield chunk()
                infos, pixels, num_bad = [], [], Counter()
    except (OSError, ValueError) as error:
        yield chunk(error, is_last=True)
        return
    yield chunk(is_last=True)


def _read_in_workers(reader: ImageReader, workers: int) -> Iterator[_Chunk]:
    # As in the training loader: a fork starts at once and never touches the accelerator; macOS cannot fork safely.
    context = "fork" if sys.platform == "linux" else None
    own_generator = torch.Generator().manual_seed(0)  # else a number is drawn from the global one
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*multi-threaded, use of fork", category=DeprecationWarning)
        warnings.filterwarnings("ignore", message="This DataLoader will create", category=UserWarning)
        chunks = iter(DataLoader(_WorkerStream(reader), batch_size=None, num_workers=workers, collate_fn=_as_it_is,
                                 prefetch_factor=CHUNKS_AHEAD, multiprocessing_context=context,
                                 worker_init_fn=_start_worker, generator=own_generator))
    return cast(Iterator[_Chunk], chunks)


def _as_it_is(chunk: Any) -> Any:
    """In the place of torch's own conversion, which makes lists of tuples and counts a Counter twice."""
    return chunk


def _start_worker(_worker: int) -> None:
    """Leave Ctrl-C to the main process; have no handler of its other signals."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


class _WorkerStream(IterableDataset):
    """In each loader process, its stream."""

    def __init__(self, reader: ImageReader) -> None:
        self.reader = reader

    def __iter__(self) -> Iterator[_Chunk]:
        info = get_worker_info()
        assert info is not None
        return _read_stream(self.reader, info.id, info.num_workers)


def in_batches(loaded: Iterable[LoadedImage], batch_size: int) -> Iterator[list[LoadedImage]]:
    """Group pictures by their places: each batch is of batch_size consecutive samples of a shard (the last of fewer).

    So a batch has the same pictures on any number of processes, in a first encoding and in one that goes on. Samples that
    are bad, or not of the set, leave theirs smaller.
    """
    for _, batch in groupby(loaded, key=lambda one: (one.info.position[0], one.info.position[1] // batch_size)):
        yield list(batch)
