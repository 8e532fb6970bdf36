"""The linear probe on few labelled images a class, over several draws."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from clipkit.evaluation.linear_probe import search_regularisation
from clipkit.evaluation.statistics import mean_interval

SHOTS = (1, 2, 4, 8, 16)
MAX_VALIDATION_SHOTS = 4  # a class; Zhou et al. 2022 (CoOp), section 4.1


@dataclass(frozen=True)
class FewShotResult:
    """Accuracy with k labelled images a class."""

    shots: int  # k
    accuracy: float  # mean over the draws
    ci_low: float  # 95 % t interval over the draws; the test images are the same in all of them
    ci_high: float
    accuracies: tuple[float, ...]  # of each draw
    regularisations: tuple[float, ...]  # lambda chosen in each draw
    n: int  # test images
    short_classes: tuple[int, ...]  # those with fewer than k training images: all of theirs are used
    num_without_validation: int  # classes with no image left to choose lambda on


def few_shot(train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], *, num_classes: int, fingerprint: str,
             shots: Sequence[int] = SHOTS, num_seeds: int = 5) -> list[FewShotResult]:
    """Fit probes on k images a class and measure them.

    Lambda is chosen on min(k, 4) further training images a class, which have no part in the fit.

    Args:
      train: features (N, D) and labels (N,) int64.
      test: the same.
      num_classes: C; labels are 0 to C - 1.
      fingerprint: of the data: with k and the draw's number it decides which images are drawn, whatever the model.
      shots: each k.
      num_seeds: draws for each k, at least 2.

    Returns:
      One result for each k.

    Raises:
      ValueError: a k below 1, fewer than 2 draws, no image left to choose lambda on, or what `linear_probe` refuses.
    """
    if num_seeds < 2:
        raise ValueError(f"num_seeds is {num_seeds}; an interval over draws needs at least 2")
    if not shots or min(shots) < 1:
        raise ValueError(f"shots is {list(shots)}; give numbers of images a class, each at least 1")
    if not test[0].isfinite().all():
        raise ValueError("test features hold NaN or infinity; the model cannot be measured: look at its weights and inputs")
    return [_few_shot(train, test, num_classes, fingerprint, k, num_seeds) for k in shots]


def draw_shots(labels: Tensor, k: int, *, fingerprint: str, seed: int) -> tuple[Tensor, Tensor]:
    """Draw k images of each class to train on, and up to min(k, 4) others to choose lambda on.

    Args:
      labels: (N,) int64.
      k: images a class; a class with fewer gives all it has.
      fingerprint: as in `few_shot`.
      seed: number of the draw.

    Returns:
      Indices of both, each rising.
    """
    source = hashlib.sha256(f"{fingerprint} {k} {seed}".encode()).digest()
    rng = np.random.default_rng(int.from_bytes(source[:8], "little"))
    classes = labels.cpu().numpy()
    drawn, held_out = [], []
    for number in np.unique(classes):
        images = rng.permutation(np.flatnonzero(classes == number))
        drawn.append(images[:k])
        held_out.append(images[k:k + min(k, MAX_VALIDATION_SHOTS)])
    return torch.from_numpy(np.sort(np.concatenate(drawn))), torch.from_numpy(np.sort(np.concatenate(held_out)))


def _few_shot(train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], num_classes: int, fingerprint: str, k: int,
              num_seeds: int) -> FewShotResult:
    counts = torch.bincount(train[1], minlength=num_classes)  # (C,)
    if not (counts > k).any():
        raise ValueError(f"no class has more than {int(counts.max())} training images; {k} shots and one to choose lambda on "
                         f"need {k + 1}: leave out {k} shots")
    accuracies, regularisations = [], []
    for seed in range(num_seeds):
        parts = [(train[0][images], train[1][images])
                 for images in draw_shots(train[1], k, fingerprint=fingerprint, seed=seed)]
        regularisation, _, weights = search_regularisation(parts[0], parts[1], num_classes=num_classes)
        guesses = weights.logits(test[0]).argmax(dim=1)  # (N test,)
        accuracies.append((guesses == test[1]).double().mean().item())
        regularisations.append(regularisation)
    low, high = mean_interval(accuracies)
    return FewShotResult(k, float(np.mean(accuracies)), max(low, 0.0), min(high, 1.0), tuple(accuracies),
                         tuple(regularisations), len(test[1]), tuple(torch.nonzero(counts < k).flatten().tolist()),
                         int((counts <= k).sum()))
