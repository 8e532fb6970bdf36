"""What a model is measured on: the shards of a task, its classes, and the texts that stand for each class."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from clipkit.data.decode import DecodeError, decode_image
from clipkit.data.emoji import emoji_shards
from clipkit.data.emoji.pack import EmojiRow, read_emoji_rows
from clipkit.data.shards import expand_shards
from clipkit.data.tars import BadSample, RawSample, read_numbered

CLASSIFICATION = "zeroshot_classification"
RETRIEVAL = "zeroshot_retrieval"
EMOJI_SPLITS = {"emoji_val": "val", "emoji_test_style": "test_style", "emoji_test_concept": "test_concept"}
# Fixed rules, always reported side by side: none is chosen by its result. Several texts of a class are averaged.
EMOJI_PROMPTS: dict[str, Callable[[EmojiRow], list[str]]] = {
    "label": lambda row: [row.label],
    "label_and_tags": lambda row: [", ".join((row.label, *row.tags))],
    "ensemble": lambda row: [row.label, ", ".join((row.label, *row.tags)), ", ".join(row.tags)],
}
MAX_PIXELS = 89_478_485  # Pillow's own bound for a decompression bomb


@dataclass(frozen=True)
class Task:
    """A set of images and what is asked about them."""

    name: str
    split: str
    kind: str  # CLASSIFICATION or RETRIEVAL
    shards: tuple[str, ...]
    classes: dict[str, str] = field(default_factory=dict)  # json value of `concept` -> name of the class, in order
    prompts: dict[str, list[list[str]]] = field(default_factory=dict)  # name of the rule -> texts of each class


class TaskSample(NamedTuple):
    """One image of a task."""

    position: tuple[int, int]  # (number of the shard, number in the shard)
    image: Image.Image  # RGB
    label: int  # class, or -1 in a retrieval task
    captions: tuple[str, ...]  # of a retrieval task


def load_task(name: str, *, cache_dir: str | Path | None = None) -> Task:
    """Find a task.

    Args:
      name: "emoji_val", "emoji_test_style" or "emoji_test_concept" (classes: the concepts of that split); or image-text
        shards, as a pattern or a folder of tars: retrieval among their images and captions.
      cache_dir: folder for unpacked data, None = the user's cache.

    Raises:
      FileNotFoundError: there is no such task and no such shard.
      ValueError: the pattern cannot be read as shards.
    """
    if name in EMOJI_SPLITS:
        return _emoji_task(name, cache_dir)
    try:
        shards = expand_shards([f"{name}/*.tar" if Path(name).is_dir() else name])
    except FileNotFoundError as error:
        known = ", ".join(EMOJI_SPLITS)
        raise FileNotFoundError(f"task {name!r} is neither one of {known} nor shards: {error}") from error
    return Task(name=name, split="all", kind=RETRIEVAL, shards=tuple(shards))


def read_task(task: Task, *, rank: int = 0, world_size: int = 1) -> Iterator[TaskSample | BadSample]:
    """Read the share of a task's samples that falls to one of several processes, in order.

    Every sample falls to exactly one of them. A sample that cannot be used comes as a BadSample.
    """
    class_numbers = {concept: number for number, concept in enumerate(task.classes)}
    for shard_number, url in enumerate(task.shards):
        turn = (rank - shard_number) % world_size

        def is_mine(number: int, turn: int = turn) -> bool:
            return number % world_size == turn

        for number, raw in read_numbered(url, keep=is_mine):
            if isinstance(raw, BadSample) and (number >= 0 or turn == 0):  # trouble with the shard itself: told by one
                yield raw
            elif isinstance(raw, RawSample):
                yield _task_sample(task, class_numbers, (shard_number, number), raw)


def _emoji_task(name: str, cache_dir: str | Path | None) -> Task:
    split = EMOJI_SPLITS[name]
    rows = {row.concept: row for row in sorted(read_emoji_rows(), key=lambda row: row.concept) if row.split == split}
    return Task(
        name=name,
        split=split,
        kind=CLASSIFICATION,
        shards=tuple(emoji_shards(split, cache_dir)),
        classes={concept: row.label for concept, row in rows.items()},
        prompts={rule: [write(row) for row in rows.values()] for rule, write in EMOJI_PROMPTS.items()},
    )


def _task_sample(task: Task, class_numbers: dict[str, int], position: tuple[int, int],
                 raw: RawSample) -> TaskSample | BadSample:
    """Decode one sample and look up its class or its captions."""
    if raw.image is None:
        return BadSample("no image", raw.url, raw.key, "the sample has no picture")
    label, captions = -1, ()
    try:
        fields = json.loads(raw.json) if raw.json else {}
        if task.kind == CLASSIFICATION:
            label = class_numbers[fields["concept"]]
        else:
            captions = _captions(fields, raw.text)
        image = Image.fromarray(decode_image(raw.image, max_pixels=MAX_PIXELS))
    except DecodeError as error:
        return BadSample(error.cause, raw.url, raw.key, error.detail)
    except KeyError as error:
        return BadSample("unknown class", raw.url, raw.key, f"{error} is no class of {task.name}")
    except ValueError as error:
        return BadSample("corrupt json or text", raw.url, raw.key, str(error))
    if task.kind == RETRIEVAL and not captions:
        return BadSample("no caption", raw.url, raw.key, "neither captions in the json nor a .txt")
    return TaskSample(position, image, label, captions)


def _captions(fields: dict[str, object], text: bytes | None) -> tuple[str, ...]:
    """The json's `captions` (a list), else the .txt."""
    listed = fields.get("captions")
    given = listed if isinstance(listed, list) else [text.decode()] if text is not None else []
    return tuple(str(caption).strip() for caption in given if str(caption).strip())
