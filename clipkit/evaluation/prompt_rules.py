"""The texts that stand for each class: known rules, templates of a set, files of the user. What they do: classifier.py."""

import json
from collections.abc import Sequence
from pathlib import Path

from clipkit.evaluation.classifier import TEMPLATE_SETS, prompt_templates

DEFAULT_RULE = "openai80"
OWN_RULE = "set"  # the templates that come with a set
Prompts = dict[str, list[list[str]]]  # name of the rule -> texts of each class


def prompt_rules(classes: Sequence[str], templates: str | Path | Sequence[str] | None = None, *,
                 own: Sequence[str] = ()) -> Prompts:
    """Write the texts of each class, rule by rule.

    Args:
      classes: names of the classes, C.
      templates: "openai80", "openai7", "plain" (the bare name), "waffle" (random words: the baseline for descriptions of
        the classes), or "set" (the set's own); a .txt file with a template on each line; a .json file {class name:
        [texts]}; a template, in which {} or {c} stands for the name; or a list of these. The templates of a list make one
        rule together, every other entry one of its own. None = the set's own, without them "openai80".
      own: templates that came with the set.

    Returns:
      {name of the rule: texts of each class, C lists}.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: a template without a place for the name, an unknown set, no templates, or a file that names not all
        classes.
    """
    if templates is None:
        templates = OWN_RULE if own else DEFAULT_RULE
    entries = [str(templates)] if isinstance(templates, str | Path) else [str(entry) for entry in templates]
    if not entries:
        raise ValueError("templates is empty; give at least one text, such as 'a photo of a {}.'")
    rules: Prompts = {}
    given = [entry for entry in entries if _has_place(entry)]
    if given:
        rules[given[0] if len(given) == 1 else f"{len(given)} templates given"] = _fill(classes, given)
    for entry in entries:
        if _has_place(entry):
            continue
        if entry == OWN_RULE:
            if not own:
                raise ValueError(f"templates is {entry!r}, but the set has no templates of its own; choose one of "
                                 f"{list(TEMPLATE_SETS)}, or give texts that hold {{}}")
            rules[f"{len(own)} templates of the set"] = _fill(classes, own)
        elif entry in TEMPLATE_SETS:
            rules[entry] = _fill(classes, entry)
        elif entry.lower().endswith((".txt", ".json")):
            rules[entry] = _from_file(classes, Path(entry).expanduser())
        else:
            raise ValueError(f"template {entry!r} holds neither {{}} nor {{c}}, where the class name goes; or choose one of "
                             f"{[*TEMPLATE_SETS, OWN_RULE]}, or a .txt or .json file")
    return rules


def _has_place(text: str) -> bool:
    return "{}" in text or "{c}" in text


def _fill(classes: Sequence[str], templates: str | Sequence[str]) -> list[list[str]]:
    if not isinstance(templates, str):
        templates = [text.replace("{c}", "{}") for text in templates]
    fill = prompt_templates(templates)
    return [[write(name) for write in fill] for name in classes]


def _from_file(classes: Sequence[str], path: Path) -> list[list[str]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise FileNotFoundError(f"templates is {str(path)!r}, which does not exist (that is {path.absolute()})") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"templates file {path} is not UTF-8: {error}") from error
    if path.suffix.lower() == ".txt":
        templates = [line.strip() for line in text.splitlines() if line.strip()]
        if not templates:
            raise ValueError(f"templates file {path} is empty; give a template on each line, such as 'a photo of a {{}}.'")
        return _fill(classes, templates)
    try:
        texts = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"templates file {path} is no json: {error}") from error
    if not isinstance(texts, dict):
        raise ValueError(f"templates file {path} holds a {type(texts).__name__}; it must be {{class name: [texts]}}")
    missing = [name for name in classes if not _are_texts(texts.get(name))]
    if missing:
        raise ValueError(f"templates file {path} has no texts for {len(missing)} of {len(classes)} classes "
                         f"({', '.join(missing[:5])}); each needs a list of texts under its name")
    return [[text.replace("{c}", name).replace("{}", name) for text in texts[name]] for name in classes]


def _are_texts(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(text, str) and text.strip() for text in value)
