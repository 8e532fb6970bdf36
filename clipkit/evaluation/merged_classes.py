"""Classes of one name made one class: no text can tell them apart. Sets with such names come from taxonomies."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from clipkit.data.tars import BadSample
from clipkit.evaluation.image_sets import ALL, ImageSet, OpenedSet, Share, TaskSample

NAMES_SHOWN = 5  # in the note


@dataclass(frozen=True)
class MergedImages:
    """The pictures of a set whose classes are numbered anew."""

    images: ImageSet
    numbers: tuple[int, ...]  # of each class of the set, the one that it belongs to

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps([self.images.fingerprint, self.numbers]).encode()).hexdigest()

    def read(self, share: Share = ALL) -> Iterator[TaskSample | BadSample]:
        for sample in self.images.read(share):
            yield self._renumber(sample) if isinstance(sample, TaskSample) else sample

    def count(self) -> int | None:
        return self.images.count()

    def fields(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        return self.images.fields()

    def _renumber(self, sample: TaskSample) -> TaskSample:
        labels = tuple(sorted({self.numbers[label] for label in sample.labels}))
        return sample._replace(label=labels[0] if len(labels) == 1 else -1, labels=labels)


def merge_classes(found: OpenedSet) -> tuple[OpenedSet, str]:
    """Make one class of those with the same name, at the place of the first.

    Returns:
      The set, and a line for the user that says what was merged; the set itself and "" where all names differ.
    """
    counts = Counter(found.classes)
    twice = [f"{name!r} {count} times" for name, count in counts.items() if count > 1]
    if not twice:
        return found, ""
    classes = tuple(counts)  # in the order of their first places
    numbers = tuple(classes.index(name) for name in found.classes)
    merged = found._replace(classes=classes, images=MergedImages(found.images, numbers),
                            train=MergedImages(found.train, numbers) if found.train else None)
    more = ", ..." if len(twice) > NAMES_SHOWN else ""
    return merged, (f"{len(twice)} class names of {found.source_of_classes} stand there more than once "
                    f"({', '.join(twice[:NAMES_SHOWN])}{more}); each is one class: {len(classes)} in the place of "
                    f"{len(found.classes)}")
