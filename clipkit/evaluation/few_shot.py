"""Learning from few labelled images a class, over several draws: by a linear probe, or another way of learning."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from clipkit.evaluation.linear_probe import search_regularisation
from clipkit.evaluation.statistics import mean_interval

SHOTS = (1, 2, 4, 8, 16)
MAX_VALIDATION_SHOTS = 4  # a class; Zhou et al. 2022 (CoOp), section 4.1
Images = tuple[Tensor, Tensor]  # features (N, D), labels (N,) int64
# (train, validation, number of classes) -> (what was chosen on validation, a function from features (N, D) to scores (N, C))
Learner = Callable[[Images, Images, int], tuple[Mapping[str, float], Callable[[Tensor], Tensor]]]


@dataclass(frozen=True)
class FewShotResult:
    """Accuracy with k labelled images a class."""

    shots: int  # k
    accuracy: float  # mean over the draws
    ci_low: float  # 95 % t interval over the draws; the test images are the same in all of them
    ci_high: float
    accuracies: tuple[float, ...]  # of each draw
    chosen: tuple[Mapping[str, float], ...]  # in each draw on validation images: {"regularisation": lambda}
    n: int  # test images
    short_classes: tuple[int, ...]  # those with fewer than k training images: all of theirs are used
    num_without_validation: int  # classes with no image left to choose lambda on


def learn_probe(train: Images, validation: Images, num_classes: int) -> tuple[Mapping[str, float], Callable[[Tensor], Tensor]]:
    """Fit a linear probe, its lambda chosen on the validation images: a Learner."""
    regularisation, _, weights = search_regularisation(train, validation, num_classes=num_classes)
    return {"regularisation": regularisation}, weights.logits


def few_shot(train: Images, test: Images, *, num_classes: int, fingerprint: str, shots: Sequence[int] = SHOTS,
             num_seeds: int = 5, learn: Learner = learn_probe) -> list[FewShotResult]:
    """Learn from k images a class, and measure what was learned.

    What is to be chosen (lambda) is chosen on min(k, 4) further training images a class, which have no part in the fit.

    Args:
      train: features (N, D) and labels (N,) int64.
      test: the same.
      num_classes: C; labels are 0 to C - 1.
      fingerprint: of the data: with k and the draw's number it decides which images are drawn, whatever the model.
      shots: each k.
      num_seeds: draws for each k, at least 2.
      learn: how to learn. Which images are drawn does not hang on it.

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
    most = int(torch.bincount(train[1], minlength=num_classes).max())
    too_many = [k for k in shots if k >= most]
    if too_many:
        raise ValueError(f"no class has more than {most} training images; {too_many[0]} shots and one to choose by need "
                         f"{too_many[0] + 1}: leave out {', '.join(map(str, too_many))} shots")
    return [_few_shot(train, test, num_classes, fingerprint, k, num_seeds, learn) for k in shots]


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


def _few_shot(train: Images, test: Images, num_classes: int, fingerprint: str, k: int, num_seeds: int,
              learn: Learner) -> FewShotResult:
    counts = torch.bincount(train[1], minlength=num_classes)  # (C,)
    accuracies, chosen = [], []
    for seed in range(num_seeds):
        parts = [(train[0][images], train[1][images])
                 for images in draw_shots(train[1], k, fingerprint=fingerprint, seed=seed)]
        choice, score = learn(parts[0], parts[1], num_classes)
        guesses = score(test[0]).argmax(dim=1)  # (N test,)
        accuracies.append((guesses == test[1]).double().mean().item())
        chosen.append(choice)
    low, high = mean_interval(accuracies)
    return FewShotResult(k, float(np.mean(accuracies)), max(low, 0.0), min(high, 1.0), tuple(accuracies), tuple(chosen),
                         len(test[1]), tuple(torch.nonzero(counts < k).flatten().tolist()), int((counts <= k).sum()))
