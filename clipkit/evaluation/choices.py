"""Choosing a picture's caption among near misses: strict comparisons, so that a model that sees no difference scores 0."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from clipkit.evaluation.encode import EncodedTask
from clipkit.evaluation.image_sets import CHOICE, Question
from clipkit.evaluation.outcome import Outcome
from clipkit.evaluation.results import Result, hit_metric
from clipkit.evaluation.sample_keys import printable
from clipkit.evaluation.statistics import clustered_interval
from clipkit.evaluation.tasks import Task

BETWEEN = " | "  # the two pictures, or captions, of a question, where they stand in one cell


class Verdict(NamedTuple):
    """How one question comes out. Margins are cosines: right less the best wrong one; only above 0 is right."""

    text_margin: float  # the least over its pictures
    image_margin: float  # the least over its true captions; infinite where there is one picture
    texts: tuple[int, ...]  # number of the caption chosen for each picture
    images: tuple[int, ...]  # number of the picture chosen for each true caption

    @property
    def margin(self) -> float:
        return min(self.text_margin, self.image_margin)


def judge(similarity: np.ndarray) -> Verdict:
    """Judge one question.

    Args:
      similarity: (I, T) of pictures and captions, T >= I, T >= 2; caption i is that of picture i, others are of none.

    Source: Thrush et al. 2022, Winoground (arXiv:2204.03162), equations 1 to 3, for two of each.
    """
    right = similarity.diagonal()  # (I,)
    wrong = similarity.copy()
    np.fill_diagonal(wrong, -np.inf)
    pictures = wrong[:, :len(right)]  # (I, I) of the true captions
    numbers = np.arange(len(right))
    return Verdict(float((right - wrong.max(axis=1)).min()), float((right - pictures.max(axis=0)).min()),
                   tuple(np.where(right > wrong.max(axis=1), numbers, wrong.argmax(axis=1)).tolist()),
                   tuple(np.where(right > pictures.max(axis=0), numbers, pictures.argmax(axis=0)).tolist()))


def measure_choices(task: Task, encoded: EncodedTask, embed: Callable[[Sequence[str]], Tensor]) -> Outcome:
    """Ask a task's questions.

    Args:
      task: with questions.
      encoded: its pictures.
      embed: makes features (T, D), unit norm, of T texts.

    Returns:
      acc (all choices of a question are right); for questions of two pictures text_acc and image_acc too; tie_rate. An
      answer for each question and metric.

    Raises:
      ValueError: no question can be asked.
    """
    from pandas import DataFrame

    row_of = {key: row for row, key in enumerate(encoded.keys)}
    left_out = Counter(_problem(question, row_of) for question in task.questions)
    asked = {number: question for number, question in enumerate(task.questions) if not _problem(question, row_of)}
    num_bad = left_out.total() - left_out.pop("", 0)
    if not asked:
        raise ValueError(f"task {task.name} has no question that can be asked (left out: {dict(left_out)})")
    verdicts = _judge_all(list(asked.values()), row_of, encoded.image_features, embed)
    margins = {"": [verdict.margin for verdict in verdicts]}
    if any(len(question.images) > 1 for question in asked.values()):
        margins |= {"text": [verdict.text_margin for verdict in verdicts],
                    "image": [verdict.image_margin for verdict in verdicts]}
    first = torch.tensor([row_of[printable(question.images[0])] for question in asked.values()])  # (Q,)
    shares = {hit_metric(CHOICE, direction): torch.tensor(column) > 0 for direction, column in margins.items()}
    shares["tie_rate"] = torch.tensor(margins[""]) == 0
    results = [Result(task=task.name, split=task.split, kind=CHOICE, metric=metric, value=hits.double().mean().item(),
                      n=len(asked), **dict(zip(("ci_low", "ci_high"), clustered_interval(hits, first), strict=True)),
                      num_classes=None, prompts="captions", n_bad=num_bad) for metric, hits in shares.items()]
    rows = [_row(number, question, verdict, direction) for direction in margins
            for (number, question), verdict in zip(asked.items(), verdicts, strict=True)]
    note = f"{num_bad:,} of {len(task.questions):,} questions of {task.name} are left out: {dict(left_out)}"
    return Outcome(results, DataFrame(rows).assign(task=task.name, kind=CHOICE, prompts="captions"), (note,) if num_bad else ())


def _problem(question: Question, row_of: dict[str, int]) -> str:
    """Why a question cannot be asked; "" where it can."""
    return question.problem or ("" if all(printable(key) in row_of for key in question.images) else "picture cannot be used")


def _judge_all(questions: Sequence[Question], row_of: dict[str, int], image_features: Tensor,
               embed: Callable[[Sequence[str]], Tensor]) -> list[Verdict]:
    place_of = {text: place for place, text in enumerate(dict.fromkeys(
        caption for question in questions for caption in question.captions))}
    texts = embed(list(place_of)).numpy(force=True)  # (T, D)
    images = image_features.numpy(force=True)  # (N, D)
    verdicts = []
    for question in questions:
        shown = images[[row_of[printable(key)] for key in question.images]]  # (I, D)
        said = texts[[place_of[caption] for caption in question.captions]]  # (T, D)
        # A sum for each pair by itself: in a matrix product equal texts can differ in the last bit, by their place.
        verdicts.append(judge(np.multiply(shown[:, None], said[None], dtype=np.float64).sum(axis=-1)))
    return verdicts


def _row(number: int, question: Question, verdict: Verdict, direction: str) -> dict[str, object]:
    """What predictions.parquet says of a question."""
    keys, captions = tuple(map(printable, question.images)), question.captions
    right, chosen = captions[:len(keys)], [captions[number] for number in verdict.texts]
    if direction == "image":
        right, chosen = keys, [keys[number] for number in verdict.images]
    margin = {"": verdict.margin, "text": verdict.text_margin, "image": verdict.image_margin}[direction]
    return {"direction": direction, "key": BETWEEN.join(keys), "label": 0, "label_name": BETWEEN.join(right),
            "guess": int(margin <= 0), "guess_name": BETWEEN.join(chosen), "rank": int(margin <= 0), "tied": margin == 0,
            "margin": margin, "question": number}
