"""What a model is measured on: the pictures of a task, its classes, and the texts that stand for each class."""

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

from clipkit.data.emoji import emoji_shards
from clipkit.data.emoji.pack import EmojiRow, read_emoji_rows
from clipkit.data.hub import fetch_set, find_hub_set
from clipkit.data.samples import SampleError
from clipkit.data.shards import TABLE_SUFFIXES, expand_shards
from clipkit.data.tars import RawSample, is_local
from clipkit.evaluation.benchmark_layout import find_benchmark_set, open_benchmark_set
from clipkit.evaluation.choice_tables import has_choices, open_choices
from clipkit.evaluation.image_sets import (
    CHOICE,
    CLASSIFICATION,
    MULTI_LABEL,
    RETRIEVAL,
    ImageSet,
    OpenedSet,
    Question,
    ShardImages,
    Target,
    TaskSample,
    pictures_in,
)
from clipkit.evaluation.labelled_files import open_folder, open_table
from clipkit.evaluation.merged_classes import merge_classes
from clipkit.evaluation.sample_fields import json_fields

__all__ = ["CHOICE", "CLASSIFICATION", "EMOJI_PROMPTS", "EMOJI_SPLITS", "KINDS", "MULTI_LABEL", "RETRIEVAL", "ImageSet", "Task",
           "TaskSample", "empty_classes", "load_task", "pictures_in"]

KINDS = (CLASSIFICATION, RETRIEVAL, MULTI_LABEL, CHOICE)
EMOJI_SPLITS = {"emoji_val": "val", "emoji_test_style": "test_style", "emoji_test_concept": "test_concept"}
# Fixed rules, always reported side by side: none is chosen by its result. Several texts of a class are averaged.
EMOJI_PROMPTS: dict[str, Callable[[EmojiRow], list[str]]] = {
    "label": lambda row: [row.label],
    "label_and_tags": lambda row: [", ".join((row.label, *row.tags))],
    "ensemble": lambda row: [row.label, ", ".join((row.label, *row.tags)), ", ".join(row.tags)],
}
POSSIBLE = ("shards, a set in the layout of CLIP_benchmark (folder, URL or hf://<user>/<dataset>), a folder of class folders "
            "or of pictures with .txt captions, or a .csv, .tsv or .parquet table")
DUPLICATES = ("refuse", "keep", "merge")  # classes of one name
NAMES_SHOWN = 5  # in messages


class Groups(NamedTuple):
    """Which group each picture of a task belongs to."""

    column: str  # of the metadata
    of_key: Mapping[str, str]  # key of a picture -> its group; those without one are missing
    of_question: Mapping[int, str]  # number of a question -> its group, of a task of choices


@dataclass(frozen=True)
class Task:
    """A set of pictures and what is asked about them."""

    name: str
    split: str
    kind: str  # one of KINDS
    images: ImageSet
    classes: tuple[str, ...] = ()  # names; () of a task of captions
    prompts: dict[str, list[list[str]]] = field(default_factory=dict)  # name of the rule -> texts of each class
    train: "Task | None" = None  # the labelled train split, with the same classes
    commit: str = ""  # of a set on the hub
    notes: tuple[str, ...] = ()  # what the reader of its results has to know
    questions: tuple[Question, ...] = ()  # of a task of choices
    groups: Groups | None = None  # by which its accuracy is told too


