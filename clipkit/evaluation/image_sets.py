"""The pictures of a task: in shards or in files, with what is right for each. What is asked about them: tasks.py."""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import fsspec
from PIL import Image

from clipkit.data.decode import DecodeError, decode_image
from clipkit.data.samples import SampleError
from clipkit.data.shards import count_samples
from clipkit.data.tables import Record, SourceError, read_captions, read_picture
from clipkit.data.tars import IMAGE_SUFFIXES, BadSample, RawSample, is_local, read_numbered
from clipkit.evaluation.sample_fields import json_fields
from clipkit.evaluation.sample_keys import printable

CLASSIFICATION = "zeroshot_classification"
RETRIEVAL = "zeroshot_retrieval"
MULTI_LABEL = "zeroshot_multilabel"
CHOICE = "image_caption_selection"  # CLIP_benchmark's name
MAX_PIXELS = 89_478_485  # Pillow's own bound for a decompression bomb
REMOTE_FACTS = ("size", "ETag", "etag", "LastModified", "Last-Modified", "last_modified", "mtime")  # as backends name them


class TaskSample(NamedTuple):
    """One picture of a task."""

    position: tuple[int, int]  # (number of the shard, number in the shard); (0, number of the file)
    key: str  # unique in the task: "<shard>/<key>", or the path below the folder
    image: Image.Image  # RGB
    label: int  # the right class; -1 without one, and where several are right
    labels: tuple[int, ...]  # all right classes
    captions: tuple[str, ...]  # of a retrieval task


