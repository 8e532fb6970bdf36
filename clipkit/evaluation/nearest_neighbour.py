"""The baseline that needs no model: the label of the nearest training picture, by pixels. It reads no text."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from clipkit.data.emoji.pack import emoji_pictures, pack_fingerprint, read_emoji_rows
from clipkit.evaluation.results import Result
from clipkit.evaluation.statistics import wilson_interval
from clipkit.evaluation.store import EmbeddingStore
from clipkit.evaluation.tasks import CLASSIFICATION, EMOJI_SPLITS

if TYPE_CHECKING:
    from PIL.Image import Image

THUMBNAIL_SIZE = 16  # pixels a side


def emoji_pixel_baselines(tasks: Sequence[str], store: EmbeddingStore | None = None) -> list[Result]:
    """Name each picture of the emoji tasks after the most alike picture of the train split.

    Likeness is the correlation of 16x16 thumbnails over all pixels and channels; of equals the first train row wins.

    Args:
      tasks: names of tasks; those that are no emoji task have no baseline and are passed over. That of
        emoji_test_concept is 0 by design: its concepts are not in train.
      store: where the counts are kept.

    Returns:
      One acc1 for each emoji task.
    """
    splits = {task: EMOJI_SPLITS[task] for task in tasks if task in EMOJI_SPLITS}
    if not splits:
        return []
    counts = store.fact(["emoji pixels", THUMBNAIL_SIZE, pack_fingerprint()], _count_hits) if store else _count_hits()
    results = []
    for task, split in splits.items():
        hits, asked = counts[split]
        low, high = wilson_interval(hits / asked, asked)
        results.append(Result(task=task, split=split, kind=CLASSIFICATION, metric="acc1", value=hits / asked, n=asked,
                              ci_low=low, ci_high=high, num_classes=counts["concepts"], prompts="pixel nearest neighbour",
                              n_bad=0))
    return results


def thumbnail_vector(picture: "Image") -> np.ndarray:
    """Shrink a picture by area averaging, subtract its mean, and divide by its length. (16 * 16 * 3,) float64."""
    from PIL.Image import Resampling

    small = picture.resize((THUMBNAIL_SIZE, THUMBNAIL_SIZE), Resampling.BOX)
    centred = np.asarray(small, np.float64).ravel()
    centred = centred - centred.mean()
    return centred / max(float(np.linalg.norm(centred)), 1e-9)  # a picture of one colour is like none


def _count_hits() -> dict[str, Any]:
    """For each test split (hits, pictures); "concepts": how many names train has."""
    tested = tuple(EMOJI_SPLITS.values())
    pictures = list(emoji_pictures([row for row in read_emoji_rows() if row.split in ("train", *tested)]))
    vectors = np.stack([thumbnail_vector(picture) for _, picture in pictures])  # (rows, 768)
    concepts = np.array([row.concept for row, _ in pictures])  # (rows,)
    split_of = np.array([row.split for row, _ in pictures])  # (rows,)
    train = split_of == "train"
    counts: dict[str, Any] = {"concepts": len(set(concepts[train]))}
    for split in tested:
        asked = split_of == split  # (rows,), N of them true
        nearest = (vectors[asked] @ vectors[train].T).argmax(axis=1)  # (N,)
        counts[split] = [int((concepts[train][nearest] == concepts[asked]).sum()), int(asked.sum())]
    return counts