def load_task(name: str, *, cache_dir: str | Path | None = None, split: str | None = None,
              templates: str | Path | Sequence[str] | None = None, kind: str | None = None,
              fetch_train: bool = False, duplicates: str | None = None) -> Task:
    """Find a task.

    Args:
      name: "emoji_val", "emoji_test_style" or "emoji_test_concept" (classes: the concepts of that split); a set in the
        layout of CLIP_benchmark, or a folder of class folders, with or without splits: the set or one of its splits; a
        set in that layout on the Hugging Face hub, hf://<user>/<dataset>[@revision]; a folder of pictures with a .txt
        beside each; a table; or image-text shards, as a pattern or a folder of tars.
      cache_dir: folder for unpacked data, None = the user's cache.
      split: of a set that has several; None = "test".
      templates: as in `prompt_rules`, for the tasks with classes. None = the emoji tasks' three rules, a set's own
        templates, or "openai80".
      kind: one of KINDS; None = what the data say.
      fetch_train: of a set on the hub, fetch the train split too, which may be large; elsewhere it is opened where it is.
      duplicates: what becomes of classes of one name, which no text can tell apart: "refuse"; "keep", as published results
        do, where only the first of them is ever guessed (ImageNet has two such pairs); or "merge" them into one. None =
        "keep" for sets on the hub, "refuse" for one's own.

    Raises:
      FileNotFoundError: there is no such task, split or shard, or the hub cannot be reached.
      ValueError: the data, the classes or the templates cannot be used.
    """
    if kind is not None and kind not in KINDS:
        raise ValueError(f"kind is {kind!r}; choose one of {list(KINDS)}")
    if name in EMOJI_SPLITS:
        if split not in (None, EMOJI_SPLITS[name]) or kind not in (None, CLASSIFICATION):
            raise ValueError(f"task {name!r} is the split {EMOJI_SPLITS[name]!r}, a {CLASSIFICATION}; leave split and kind out")
        return _emoji_task(name, cache_dir, templates)
    if duplicates not in (None, *DUPLICATES):
        raise ValueError(f"duplicates is {duplicates!r}; choose one of {list(DUPLICATES)}")
    found = _open(name, split, kind, fetch_train)
    prompts, notes = {}, [f"{name} is at commit {found.commit}"] if found.commit else []
    if found.classes:
        from clipkit.evaluation.prompt_rules import prompt_rules

        found, note = _check_classes(found, duplicates or ("keep" if found.commit else "refuse"))
        notes += [note] if note else []
        prompts = prompt_rules(found.classes, templates, own=found.templates)
    train = Task(name, "train", found.kind, found.train, found.classes) if found.train else None
    return Task(name, found.split, found.kind, found.images, found.classes, prompts, train, found.commit, tuple(notes),
                found.questions)


def empty_classes(task: Task, label_sets: Sequence[Sequence[int]]) -> str:
    """Say in one line which classes of a task have no picture; "" where all have one.

    Args:
      task: with classes.
      label_sets: the right classes of each picture that could be used.
    """
    present = {label for labels in label_sets for label in labels}
    empty = [name for number, name in enumerate(task.classes) if number not in present]
    if not empty:
        return ""
    more = ", ..." if len(empty) > NAMES_SHOWN else ""
    return (f"{len(empty)} of {len(task.classes)} classes of {task.name} have no picture "
            f"({', '.join(empty[:NAMES_SHOWN])}{more}): they are possible answers, and no part of the means over classes")


def _open(name: str, split: str | None, kind: str | None, fetch_train: bool) -> OpenedSet:
    """Find out what a name means, and open it."""
    if not name or name.startswith("pipe:"):
        raise ValueError(f"task is {name!r}; give one of {', '.join(EMOJI_SPLITS)}, or {POSSIBLE}")
    if kind == CHOICE and Path(name).suffix.lower() not in TABLE_SUFFIXES:
        raise ValueError(f"kind is {kind!r}, but task {name!r} is no table; give one ({', '.join(TABLE_SUFFIXES)}) with "
                         "true and false captions")
    on_hub = find_hub_set(name)
    if on_hub is not None:
        fetched = fetch_set(on_hub, split or "test", with_train=fetch_train)
        found = open_benchmark_set(str(fetched.folder), split or "test", kind, with_train=fetch_train)
        return found._replace(commit=fetched.commit)
    benchmark = find_benchmark_set(name)
    if benchmark is not None:
        root, own_split = benchmark
        return open_benchmark_set(root, split or own_split or "test", kind)
    path = Path(name).expanduser() if is_local(name) else None
    is_shards = path is None or not path.is_dir() or any(path.glob("*.tar"))
    if is_shards and split is not None:
        raise ValueError(f"split is {split!r}, but task {name!r} has no splits; leave it out")
    if path is not None and path.suffix.lower() in TABLE_SUFFIXES:
        is_choice = kind == CHOICE or (kind is None and has_choices(path))
        return open_choices(path) if is_choice else open_table(path, kind)
    if path is not None and not is_shards:
        return open_folder(path, split, kind)
    return _captioned_shards(name, path, kind)


