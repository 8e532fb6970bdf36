"""Captions of an emoji drawing: label, keywords, group, style in words. The choice among them is the loader's."""

import random

from clipkit.data.emoji.pack import EmojiRow

NUM_SUBSETS = 8

STYLE_NAMES = {
    "twemoji": "twemoji",
    "noto": "noto",
    "noto-v1": "noto blob",
    "fluent-3d": "fluent 3d",
    "fluent-flat": "fluent flat",
    "emojitwo": "emojitwo",
    "streamline": "streamline",
    "fxemoji": "fxemoji",
}
TEMPLATES = (
    "a picture of a {}",
    "an emoji of a {}",
    "a drawing of a {}",
    "an icon of a {}",
    "{} emoji",
)


def emoji_captions(row: EmojiRow) -> dict[str, str | list[str]]:
    """Write the captions of one drawing.

    Args:
      row: a row of the pack.

    Returns:
      Caption field -> caption, or a list of captions of equal standing: `label`, `keywords`, `tags_only`,
      `some_keywords` and `some_tags` (about half of the tags, in any order), `with_group`, `with_style`, `in_template`,
      and `captions`, which lists all of the others.
    """
    fields: dict[str, str | list[str]] = {
        "label": row.label,
        "keywords": ", ".join((row.label, *row.tags)),
        "tags_only": ", ".join(row.tags),
        "some_keywords": [", ".join((row.label, *tags)) for tags in _some_tags(row)],
        "some_tags": [", ".join(tags) for tags in _some_tags(row)],
        "with_group": f"{row.label}, {row.group}",
        "with_style": f"{row.label}, {STYLE_NAMES[row.style]} style",
        "in_template": [template.format(row.label) for template in TEMPLATES],
    }
    every = [caption for value in fields.values() for caption in (value if isinstance(value, list) else [value])]
    return {**fields, "captions": every}


def _some_tags(row: EmojiRow) -> list[list[str]]:
    """Draw subsets of a row's tags, in any order: each tag with probability 1/2, at least one. Seeded by the row."""
    rng = random.Random(f"{row.style}/{row.concept}")
    subsets = []
    for _ in range(NUM_SUBSETS):
        kept = [tag for tag in row.tags if rng.random() < 0.5] or [rng.choice(row.tags)]
        subsets.append(rng.sample(kept, len(kept)))
    return subsets
