"""Classes of one name as one class: labels, fingerprint, train split, note."""

import pickle

from PIL import Image

from clipkit.data.tars import BadSample
from clipkit.evaluation.image_sets import ALL, OpenedSet, Share, TaskSample
from clipkit.evaluation.merged_classes import merge_classes

CLASSES = ("fox", "crane", "cat", "crane", "fox")
BAD = BadSample("truncated image", "0.tar", "x", "")


class ManyLabels:
    """Pictures with the labels 0 to 4, one with all of them, and a bad one."""

    fingerprint = "f" * 64

    def read(self, share: Share = ALL):
        image = Image.new("RGB", (1, 1))
        for number in range(5):
            if share.has(0, number):
                yield TaskSample((0, number), str(number), image, number, (number,), ())
        yield TaskSample((0, 5), "all", image, -1, (0, 1, 2, 3, 4), ())
        yield TaskSample((0, 6), "both cranes", image, -1, (1, 3), ())
        yield BAD

    def count(self):
        return 8


def test_pictures_of_classes_with_one_name_have_one_label() -> None:
    found = OpenedSet("zeroshot_classification", "test", ManyLabels(), CLASSES, train=ManyLabels(),
                      source_of_classes="names.txt")
    merged, note = merge_classes(found)
    assert merged.classes == ("fox", "crane", "cat")
    samples = list(merged.images.read())
    assert [sample.label for sample in samples[:5]] == [0, 1, 2, 1, 0]
    assert [merged.classes[sample.label] for sample in samples[:5]] == list(CLASSES)
    assert (samples[5].label, samples[5].labels) == (-1, (0, 1, 2)) and (samples[6].label, samples[6].labels) == (1, (1,))
    assert samples[7] is BAD and merged.images.count() == 8
    train = pickle.loads(pickle.dumps(merged.train)).read(Share(1, 2))  # loader processes get it so
    assert [next(train).label, next(train).label] == [1, 1]
    assert merged.images.fingerprint != found.images.fingerprint and len(merged.images.fingerprint) == 64
    assert note == ("2 class names of names.txt stand there more than once ('fox' 2 times, 'crane' 2 times); each is one "
                    "class: 3 in the place of 5")


def test_a_set_whose_names_differ_stays_as_it_is() -> None:
    found = OpenedSet("zeroshot_classification", "test", ManyLabels(), ("a", "b", "c", "d", "e"))
    assert merge_classes(found) == (found, "")