def _captioned_shards(name: str, path: Path | None, kind: str | None) -> OpenedSet:
    try:
        shards = expand_shards([f"{path}/*.tar" if path is not None and path.is_dir() else name])
    except FileNotFoundError as error:
        raise FileNotFoundError(f"task {name!r} is neither one of {', '.join(EMOJI_SPLITS)} nor {POSSIBLE}: "
                                f"{error}") from error
    if kind not in (None, RETRIEVAL):
        raise ValueError(f"kind is {kind!r}, but {name!r} is shards without class names; put them into the layout of "
                         f"CLIP_benchmark (<split>/0.tar, classnames.txt), or give kind={RETRIEVAL}")
    return OpenedSet(RETRIEVAL, "all", ShardImages(tuple(shards), _captions, "captions"))


def _emoji_task(name: str, cache_dir: str | Path | None, templates: str | Path | Sequence[str] | None) -> Task:
    split, every = EMOJI_SPLITS[name], read_emoji_rows()
    rows = {row.concept: row for row in sorted(every, key=lambda row: row.concept) if row.split == split}
    numbers = {concept: number for number, concept in enumerate(rows)}
    classes = tuple(row.label for row in rows.values())
    if templates is None:
        prompts = {rule: [write(row) for row in rows.values()] for rule, write in EMOJI_PROMPTS.items()}
    else:
        from clipkit.evaluation.prompt_rules import prompt_rules

        prompts = prompt_rules(classes, templates)
    meaning = json.dumps(list(rows))
    images = ShardImages(tuple(emoji_shards(split, cache_dir)), partial(_concept, numbers=numbers), f"concepts {meaning}")
    train = None
    if any(row.split == "train" and row.concept in rows for row in every):
        labelled = ShardImages(tuple(emoji_shards("train", cache_dir)), partial(_concept, numbers=numbers, others_pass=True),
                               f"concepts, without others {meaning}")
        train = Task(name, "train", CLASSIFICATION, labelled, classes)
    return Task(name, split, CLASSIFICATION, images, classes, prompts, train)


def _check_classes(found: OpenedSet, duplicates: str) -> tuple[OpenedSet, str]:
    """Refuse class names that say nothing; refuse, keep or merge those that cannot be told apart, with a note."""
    classes, origin = found.classes, found.source_of_classes
    blank = [number for number, name in enumerate(classes) if not name.strip()]
    if blank:
        raise ValueError(f"class {blank[0]} of {origin} (counted from 0) has an empty name; give every class a name")
    if duplicates == "merge":
        return merge_classes(found)
    twice = [f"{name!r} {count} times" for name, count in Counter(classes).items() if count > 1]
    if not twice:
        return found, ""
    more = ", ..." if len(twice) > NAMES_SHOWN else ""
    which = f"{len(twice)} class names of {origin} stand there more than once ({', '.join(twice[:NAMES_SHOWN])}{more})"
    if duplicates == "keep":
        return found, f"{which}: of each only the first is ever guessed, as in published results"
    raise ValueError(f"{which}, so no text can tell their classes apart; rename them ('crane, bird'), or give "
                     "duplicates=merge (one class of each name) or duplicates=keep (as published results do)")


def _concept(raw: RawSample, *, numbers: Mapping[str, int], others_pass: bool = False) -> Target | None:
    concept = json_fields(raw).get("concept")
    if not isinstance(concept, str) or concept not in numbers:
        if others_pass:
            return None
        raise SampleError("unknown class", f"concept {concept!r} is no class of the task")
    return Target(numbers[concept], (numbers[concept],))


def _captions(raw: RawSample) -> Target:
    """The json's `captions` (a list), else the .txt as it stands."""
    listed = json_fields(raw).get("captions")
    try:
        given = listed if isinstance(listed, list) else [raw.text.decode()] if raw.text is not None else []
    except UnicodeDecodeError as error:
        raise SampleError("corrupt json or text", str(error)) from error
    captions = tuple(str(caption).strip() for caption in given if str(caption).strip())
    if not captions:
        raise SampleError("no caption", "neither captions in the json nor a .txt")
    return Target(captions=captions)
