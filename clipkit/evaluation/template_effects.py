"""What each template of a prompt ensemble does: how good it is alone, and what the ensemble is without it."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from clipkit.evaluation.retrieval import best_ranks
from clipkit.evaluation.statistics import difference_interval, wilson_interval

if TYPE_CHECKING:
    from pandas import DataFrame

# The rows' fields, in order. A difference is the whole's accuracy taken off; its interval is paired, picture by picture.
COLUMNS = ("template", "n", "acc1_whole", "acc1_alone", "alone_ci_low", "alone_ci_high",
           "alone_difference", "alone_difference_ci_low", "alone_difference_ci_high", "acc1_without",
           "without_difference", "without_difference_ci_low", "without_difference_ci_high")


def template_effects(image_features: Tensor, labels: Tensor, features: Tensor, texts: Sequence[str],
                     prompts: Sequence[Sequence[str]], classes: Sequence[str]) -> "DataFrame":
    """Measure each template alone, and all but each, on the features of the prompts.

    Args:
      image_features: (N, D) unit norm.
      labels: (N,) int64, right classes.
      features: (texts, D) unit norm, of the distinct texts.
      texts: the distinct texts, each once.
      prompts: for each of C classes its T texts, the t-th of every class by the same template; T at least 2.
      classes: C names.

    Returns:
      COLUMNS, a row a template, first the one that the whole loses most without.
    """
    from pandas import DataFrame

    row_of = {text: row for row, text in enumerate(texts)}
    rows = torch.tensor([[row_of[text] for text in of_class] for of_class in prompts], device=features.device)  # (C, T)
    class_numbers = torch.arange(len(prompts), device=features.device)  # (C,)

    def hits(weight: Tensor) -> np.ndarray:
        return (best_ranks(image_features, weight, labels, class_numbers) == 0).numpy(force=True)  # (N,) bool

    total = sum((features[column].double() for column in rows.T), torch.zeros((), device=features.device))  # (C, D)
    whole, measured = hits(F.normalize(total, dim=-1).float()), []
    for column, name in zip(rows.T, template_names(prompts, classes), strict=True):
        own = features[column]  # (C, D)
        alone, without = hits(own), hits(F.normalize(total - own.double(), dim=-1).float())
        measured.append((name, len(whole), whole.mean(), alone.mean(), *wilson_interval(float(alone.mean()), len(whole)),
                         alone.mean() - whole.mean(), *_paired_interval(alone, whole), without.mean(),
                         without.mean() - whole.mean(), *_paired_interval(without, whole)))
    found = DataFrame(measured, columns=list(COLUMNS))
    return found.sort_values(["without_difference", "acc1_alone", "template"], ascending=[True, False, True], ignore_index=True)


def has_templates(prompts: Sequence[Sequence[str]]) -> bool:
    """Whether every class has the same number of texts, two or more: as many templates."""
    return len({len(of_class) for of_class in prompts}) == 1 and len(prompts[0]) > 1


def template_names(prompts: Sequence[Sequence[str]], classes: Sequence[str]) -> list[str]:
    """Find the templates that C classes' texts were made with.

    Returns:
      T texts with {} in the class name's place; "text 3 ('...')" where the texts of the classes follow no one template.
    """
    names = []
    for number, texts in enumerate(zip(*prompts, strict=True)):
        candidates = [text.replace(name, "{}", 1) for text, name in zip(texts, classes, strict=True)]
        # A class may be called as a word of the template ("photo"): the template that the most classes show.
        likeliest = max(dict.fromkeys(candidates), key=candidates.count)
        fits = all(likeliest.replace("{}", name) == text for text, name in zip(texts, classes, strict=True))
        names.append(likeliest if fits and "{}" in likeliest else f"text {number + 1} ({texts[0]!r})")
    return names


def _paired_interval(hits: np.ndarray, whole: np.ndarray) -> tuple[float, float]:
    return difference_interval(hits.astype(int) - whole.astype(int), np.ones(len(hits)))
