"""A judgement as rows of results, as a table for a terminal, and as a page that shows samples with their prompts."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from clipkit.diffusion.judging import COPY_QUANTILE, PREFIXES, Judgement
from clipkit.diffusion.metrics import Measure
from clipkit.evaluation.report_figures import interval_bar
from clipkit.evaluation.report_page import counted, escape, facts, name, page, picture
from clipkit.evaluation.results import Result, align
from clipkit.training.atomic_files import write_text_atomically

KIND = "text_to_image"
NUM_SHOWN = 60  # samples on the page
MEANINGS = {  # name -> what it says; shares are shown in percent
    "prompt_acc1": "share of pictures that are nearest to their own prompt among all prompts",
    "concept_acc1": "share that are nearest to the name of their own concept among the concepts of all prompts",
    "style_acc1": "share whose style is that asked for, by a linear classifier of the training pictures' styles",
    "both_acc1": "share with concept and style right",
    "clip_score": "100 times the cosine of picture and prompt",
    "kid": "distance from the training pictures (kernel inception distance; around 0: none)",
    "cmmd": "the same with a kernel of wider reach",
    "fid": "Frechet distance from the training pictures",
    "training_cosine": "cosine with the nearest training picture; real ones: held out",
    "copied": f"share nearer to a training picture than {COPY_QUANTILE:.0%} of the real pictures that were held out",
}
SHARES = ("prompt_acc1", "concept_acc1", "style_acc1", "both_acc1", "copied")


class Shown(NamedTuple):
    """A sample on the page."""

    sample: Image.Image
    nearest: Image.Image | None  # the training picture that it is most like
    number: int


def judgement_results(judgement: Judgement, *, settings: str, scorer: str) -> list[Result]:
    """Turn all numbers into rows of results.csv.

    Args:
      judgement: from `judge_samples`.
      settings: of the sampling; stands with the rule of the prompts, so that rows of other settings stay beside.
      scorer: name and hash of the CLIP that judged; stands as the split, likewise.
    """
    task = judgement.judge.task
    return [Result(task.name, scorer, KIND, PREFIXES[whose] + metric, one.value, one.n, one.ci_low, one.ci_high,
                   len(task.classes), f"{task.rule}; {settings}", 0)
            for whose, measures in judgement.measures.items() for metric, one in measures.items()]


def judgement_table(judgement: Judgement) -> str:
    """Write a line for each number, with a column for each of those that were judged."""
    cells = [["", *judgement.measures]]
    for metric in _metrics(judgement):
        shown = [_text(metric, measures[metric]) if metric in measures else "" for measures in judgement.measures.values()]
        cells.append([metric, *shown])
    return align(cells)


def write_page(path: Path, judgement: Judgement, shown: Sequence[Shown], *, title: str, note: str,
               about: Mapping[str, str]) -> None:
    """Write report.html: the numbers, and samples with what the judge sees in them, beside the nearest training picture.

    Args:
      path: the file, in a folder that exists.
      judgement: from `judge_samples`.
      shown: samples for the page.
      title: the heading.
      note: a sentence on what part the judge had in the pictures.
      about: facts for the head, {term: text}.
    """
    task = judgement.judge.task
    body = "\n".join((
        f'<p class="eyebrow">clipkit diffusion</p><h1>{name(title)}</h1>',
        facts([(term, escape(text)) for term, text in about.items()]),
        f'<p class="soft lead">{escape(note)} Chance is 1 of {len(task.prompts):,} prompts; shuffled prompts show whether it '
        "is met where pictures and texts do not belong together. The nearest training picture is what a search by the prompt "
        "finds, in the place of a sample.</p>",
        _table(judgement),
        "<h3>Samples</h3>",
        '<p class="soft">On the left the sample, on the right the training picture that it is most like. In colour: what the '
        "judge takes it for, where that is right.</p>",
        f'<div class="cards">{"".join(_card(judgement, one) for one in shown)}</div>',
        "<footer>Intervals hold the true value in 95 of 100 such evaluations.</footer>"))
    write_text_atomically(path, page(title, body))


def _metrics(judgement: Judgement) -> list[str]:
    there = {metric for measures in judgement.measures.values() for metric in measures}
    return [metric for metric in MEANINGS if metric in there]


def _text(metric: str, measure: Measure) -> str:
    def number(value: float) -> str:
        return f"{value * 100:.1f}" if metric in SHARES else f"{value:.3g}"

    interval = "" if measure.ci_low is None or measure.ci_high is None else \
        f" ({number(measure.ci_low)} to {number(measure.ci_high)})"
    return f"{number(measure.value)}{'%' if metric in SHARES else ''}{interval}"


def _table(judgement: Judgement) -> str:
    head = "".join(f'<th scope="col">{escape(whose)}</th>' for whose in judgement.measures)
    rows = []
    for metric in _metrics(judgement):
        cells = "".join(_cell(metric, measures.get(metric)) for measures in judgement.measures.values())
        rows.append(f'<tr><td><b>{escape(metric)}</b><br><small>{escape(MEANINGS[metric])}</small></td>{cells}</tr>')
    return (f'<div class="scroll"><table class="results"><thead><tr><th></th>{head}</tr></thead><tbody>{"".join(rows)}</tbody>'
            "</table></div>")


def _cell(metric: str, measure: Measure | None) -> str:
    if measure is None:
        return "<td></td>"
    value, _, interval = _text(metric, measure).partition(" (")
    bar = ""
    if metric in SHARES and measure.ci_low is not None and measure.ci_high is not None:
        bar = interval_bar(measure.value, measure.ci_low, measure.ci_high)
    return (f'<td class="metric"><div><b>{value}</b><small>{interval.rstrip(")")}</small></div>{bar}'
            f"<small>{counted(measure.n, 'picture', 'pictures')}</small></td>")


def _card(judgement: Judgement, one: Shown) -> str:
    task = judgement.judge.task
    prompt = int(judgement.prompt_of[one.number])
    guess = int(judgement.guess[one.number])
    right = "right" if guess == task.class_of[prompt] else "wrong"
    pictures = {str(side): image for side, image in enumerate((one.sample, one.nearest)) if image is not None}
    cosine = float(judgement.copies.cosine[one.number])
    return (f'<div class="card"><p class="asked clip">{name(task.prompts[prompt])}</p><div class="pair">'
            f'<figure>{picture(pictures, "0", task.prompts[prompt])}<figcaption>taken for<b class="{right}">'
            f'{name(task.classes[guess])}</b></figcaption></figure><span class="arrow"></span>'
            f'<figure>{picture(pictures, "1", "the nearest training picture")}<figcaption>nearest, cosine {cosine:.2f}'
            "</figcaption></figure></div></div>")


