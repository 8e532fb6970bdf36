"""Published results of open_clip's models: does a run give the same, and if not, what differs? The numbers: reference.csv."""

import csv
import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import Any, NamedTuple

from clipkit.evaluation.results import Result
from clipkit.evaluation.tasks import CLASSIFICATION, RETRIEVAL, Task

ROUNDING = 0.00005  # of the table
# Two right evaluations of the same weights on the same images differ where scores are nearly equal. CLIP_benchmark's published
# table shows by how much: its accuracy and mean recall on balanced sets, equal but for ties, are up to 0.10 points apart on
# 50,000 images and 0.18 on 10,000, which is 0.22 / sqrt(n).
NOISE = 0.22
PREPROCESSING = ("size", "resize_mode", "interpolation", "mean", "std", "fill_color")
TEXT_KEYS = ("context_length", "hf_tokenizer_name", "tokenizer_kwargs", "tokenizer_mode")


class Published(NamedTuple):
    """One number of the table."""

    model: str  # "<open_clip name> <tag>"
    task: str  # as CLIP_benchmark calls it, without wds_
    metric: str
    value: float
    n: int  # images or captions
    num_classes: int | None


class Setup(NamedTuple):
    """What of a model changes its results, beside its weights."""

    quick_gelu: bool
    preprocess: Mapping[str, Any]
    text: Mapping[str, Any]


def reference_lines(name: str, pretrained: str | None, config_of: Callable[[], Mapping[str, Any]], tasks: Sequence[Task],
                    results: Sequence[Result]) -> list[str]:
    """Compare a model's results with the published ones, a line a number: PASS, or the gap and its likely causes.

    Args:
      name, pretrained: open_clip's name and tag; for others there is nothing to compare with, and no line.
      config_of: gives the model's config; called where there is a gap.
      tasks: those whose folder or hub name is CLIP_benchmark's (wds_...) can be compared, on their test split.
      results: of these tasks.
    """
    column = find_column(name, pretrained)
    lines = []
    for task in tasks if column else ():
        for row in (row for row in read_table() if (row.model, row.task) == (column, set_name(task.name))):
            result = _result_for(row, task, results)
            if result is None:
                continue
            says = f"{row.model} on {row.task}, {row.metric}: {result.value:.2%}, published {row.value:.2%}"
            gap, tolerance = result.value - row.value, ROUNDING + NOISE / math.sqrt(row.n)
            if abs(gap) <= tolerance:
                lines.append(f"{says}: PASS")
                continue
            causes = likely_causes(row, task, result, setup_of(config_of()), published_setup(name, str(pretrained)))
            why = "; ".join(causes) or ("nothing that is recorded here differs; compare pictures, class names and versions of "
                                        "the libraries")
            lines.append(f"{says}: a GAP of {100 * gap:+.2f} points (up to {100 * tolerance:.2f} is rounding and ties): {why}")
    return lines


def likely_causes(row: Published, task: Task, result: Result, own: Setup, published: Setup) -> list[str]:
    """Say what can make a result differ from a published one, the most frequent cause first; only what does differ.

    Args:
      row: what was published.
      task, result: what was measured.
      own, published: the model as it was measured, and as open_clip has it.
    """
    causes = []
    if task.kind == CLASSIFICATION and not _has_published_prompts(row, result):
        causes.append(f"prompts are {result.prompts!r}, the published ones the set's own templates (templates=set)")
    if row.num_classes is not None and len(task.classes) != row.num_classes:
        causes.append(f"{len(task.classes)} classes in the place of {row.num_classes}")
    if row.num_classes == 1000 and len(task.classes) == 1000:
        from open_clip import IMAGENET_CLASSNAMES

        differing = sum(name != theirs for name, theirs in zip(task.classes, IMAGENET_CLASSNAMES, strict=True))
        causes += [f"{differing:,} of 1,000 class names are not OpenAI's"] if differing else []
    if own.quick_gelu != published.quick_gelu:
        names = {True: "QuickGELU", False: "GELU"}
        causes.append(f"the activation is {names[own.quick_gelu]}, the weights were trained with {names[published.quick_gelu]}")
    if result.n != row.n:
        bad = f" ({result.n_bad:,} bad ones left out)" if result.n_bad else ""
        causes.append(f"n is {result.n:,}{bad} in the place of {row.n:,}")
    causes += _differences("preprocessing", own.preprocess, published.preprocess)
    return causes + _differences("text", own.text, published.text)


