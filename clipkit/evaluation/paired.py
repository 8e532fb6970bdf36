"""Two models on the same questions: the difference in accuracy, its interval, and whether it could be chance."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from clipkit.evaluation.results import hit_metric
from clipkit.evaluation.statistics import difference_interval

if TYPE_CHECKING:
    from pandas import DataFrame

TASK_COLUMNS = ["task", "kind", "prompts", "direction"]
COLUMNS = [*TASK_COLUMNS, "key", "rank"]


@dataclass(frozen=True)
class PairedResult:
    """Two models on one task, question by question. Differences are b - a."""

    task: str
    kind: str
    prompts: str
    direction: str  # "", image_retrieval or text_retrieval
    metric: str  # as in the results: acc1, image_retrieval_recall@1, ...
    n: int  # questions
    num_images: int  # fewer than n where an image has several questions
    value_a: float
    value_b: float
    difference: float
    ci_low: float  # 95 % interval of the difference
    ci_high: float
    only_a: int  # questions that only a has right
    only_b: int
    p_value: float  # two-sided
    p_holm: float  # the same, corrected for the number of comparisons made together


def compare_predictions(a: "DataFrame", b: "DataFrame", *, k: int = 1, seed: int = 0,
                        num_resamples: int = 2000) -> list[PairedResult]:
    """Compare the predictions of two models (predictions.parquet) question by question.

    Questions are joined by task, kind, prompts, direction and key. Rows with the same key in one task are the questions
    of one image (its captions), in their order: images are resampled and tested as wholes.

    Args:
      a: predictions of one model, at least the columns COLUMNS.
      b: those of the other, on the same questions.
      k: a question is a hit if the right answer is among the first k.
      seed: of the bootstrap.
      num_resamples: of the bootstrap.

    Returns:
      One result for each task, kind, prompt rule and direction, in the order of `a`.

    Raises:
      ValueError: a column is missing, a table has several models, or the questions or their right answers differ.
    """
    joined = _join(_numbered(a, "a"), _numbered(b, "b"))
    found = [_compare(rows, k, seed, num_resamples)
             for _, rows in joined.groupby(TASK_COLUMNS, sort=False, dropna=False)]
    corrected = holm([result["p_value"] for result in found])
    return [PairedResult(**result, p_holm=p) for result, p in zip(found, corrected, strict=True)]


def exact_p_value(differences: np.ndarray) -> float:
    """Return the two-sided p value of a sum of paired differences: each could as well have had the other sign.

    With differences of -1, 0 and 1, one a question, that is McNemar's exact test. With the summed differences of each
    image, it is the same test for questions that come in clusters. No normal approximation, no random numbers.

    Args:
      differences: (images,) int, hits of b less hits of a.
    """
    from scipy.stats import binom

    sizes, counts = np.unique(np.abs(differences[differences != 0]), return_counts=True)
    chances = np.ones(1)  # chances[s]: that the differences with a positive sign add up to s
    for size, count in zip(sizes, counts, strict=True):
        spaced = np.zeros(size * count + 1)
        spaced[::size] = binom.pmf(np.arange(count + 1), count, 0.5)
        chances = np.convolve(chances, spaced)
    totals = 2 * np.arange(len(chances)) - (len(chances) - 1)
    return min(1.0, float(chances[np.abs(totals) >= abs(int(differences.sum()))].sum()))


def holm(p_values: Sequence[float]) -> list[float]:
    """Correct p values of tests that are made together: the chance of even one false finding stays below the level.

    Source: Holm 1979, Scandinavian Journal of Statistics 6.
    """
    p = np.asarray(p_values, np.float64)
    order = np.argsort(p, kind="stable")
    factors = len(p) - np.arange(len(p))
    corrected = np.empty(len(p))
    corrected[order] = np.minimum(np.maximum.accumulate(p[order] * factors), 1.0)
    return corrected.tolist()


def _numbered(predictions: "DataFrame", which: str) -> "DataFrame":
    """The columns that are compared, and which of its image's questions each is."""
    missing = [column for column in COLUMNS if column not in predictions]
    if missing:
        raise ValueError(f"the predictions {which} lack the columns {missing}; give a predictions.parquet that "
                         "`clipkit zero-shot` wrote")
    names = sorted(set(predictions["name"])) if "name" in predictions else []
    if len(names) > 1:
        raise ValueError(f"the predictions {which} are of {len(names)} models {names}; give those of one")
    found = predictions.filter(items=[*COLUMNS, "label_name"])
    return found.assign(question=found.groupby([*TASK_COLUMNS, "key"], dropna=False).cumcount())


def _join(a: "DataFrame", b: "DataFrame") -> "DataFrame":
    joined = a.merge(b, on=[*TASK_COLUMNS, "key", "question"], how="left", suffixes=("_a", "_b"), validate="1:1")
    both = int(joined["rank_b"].notna().to_numpy().sum())
    if both < max(len(a), len(b)):
        raise ValueError(f"of {len(a)} questions in a and {len(b)} in b, {len(a) - both} are only in a and {len(b) - both} "
                         "only in b; evaluate both models on the same tasks, prompts and data")
    if "label_name_a" in joined:
        differ = int((joined["label_name_a"] != joined["label_name_b"]).to_numpy().sum())
        if differ:
            raise ValueError(f"{differ} of {both} questions have another right answer in b than in a; evaluate both models "
                             "on the same data and class names")
    return joined


def _compare(rows: "DataFrame", k: int, seed: int, num_resamples: int) -> dict[str, Any]:
    """The fields of a PairedResult, but for p_holm; rows: the N joined questions of one task."""
    hits_a, hits_b = rows["rank_a"].to_numpy() < k, rows["rank_b"].to_numpy() < k  # each (N,)
    _, image = np.unique(rows["key"].to_numpy(), return_inverse=True)  # (N,)
    sizes = np.bincount(image)  # (images,)
    won, lost = hits_b & ~hits_a, hits_a & ~hits_b  # (N,)
    differences = np.bincount(image, weights=won.astype(int) - lost.astype(int)).round().astype(int)  # (images,)
    low, high = difference_interval(differences, sizes, seed=seed, num_resamples=num_resamples)
    task = {column: str(rows[column].iloc[0]) for column in TASK_COLUMNS}
    return {**task, "metric": hit_metric(task["kind"], task["direction"], k), "n": len(rows),
            "num_images": len(sizes), "value_a": float(hits_a.mean()), "value_b": float(hits_b.mean()),
            "difference": float(differences.sum() / len(rows)), "ci_low": low, "ci_high": high,
            "only_a": int(lost.sum()), "only_b": int(won.sum()), "p_value": exact_p_value(differences)}
