"""Prompts that a model is judged by, with the names that a picture may turn out to show."""

import hashlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import NamedTuple

from clipkit.data.emoji.captions import emoji_captions
from clipkit.data.emoji.pack import EmojiRow, read_emoji_rows
from clipkit.data.emoji.shards import sample_key
from clipkit.diffusion.prompt_files import read_prompts

NUM_COMMON = 100


class JudgedPrompts(NamedTuple):
    """P prompts, each of one of C classes."""

    name: str  # of the task
    rule: str  # what the prompts are
    prompts: list[str]  # P, distinct
    classes: list[str]  # C names that a scorer chooses from
    class_of: list[int]  # P
    styles: list[str] | None = None  # P, the art style that each prompt asks for
    real_keys: list[str] | None = None  # P, of the real pictures that were held out, as `sample_key` names them


def judged_prompts(given: Sequence[str]) -> JudgedPrompts:
    """Name the prompts of a setting: "emoji_common", "emoji_val", or texts and files as in `read_prompts`."""
    if len(given) == 1 and given[0] in SETS:
        return SETS[given[0]]()
    prompts = list(dict.fromkeys(read_prompts(given)))
    if len(prompts) < 2:
        raise ValueError(f"prompts has one text ({prompts[0]!r}), among which every picture shows the right one; give at least "
                         "two, or emoji_common")
    return JudgedPrompts("prompts", "given", prompts, prompts, list(range(len(prompts))))


def common_concepts(rows: Sequence[EmojiRow]) -> list[EmojiRow]:
    """One row for each of the concepts that most train styles draw, NUM_COMMON of them.

    Of equally many styles, the order is that of the hashes of their code points: of all groups, and the same every time.
    """
    drawn: dict[str, dict[str, EmojiRow]] = defaultdict(dict)  # concept -> style -> row
    for row in rows:
        if row.split == "train":
            drawn[row.concept][row.style] = row
    order = sorted(drawn, key=lambda concept: (-len(drawn[concept]), hashlib.sha256(concept.encode()).digest()))
    return [drawn[concept][min(drawn[concept])] for concept in order[:NUM_COMMON]]


def _common() -> JudgedPrompts:
    labels = [row.label for row in common_concepts(read_emoji_rows())]
    return JudgedPrompts("emoji_common", "label", labels, labels, list(range(len(labels))))


def _held_out_pairs() -> JudgedPrompts:
    rows = [row for row in read_emoji_rows() if row.split == "val"]
    labels = sorted({row.label for row in rows})
    return JudgedPrompts("emoji_val", "label, style", [str(emoji_captions(row)["with_style"]) for row in rows], labels,
                         [labels.index(row.label) for row in rows], [row.style for row in rows],
                         [sample_key(row) for row in rows])


SETS: dict[str, Callable[[], JudgedPrompts]] = {"emoji_common": _common, "emoji_val": _held_out_pairs}
