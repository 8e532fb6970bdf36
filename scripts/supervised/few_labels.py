"""What labels of unseen concepts buy: probes on k pictures of each, measured on all their other pictures."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from clipkit.evaluation.few_shot import draw_shots
from clipkit.evaluation.linear_probe import ProbeProblem, search_regularisation
from clipkit.evaluation.statistics import mean_interval
from clipkit.evaluation.tasks import Task
from scripts.supervised.methods import BY_TEXT, CONCEPT, TRAIN, VAL, Encoded, places, trunk

SHOTS = (1, 2, 3)  # there are 2 to 8 pictures of each concept
NUM_DRAWS = 5


def few_labels(encoded: Mapping[str, Encoded], by_text: Tensor, sets: Mapping[str, Task]) -> list[dict[str, Any]]:
    """Measure probes on few labels beside CLIP by text on the same pictures.

    Args:
      encoded: of each tower, all sets.
      by_text: (N, C) CLIP's scores of the unseen concepts' pictures, which needs none of the labels.
      sets: as `picture_sets` gives them.

    Returns:
      A row for each k and method: mean over the draws with its 95 % t interval, and n, the pictures measured in a draw.
    """
    labels = next(iter(encoded.values()))[CONCEPT].labels  # (N,)
    rows = []
    for k in SHOTS:
        print(f"fitting   probes on {k} labelled pictures of each unseen concept", flush=True)
        found: dict[str, list[float]] = {}
        for seed in range(NUM_DRAWS):
            drawn, _ = draw_shots(labels, k, fingerprint=CONCEPT, seed=seed)
            guesses = {BY_TEXT: by_text.argmax(dim=1)} | {
                f"probe on {tower}": few_shot_guesses(of_tower, sets, drawn, k=k, seed=seed)
                for tower, of_tower in encoded.items()}
            others = torch.ones_like(labels, dtype=torch.bool).index_fill(0, drawn, False)  # (N,)
            for method, guess in guesses.items():
                found.setdefault(method, []).append((guess == labels)[others].double().mean().item())
        for method, shares in found.items():
            low, high = mean_interval(shares)
            rows.append({"method": method, "labels_per_concept": k, "value": sum(shares) / NUM_DRAWS, "n": int(others.sum()),
                         "ci_low": max(low, 0.0), "ci_high": min(high, 1.0), "draws": shares})
    return rows


def few_shot_guesses(encoded: Encoded, sets: Mapping[str, Task], drawn: Tensor, *, k: int, seed: int) -> Tensor:
    """Fit a probe on the drawn pictures of the unseen concepts, and name all of their pictures, (N,).

    Lambda costs no label of theirs: it is the best for the same problem on seen concepts, k training pictures of each
    concept of val and the accuracy on val.
    """
    train, val, test = encoded[TRAIN], encoded[VAL], encoded[CONCEPT]
    labels = places(sets[TRAIN].classes, sets[VAL].classes)[train.labels]  # (N train,), -1 = a concept that val lacks
    of_val = torch.nonzero(labels >= 0)[:, 0]
    shots, _ = draw_shots(labels[of_val], k, fingerprint=VAL, seed=seed)
    rows = of_val[shots]
    regularisation, _, _ = search_regularisation((trunk(train)[rows], labels[rows]), (trunk(val), val.labels),
                                                 num_classes=len(sets[VAL].classes))
    probe = ProbeProblem(trunk(test)[drawn], test.labels[drawn], len(sets[CONCEPT].classes)).fit(regularisation)
    return probe.logits(trunk(test)).argmax(dim=1)
