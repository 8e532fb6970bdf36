"""What lies between a model and its fine-tuned successor, or in the mean of several: measured, and one of them chosen."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from clipkit.evaluation.results import Result
from clipkit.evaluation.store import EmbeddingStore
from clipkit.evaluation.tasks import Task
from clipkit.evaluation.zero_shot import measure
from clipkit.model.image_text import ImageTextModel
from clipkit.model.interpolate import interpolated_model, soup_model

if TYPE_CHECKING:
    from pandas import DataFrame

MAIN_METRICS = ("acc1", "acc", "mean_average_precision", "image_retrieval_recall@1")
TARGET, AGAINST = "target", "against"
Measure = Callable[[ImageTextModel], "Point"]


@dataclass(frozen=True)
class Point:
    """One measured model. Of several tasks the mean counts."""

    target: tuple[Result, ...]  # main result on each task that the model was tuned for
    against: tuple[Result, ...]  # on each that it should not forget

    @property
    def target_mean(self) -> float:
        return sum(result.value for result in self.target) / len(self.target)

    @property
    def against_mean(self) -> float:
        """0 where there is no such task."""
        return sum(result.value for result in self.against) / max(1, len(self.against))

    @property
    def score(self) -> float:
        """What is chosen by: a point won on the tasks of one kind is worth a point forgotten on those of the other."""
        return self.target_mean + self.against_mean


def measure_point(model: ImageTextModel, *, target: Sequence[Task], against: Sequence[Task], batch_size: int,
                  store: EmbeddingStore | None, workers: int) -> Point:
    """Measure a model on two kinds of tasks; each picture is encoded once."""
    measure_one = partial(measure, model, batch_size=batch_size, thorough=False, store=store, workers=workers)
    return Point(*(tuple(main_result(measure_one(task).results) for task in tasks) for tasks in (target, against)))


def main_result(results: Sequence[Result]) -> Result:
    """The one number of a task: under its last prompt rule, which of the emoji tasks' is the mean of the others."""
    metric = next(metric for metric in MAIN_METRICS if any(result.metric == metric for result in results))
    return [result for result in results if result.metric == metric][-1]


def alphas(num_points: int) -> list[float]:
    """Equally spaced from 0 to 1, both included."""
    return [number / (num_points - 1) for number in range(num_points)]


def sweep(base: ImageTextModel, tuned: ImageTextModel, at: Iterable[float], measure_model: Measure) -> dict[float, Point]:
    """Measure the models on the line from base to tuned; one is in memory at a time.

    Raises:
      ValueError: the two do not fit each other.
    """
    return {alpha: measure_model(interpolated_model(base, tuned, alpha)) for alpha in at}


def knee(points: dict[float, Point]) -> float:
    """Choose alpha: the highest sum of the mean accuracies of both kinds; of equal ones the nearest to the fine-tuned."""
    return max(points, key=lambda alpha: (round(points[alpha].score, 12), alpha))


def greedy_soup(models: Sequence[ImageTextModel], singles: Sequence[Point], measure_model: Measure) -> tuple[list[int], Point]:
    """Add models to a soup, the best first, as long as the soup becomes no worse.

    Args:
      models: of one start.
      singles: what was measured of each.
      measure_model: measures a soup.

    Returns:
      (numbers of the models that are in the soup, in the order in which they came in; what was measured of it).

    Raises:
      ValueError: the models do not fit each other.

    Source: Wortsman et al. 2022, Model soups, recipe 1 (arXiv:2203.05482).
    """
    first, *others = sorted(range(len(models)), key=lambda number: -singles[number].score)
    chosen, best = [first], singles[first]
    for number in others:
        point = measure_model(soup_model([models[one] for one in [*chosen, number]]))
        if point.score >= best.score:
            chosen, best = [*chosen, number], point
    return chosen, best


def points_table(points: "dict[str, Point] | dict[float, Point]", name: str) -> "DataFrame":
    """Put points into a table, a row a number.

    Args:
      points: by alpha, or by the name of the model.
      name: of the column that holds these.
    """
    from pandas import DataFrame

    return DataFrame([{name: which, "role": role, "task": result.task, "prompts": result.prompts, "metric": result.metric,
                       "value": result.value, "ci_low": result.ci_low, "ci_high": result.ci_high, "n": result.n}
                      for which, point in points.items() for role, results in ((TARGET, point.target), (AGAINST, point.against))
                      for result in results])