def setup_of(config: Mapping[str, Any]) -> Setup:
    """Take what counts out of a model's config."""
    model_cfg, preprocess = config["model_cfg"], {key: config["preprocess_cfg"].get(key) for key in PREPROCESSING}
    preprocess = {key: list(value) if isinstance(value, tuple) else value for key, value in preprocess.items()}
    size = preprocess["size"]
    return Setup(bool(model_cfg.get("quick_gelu")), {**preprocess, "size": [size, size] if isinstance(size, int) else size},
                 {key: model_cfg["text_cfg"].get(key) for key in TEXT_KEYS})


def published_setup(name: str, pretrained: str) -> Setup:
    """How open_clip sets up a model with the weights of a tag."""
    from open_clip import get_model_config
    from open_clip.pretrained import get_pretrained_cfg
    from open_clip.transform import PreprocessCfg

    model_cfg, tag = get_model_config(name), get_pretrained_cfg(name, pretrained)
    assert model_cfg is not None
    preprocess = {**vars(PreprocessCfg()), **{key: tag[key] for key in PREPROCESSING if key in tag},
                  "size": model_cfg["vision_cfg"]["image_size"]}
    return setup_of({"model_cfg": {**model_cfg, "quick_gelu": model_cfg.get("quick_gelu") or tag.get("quick_gelu")},
                     "preprocess_cfg": preprocess})


def main_values(name: str, pretrained: str | None, tasks: Sequence[Task]) -> dict[str, float]:
    """{name of a task: the published main metric} of a model, where there is one."""
    column = find_column(name, pretrained)
    of_set = {row.task: row.value for row in reversed(read_table()) if row.model == column}  # the main metric comes first
    return {task.name: of_set[set_name(task.name)] for task in tasks if set_name(task.name) in of_set}


def find_column(name: str, pretrained: str | None) -> str | None:
    """The model of the table that an open_clip name and tag mean; None where it has no such."""
    tag = (pretrained or "").lower().replace("-", "_")  # as open_clip reads tags
    models = {row.model for row in read_table()}
    names = (name, name.removesuffix("-quickgelu")) if tag == "openai" else (name,)  # its weights bring QuickGELU along
    return next((f"{one} {tag}" for one in names if f"{one} {tag}" in models), None)


def set_name(task: str) -> str:
    """CLIP_benchmark's name of a set, from a folder or hub name wds_<name>; "" for others."""
    last = task.partition("@")[0].rstrip("/").removesuffix("/test").rpartition("/")[2]
    if not last.startswith("wds_"):
        return ""
    return last.removeprefix("wds_").removesuffix("_test").removeprefix("vtab-").removeprefix("wilds-")


@cache
def read_table() -> tuple[Published, ...]:
    """All numbers of reference.csv."""
    text = files("clipkit.evaluation").joinpath("reference.csv").read_text(encoding="utf-8")
    rows = csv.DictReader(line for line in text.splitlines() if not line.startswith("#"))
    facts = ("task", "metric", "n", "num_classes")
    return tuple(Published(model, row["task"], row["metric"], float(value), int(row["n"]), int(row["num_classes"] or 0) or None)
                 for row in rows for model, value in row.items() if model not in facts)


def _result_for(row: Published, task: Task, results: Sequence[Result]) -> Result | None:
    """The result that a published one belongs to, of several prompt rules the one that has the published prompts."""
    fitting = [result for result in results if (result.task, result.split, result.metric) == (task.name, "test", row.metric)
               and result.kind in (CLASSIFICATION, RETRIEVAL)]
    return next((result for result in fitting if _has_published_prompts(row, result)), fitting[0] if fitting else None)


def _has_published_prompts(row: Published, result: Result) -> bool:
    return (result.kind == RETRIEVAL or result.prompts.endswith("templates of the set")
            or (row.task.startswith("imagenet") and result.prompts == "openai80"))


def _differences(what: str, own: Mapping[str, Any], published: Mapping[str, Any]) -> list[str]:
    return [f"{what} {key} is {own[key]!r}, with the published weights {published[key]!r}"
            for key in own if own[key] != published[key]]
