"""Which texts may stand for a picture: labels by their names, and labels in templates, as settings say."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from clipkit.config.data import DataConfig

TEMPLATE_SETS = ("openai80", "openai7")
NAME_FILE = ".txt"


def with_captions(data: "DataConfig") -> "DataConfig":
    """Write out what `data.class_names` and `data.templates` mean: names read, and each caption field in each template.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: a file is empty or no UTF-8, or a template has no place for the label.
    """
    names, fields = data.class_names, data.caption_fields
    if names is not None:
        names = tuple(name for entry in names for name in (_lines(entry) if entry.lower().endswith(NAME_FILE) else [entry]))
    if data.templates is None:
        return dataclasses.replace(data, class_names=names)
    templates = [template for entry in data.templates for template in _templates(entry)]
    fields = fields or ("label",)
    weights = data.caption_weights and [weight for weight in data.caption_weights for _ in templates]
    filled = tuple(template.replace("{c}", "{}").replace("{}", f"{{{field}}}") for field in fields for template in templates)
    return dataclasses.replace(data, class_names=names, templates=None, caption_fields=filled,
                               caption_weights=weights and tuple(weights))


def _templates(entry: str) -> Sequence[str]:
    if entry in TEMPLATE_SETS:
        from open_clip import OPENAI_IMAGENET_TEMPLATES, SIMPLE_IMAGENET_TEMPLATES

        return [write("{}") for write in (OPENAI_IMAGENET_TEMPLATES if entry == "openai80" else SIMPLE_IMAGENET_TEMPLATES)]
    found = _lines(entry) if entry.lower().endswith(NAME_FILE) else [entry]
    for template in found:
        if template.count("{}") + template.count("{c}") != 1:
            raise ValueError(f"data.templates has {template!r}, which must hold {{}} once, where the label goes; or choose one "
                             f"of {list(TEMPLATE_SETS)}, or a .txt file with a template on each line")
    return found


def _lines(file: str) -> list[str]:
    path = Path(file).expanduser()
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except FileNotFoundError as error:
        raise FileNotFoundError(f"there is no {path} (that is {path.absolute()}); give a .txt file with one entry a line"
                                ) from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}") from error
    while lines and not lines[-1]:
        lines.pop()
    if not lines:
        raise ValueError(f"{path} is empty; give one entry a line")
    return lines
