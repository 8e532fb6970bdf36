"""What a report counts in per-sample predictions: confusions, recalls of classes, ranks, the surest answers."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from clipkit.evaluation.results import Result

if TYPE_CHECKING:
    from pandas import DataFrame
    from PIL.Image import Image

Thumbnails = Callable[[str, Sequence[str]], "dict[str, Image]"]  # (task, keys) -> pictures by key


class Answer(NamedTuple):
    """One question and what the model says; a row of the predictions (the fields are their columns)."""

    direction: str
    key: str
    label: int
    label_name: str
    guess: int
    guess_name: str
    rank: int  # of the right answer, 0 = first
    tied: bool
    probability: float = math.nan  # nan, as those below, where a kind of task has none
    probability_100: float = math.nan
    nll: float = math.nan
    nll_100: float = math.nan
    margin: float = math.nan  # of a choice: cosine of the right answer less that of the best wrong one

    @property
    def right(self) -> bool:
        return self.guess == self.label


class ShownTask(NamedTuple):
    """What is known of a task that is shown in detail, measured in one way."""

    task: str
    kind: str
    split: str
    rules: list[str]  # all its prompt rules (of a probe: the features); the first is the one shown
    answers: list[Answer]  # under that rule; none where a kind has no answers, or none were kept
    classes: Sequence[str]
    prompts: Mapping[str, Sequence[Sequence[str]]]  # rule -> texts of each class
    results: Sequence[Result]  # of the task in any way
    tables: "Mapping[str, DataFrame]"  # more of this kind, by name


class Confusion(NamedTuple):
    """Pictures of one class that are taken for another."""

    label_name: str
    guess_name: str
    count: int
    num_of_label: int  # pictures of the right class
    key: str  # the picture that is misjudged most surely
    guess_key: str | None  # a picture of the guessed class; None where it has none


class ClassRecall(NamedTuple):
    """How many pictures of a class are recognised."""

    name: str
    hits: int
    n: int  # at least 1

    @property
    def recall(self) -> float:
        return self.hits / self.n


class RankBin(NamedTuple):
    """The questions whose right answer stands at places first .. last, 1 = top."""

    first: int
    last: int
    count: int


def read_answers(frame: "DataFrame") -> list[Answer]:
    """Take the answers out of a table of predictions, in its order."""
    fields = [field for field in Answer._fields if field in frame.columns]
    columns = [frame[field].tolist() for field in fields]
    return [Answer(**dict(zip(fields, values, strict=True))) for values in zip(*columns, strict=True)]


def surest_first(answers: Iterable[Answer]) -> list[Answer]:
    """Sort by falling probability; equal ones by key."""
    return sorted(answers, key=lambda answer: (-answer.probability, answer.key))


def worst_confusions(answers: Sequence[Answer], limit: int) -> list[Confusion]:
    """Find the pairs (right class, guessed class) with most pictures; of equal ones the surest guess comes first.

    Args:
      answers: of one classification task under one prompt rule.
      limit: pairs, at most.
    """
    ordered = surest_first(answers)
    num_of_label = Counter(answer.label for answer in ordered)
    picture_of: dict[int, str] = {}  # class -> its surest right picture, else its surest
    for answer in sorted(ordered, key=lambda answer: not answer.right):
        picture_of.setdefault(answer.label, answer.key)
    wrong = [answer for answer in ordered if not answer.right]
    surest: dict[tuple[int, int], Answer] = {}
    for answer in wrong:
        surest.setdefault((answer.label, answer.guess), answer)
    most_common = Counter((answer.label, answer.guess) for answer in wrong).most_common(limit)  # equal ones as first met
    return [Confusion(surest[pair].label_name, surest[pair].guess_name, count, num_of_label[pair[0]], surest[pair].key,
                      picture_of.get(pair[1])) for pair, count in most_common]


def class_recalls(answers: Sequence[Answer]) -> list[ClassRecall]:
    """Count the recognised pictures of each class that has any; lowest recall first, of equal ones the larger class."""
    names = {answer.label: answer.label_name for answer in answers}
    n = Counter(answer.label for answer in answers)
    hits = Counter(answer.label for answer in answers if answer.right)
    recalls = [ClassRecall(name, hits[label], n[label]) for label, name in names.items()]
    return sorted(recalls, key=lambda one: (one.recall, -one.n, one.name))


def rank_histogram(ranks: Sequence[int]) -> list[RankBin]:
    """Count ranks in bins that grow: 1, 2-5, 6-10, 11-20, 21-50, 51-100, ..., so that Recall@1, 5 and 10 can be read off.

    Args:
      ranks: 0 = first. At least one.

    Returns:
      The bins up to the worst rank, at least three, empty ones included.
    """
    lasts = [1, 5, 10]
    while lasts[-1] <= max(ranks):
        lasts.append(lasts[-1] * 5 // 2 if str(lasts[-1])[0] == "2" else lasts[-1] * 2)  # 20, 50, 100, 200, ...
    firsts = [1, *(last + 1 for last in lasts[:-1])]
    return [RankBin(first, last, sum(first <= rank + 1 <= last for rank in ranks))
            for first, last in zip(firsts, lasts, strict=True)]
