"""Captions of an emoji drawing: label, keywords, group, style in words. The choice among them is the loader's."""

from clipkit.data.emoji.pack import EmojiRow

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
      `with_group`, `with_style`, `in_template`, and `captions`, which lists all of the others.
    """
    fields: dict[str, str | list[str]] = {
        "label": row.label,
        "keywords": ", ".join((row.label, *row.tags)),
        "tags_only": ", ".join(row.tags),
        "with_group": f"{row.label}, {row.group}",
        "with_style": f"{row.label}, {STYLE_NAMES[row.style]} style",
        "in_template": [template.format(row.label) for template in TEMPLATES],
    }
    every = [caption for value in fields.values() for caption in (value if isinstance(value, list) else [value])]
    return {**fields, "captions": every}