class Share(NamedTuple):
    """Which samples one of several readers reads: each sample falls to exactly one of them."""

    rank: int = 0
    world_size: int = 1  # processes: whole blocks are dealt to them in turn
    block_size: int = 1  # consecutive samples of a shard
    stream: int = 0
    num_streams: int = 1  # readers of one process: its samples are dealt to them in turn
    keys: frozenset[str] | None = None  # printable keys of those that are wanted; None = all. No others are decoded

    def has(self, shard: int, number: int) -> bool:
        """Whether a sample falls to this reader. Shards begin with different processes: none gets all the first ones."""
        return (number // self.block_size + shard) % self.world_size == self.rank \
            and number % self.num_streams == self.stream

    def wants(self, key: str) -> bool:
        """Whether the sample with this key is to be decoded."""
        return self.keys is None or printable(key) in self.keys


ALL = Share()


class ImageSet(Protocol):
    """The pictures of a task. All of it can be read any number of times."""

    @property
    def fingerprint(self) -> str:
        """Changes when the pictures, their order or their labels do: sha256, 64 hex digits.

        Over path, size and time of change of local files, and url, size and etag of remote ones, where a server tells.
        """
        ...

    def read(self, share: Share = ALL) -> Iterator[TaskSample | BadSample]:
        """Read a share of the samples in order. A sample that cannot be used comes as a BadSample.

        Raises:
          ValueError: a label does not fit the classes of the set.
        """
        ...

    def count(self) -> int | None:
        """How many samples there are, good and bad; None where only reading them would tell."""
        ...

    def fields(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """What is known of each sample beside its label: (key, its json or the other columns of its row)."""
        ...


class Target(NamedTuple):
    """What is right for one picture."""

    label: int = -1
    labels: tuple[int, ...] = ()
    captions: tuple[str, ...] = ()


@dataclass(frozen=True)
class ShardImages:
    """The samples of WebDataset shards."""

    shards: tuple[str, ...]
    target_of: Callable[[RawSample], Target | None]  # None: the sample is not of this set. May raise SampleError
    meaning: str  # what target_of depends on; part of the fingerprint
    with_npy: bool = False  # as in read_numbered

    @property
    def fingerprint(self) -> str:
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        return _hash_files(self.meaning, self.shards)

    def read(self, share: Share = ALL) -> Iterator[TaskSample | BadSample]:
        for shard_number, url in enumerate(self.shards):
            for number, raw in read_numbered(url, keep=partial(share.has, shard_number), with_npy=self.with_npy):
                if isinstance(raw, BadSample) and share.has(shard_number, number):  # trouble with the shard has number -1
                    yield raw
                elif isinstance(raw, RawSample) and share.wants(self._key(shard_number, raw)):
                    sample = self._sample((shard_number, number), raw)
                    if sample is not None:
                        yield sample

    def count(self) -> int | None:
        return count_samples(self.shards)

    def fields(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        for shard_number, url in enumerate(self.shards):
            for number, raw in read_numbered(url):
                if isinstance(raw, BadSample) and number < 0 and not is_local(url):  # what is found may be kept for good
                    raise OSError(f"{url} cannot be read now ({raw.detail}); try again")
                if isinstance(raw, RawSample):
                    with suppress(SampleError):
                        yield self._key(shard_number, raw), json_fields(raw)

    @cached_property
    def _shard_names(self) -> list[str]:
        names = [url.rpartition("/")[2] for url in self.shards]
        return names if len(set(names)) == len(names) else [f"{n}:{name}" for n, name in enumerate(names)]

    def _key(self, shard_number: int, raw: RawSample) -> str:
        return f"{self._shard_names[shard_number]}/{raw.key}"

    def _sample(self, position: tuple[int, int], raw: RawSample) -> TaskSample | BadSample | None:
        try:
            if raw.image is None:
                raise SampleError("no image", "the sample has no picture")
            target = self.target_of(raw)
            if target is None:
                return None
            image = Image.fromarray(decode_image(raw.image, max_pixels=MAX_PIXELS))
        except (SampleError, DecodeError) as error:
            return BadSample(error.cause, raw.url, raw.key, error.detail)
        return TaskSample(position, self._key(position[0], raw), image, *target)


class Picture(NamedTuple):
    """A picture in a file, not read yet."""

    key: str
    record: Record  # its captions, if any, are those of the picture
    label: int = -1
    labels: tuple[int, ...] = ()


@dataclass(frozen=True)
class FileImages:
    """Pictures in files of their own, or inside a table."""

    pictures: Iterable[Picture]  # each iteration starts anew
    num_pictures: int
    files: Sequence[str | Path]  # all that the pictures and their targets are read from
    meaning: str  # what the labels depend on beside the files; part of the fingerprint
    summary: str  # one line for the user

    @property
    def fingerprint(self) -> str:
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        return _hash_files(self.meaning, [str(file) for file in self.files])

    def read(self, share: Share = ALL) -> Iterator[TaskSample | BadSample]:
        for number, picture in enumerate(self.pictures):
            if share.has(0, number) and share.wants(picture.key):
                yield _read_file(number, picture)

    def count(self) -> int | None:
        return self.num_pictures

    def fields(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        for picture in self.pictures:
            yield picture.key, picture.record.fields


class Question(NamedTuple):
    """Pictures and the captions to choose from: caption i is that of picture i, the others are of none."""

    images: tuple[str, ...]  # keys: one picture, or two that are told apart
    captions: tuple[str, ...]  # at least 2
    fields: Mapping[str, Any] = {}  # the other columns of its row
    problem: str = ""  # a cause for which it cannot be asked


class OpenedSet(NamedTuple):
    """What was found at a place: all of a task but its prompts."""

    kind: str
    split: str
    images: ImageSet
    classes: tuple[str, ...] = ()  # of a retrieval set, none
    templates: tuple[str, ...] = ()  # the set's own
    train: ImageSet | None = None  # its labelled train split
    source_of_classes: str = ""  # for messages
    commit: str = ""  # of a set on the hub
    questions: tuple[Question, ...] = ()  # of a set of choices


def pictures_in(folder: str | Path) -> FileImages:
    """Find the pictures below a folder, without labels. Hidden files are passed over; the order is that of the paths.

    Args:
      folder: a folder, or one picture.

    Returns:
      The pictures; `summary` says how many there are, and how many other files.

    Raises:
      FileNotFoundError: nothing is there.
      ValueError: no file has the suffix of a picture.
    """
    place = Path(folder).expanduser()
    if not place.exists():
        raise FileNotFoundError(f"images is {str(folder)!r}, which does not exist (that is {place.absolute()}); give a "
                                "folder of pictures, or one picture")
    root = place if place.is_dir() else place.parent
    files = sorted(file for file in place.rglob("*") if file.is_file()
                   and not any(part.startswith(".") for part in file.relative_to(root).parts)) if root == place else [place]
    pictures = [file for file in files if file.suffix.lower().lstrip(".") in IMAGE_SUFFIXES]
    kinds = Counter(file.suffix.lower() or "without suffix" for file in set(files) - set(pictures))
    others = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(4))
    if not pictures:
        raise ValueError(f"images is {str(folder)!r}, which holds no picture (found: {others or 'nothing'}); pictures are "
                         f"{', '.join(f'.{suffix}' for suffix in IMAGE_SUFFIXES)}")
    passed_over = f"; {kinds.total()} other files passed over ({others})" if others else ""
    named = [(file.relative_to(root).as_posix(), file) for file in pictures]
    return FileImages(tuple(Picture(name, Record(name, file, None)) for name, file in named), len(pictures), pictures,
                      "pictures", f"{len(pictures)} pictures{passed_over}")


def _read_file(number: int, picture: Picture) -> TaskSample | BadSample:
    record = picture.record
    try:
        captions = tuple(read_captions(record)) if record.caption is not None and not record.problem else ()
        image = Image.fromarray(decode_image(read_picture(record), max_pixels=MAX_PIXELS))
    except (SourceError, DecodeError) as error:
        url = record.image if isinstance(record.image, str | Path) else record.name
        return BadSample(error.cause, str(url), picture.key, error.detail)
    return TaskSample((0, number), picture.key, image, picture.label, picture.labels, captions)


def _hash_files(meaning: str, files: Sequence[str]) -> str:
    digest = hashlib.sha256(json.dumps(meaning).encode())
    for file in files:
        digest.update(json.dumps(_file_facts(file)).encode())
    return digest.hexdigest()


def _file_facts(file: str) -> list[str | int | None]:
    if is_local(file):
        try:
            stat = os.stat(file)
        except OSError:
            return [os.path.abspath(file), None]
        return [os.path.abspath(file), stat.st_size, stat.st_mtime_ns]
    try:
        filesystem, path = fsspec.url_to_fs(file)
        info = filesystem.info(path)
    except Exception:  # fsspec's backends raise classes of their own; what cannot be read is told by `read`
        return [file, None]
    return [file, *(str(info.get(name)) for name in REMOTE_FACTS)]
