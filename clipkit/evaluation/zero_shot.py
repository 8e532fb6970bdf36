"""Measure a model on a task: what is asked follows from the task's kind, or is a probe on its labelled train split."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from clipkit.evaluation.choices import measure_choices
from clipkit.evaluation.classification import accuracies, classification_numbers, prediction_columns, score_classes
from clipkit.evaluation.classifier import encode_prompts
from clipkit.evaluation.encode import EncodedTask, encode_task
from clipkit.evaluation.feature_rows import Progress, exact_fp32
from clipkit.evaluation.groups import group_outcome
from clipkit.evaluation.lazy_model import logit_scale_of
from clipkit.evaluation.outcome import Outcome, join, named_table
from clipkit.evaluation.probes import PROBES, ProbeSettings
from clipkit.evaluation.results import Result
from clipkit.evaluation.retrieval import rank_targets, recall_at
from clipkit.evaluation.statistics import clustered_interval, median_interval
from clipkit.evaluation.store import EmbeddingStore
from clipkit.evaluation.tasks import CHOICE, CLASSIFICATION, RETRIEVAL, Task, empty_classes, load_task
from clipkit.evaluation.tasks import KINDS as TASK_KINDS
from clipkit.evaluation.template_effects import has_templates, template_effects
from clipkit.evaluation.text_features import average_prompts, encode_texts
from clipkit.model.image_text import ImageTextModel

if TYPE_CHECKING:
    from pandas import DataFrame

RECALL_AT = (1, 5, 10)
KINDS = (*TASK_KINDS, *PROBES)


def evaluate(model: ImageTextModel, tasks: Sequence[str | Task], *, batch_size: int = 256,
             cache_dir: str | Path | None = None) -> list[Result]:
    """Measure a model in training: the main numbers only, nothing kept.

    Images and texts are spread over the processes of torch.distributed, if there are several: all of them must call
    this, and all get the same results.

    Args:
      model: measured in evaluation mode and fp32; each of its modules is left in the mode it was in.
      tasks: as in `load_task`, or loaded.
      batch_size: images, or texts, that one process encodes at once.
      cache_dir: folder for unpacked data, None = the user's cache.

    Returns:
      The results in the order of the tasks: acc1 and acc5 for each prompt rule, recall@1, 5, 10 both ways, or acc.

    Raises:
      FileNotFoundError: a task does not exist.
      ValueError: a task has no image that can be used, or features are not finite.
    """
    loaded = [load_task(task, cache_dir=cache_dir) if isinstance(task, str) else task for task in tasks]
    return [result for task in loaded for result in measure(model, task, batch_size=batch_size, thorough=False).results]


@exact_fp32()
def measure(model: ImageTextModel, task: Task, *, kind: str | None = None, batch_size: int = 256, thorough: bool = True,
            store: EmbeddingStore | None = None, workers: int = 0, progress: Progress | None = None,
            probe: ProbeSettings | None = None, with_templates: bool = False) -> Outcome:
    """Measure a model on one task.

    Args:
      model, batch_size: as in `evaluate`.
      task: a loaded task.
      kind: one of KINDS; None = the task's own.
      thorough: all numbers and the answer to every question, rather than the main numbers.
      store: where embeddings are kept.
      workers: processes that read pictures.
      progress: called after each batch of pictures.
      probe: of the kinds that learn from labels; None = the defaults.
      with_templates: measure each template of zero-shot classification too.

    Raises:
      ValueError: the kind does not fit the task, it has no image that can be used, or features are not finite.
    """
    kind = kind or task.kind
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}; choose one of {list(KINDS)}")
    if kind in PROBES:
        outcome = PROBES[kind](model, task, probe or ProbeSettings(), batch_size=batch_size, store=store, workers=workers)
    elif kind == task.kind:
        outcome = _measure_by_texts(model, task, batch_size=batch_size, thorough=thorough, store=store, workers=workers,
                                    progress=progress, with_templates=with_templates)
    else:
        raise ValueError(f"kind is {kind!r}, but task {task.name} is made for {task.kind}; leave kind out, or choose one of "
                         f"{[task.kind, *PROBES]}")
    return join([outcome, group_outcome(task.groups, outcome)]) if task.groups and thorough else outcome


def _measure_by_texts(model: ImageTextModel, task: Task, *, batch_size: int, thorough: bool, store: EmbeddingStore | None,
                      workers: int, progress: Progress | None, with_templates: bool) -> Outcome:
    """Measure what a task is made for."""
    encoded = encode_task(model, task, batch_size=batch_size, spread=True, store=store, workers=workers,
                          progress=progress)
    embed = partial(encode_texts, model, batch_size=batch_size, spread=True, store=store)
    if task.kind == RETRIEVAL:
        return _retrieval(task, encoded, embed, thorough)
    if task.kind == CHOICE:
        return measure_choices(task, encoded, embed)
    ask = _classification if task.kind == CLASSIFICATION else _multi_label
    logit_scale = logit_scale_of(model)
    outcomes = []
    for rule, prompts in task.prompts.items():
        texts, features = encode_prompts(model, prompts, batch_size=batch_size, spread=True, store=store)  # (T, D)
        outcomes.append(ask(task, encoded, rule, average_prompts(features, texts, prompts), logit_scale, thorough))
        if with_templates and task.kind == CLASSIFICATION:
            outcomes.append(_templates(task, encoded, rule, texts, features))
    empty = empty_classes(task, encoded.label_sets)
    return join([*outcomes, Outcome([], None, (empty,) if empty else ())])


def _classification(task: Task, encoded: EncodedTask, rule: str, weight: Tensor, logit_scale: float,
                    thorough: bool) -> Outcome:
    result = _result_of(task, encoded, rule)
    if not thorough:
        return Outcome([result(*number) for number in accuracies(encoded.image_features, weight, encoded.labels)], None)
    scores = score_classes(encoded.image_features, weight, encoded.labels, logit_scale=logit_scale)
    predictions = prediction_columns(scores, encoded.labels, task.classes)
    numbers = classification_numbers(scores, encoded.labels, len(task.classes))
    return Outcome([result(*number) for number in numbers], _about(predictions, task, rule, "", encoded.keys))


def _templates(task: Task, encoded: EncodedTask, rule: str, texts: Sequence[str], features: Tensor) -> Outcome:
    prompts = task.prompts[rule]
    if not has_templates(prompts):
        return Outcome([], None, (f"prompts {rule!r} of {task.name} have no two templates that all classes share: there is "
                                  "none to leave out",))
    effects = template_effects(encoded.image_features, encoded.labels, features, texts, prompts, task.classes)
    return Outcome([], None, (), {"templates": named_table(effects, task=task.name, kind=task.kind, prompts=rule)})


def _multi_label(task: Task, encoded: EncodedTask, rule: str, weight: Tensor, logit_scale: float, thorough: bool) -> Outcome:
    """Rank images for each class. The softmax is at scale 100, as in the paper's figures."""
    import numpy as np
    from pandas import DataFrame

    from clipkit.evaluation.multi_label import multi_label_scores

    targets = np.zeros((len(encoded.keys), len(task.classes)), dtype=bool)  # (N, C)
    for row, labels in enumerate(encoded.label_sets):
        targets[row, list(labels)] = True
    similarity = (encoded.image_features @ weight.T).numpy(force=True)  # (N, C)
    scores = multi_label_scores(similarity, targets)
    result = _result_of(task, encoded, rule)
    numbers = [result("mean_average_precision", scores.mean_average_precision, scores.ci_low, scores.ci_high)]
    if thorough:
        voc = multi_label_scores(similarity, targets, points="11")
        numbers.append(result("mean_average_precision_11_points", voc.mean_average_precision, voc.ci_low, voc.ci_high))
        numbers += [result(name, value, None, None) for name, value in
                    (("macro_auroc", scores.macro_auroc), ("micro_auroc", scores.micro_auroc))]
    classes = DataFrame({"class": list(task.classes), "num_positive": targets.sum(axis=0),
                         "average_precision": scores.average_precision, "auroc": scores.auroc})
    return Outcome(numbers, None, (), {"classes": named_table(classes, task=task.name, kind=task.kind, prompts=rule)})


def _retrieval(task: Task, encoded: EncodedTask, embed: Any, thorough: bool) -> Outcome:
    captions = [caption for of_image in encoded.captions for caption in of_image]
    text_features = embed(captions)  # (captions, D)
    counts = torch.tensor([len(of_image) for of_image in encoded.captions], device=text_features.device)  # (N,)
    images = encoded.labels  # (N,) the number of each image
    image_of_caption = images.repeat_interleave(counts)  # (captions,)
    keys = [encoded.keys[image] for image in image_of_caption.tolist()]
    asked = {  # direction: queries, targets, the image that each belongs to, and their names
        "image_retrieval": (text_features, encoded.image_features, image_of_caption, images, keys, captions, encoded.keys),
        "text_retrieval": (encoded.image_features, text_features, images, image_of_caption, encoded.keys, encoded.keys,
                           captions),
    }
    outcomes = []
    for direction, (queries, targets, query_images, target_images, query_keys, names, target_names) in asked.items():
        ranking = rank_targets(queries, targets, query_images, target_images)
        result = _result_of(task, encoded, "captions", n=len(ranking.rank), num_classes=None)
        # The captions of one image hang together.
        numbers = [result(f"{direction}_recall@{k}", recall_at(ranking.rank, k),
                          *clustered_interval(ranking.rank < k, query_images)) for k in RECALL_AT]
        predictions = None
        if thorough:
            places = (ranking.rank + 1).double()  # the first place is 1
            numbers.append(result(f"{direction}_median_rank", places.quantile(0.5).item(),
                                  *median_interval(places, query_images)))
            predictions = _about(_retrieval_columns(ranking, names, target_names), task, "captions", direction, query_keys)
        outcomes.append(Outcome(numbers, predictions))
    return join(outcomes)


def _retrieval_columns(ranking: Any, names: Sequence[str], target_names: Sequence[str]) -> "DataFrame":
    from pandas import DataFrame

    guesses = ranking.guess.tolist()
    return DataFrame({"label": -1, "label_name": list(names), "guess": guesses,
                      "guess_name": [target_names[guess] for guess in guesses], "rank": ranking.rank.numpy(force=True),
                      "tied": ranking.tied.numpy(force=True)})


def _about(predictions: "DataFrame", task: Task, rule: str, direction: str, keys: Sequence[str]) -> "DataFrame":
    """Say in the first columns which questions these are."""
    for place, (name, value) in enumerate({"task": task.name, "kind": task.kind, "prompts": rule, "direction": direction,
                                           "key": list(keys)}.items()):
        predictions.insert(place, name, value)
    return predictions


def _result_of(task: Task, encoded: EncodedTask, rule: str, **changes: Any) -> Any:
    """Results of one task and prompt rule, made of (metric, value, ci_low, ci_high)."""
    about = {"task": task.name, "split": task.split, "kind": task.kind, "n": len(encoded.keys),
             "num_classes": len(task.classes), "prompts": rule, "n_bad": encoded.num_bad.total(), **changes}
    return lambda metric, value, ci_low, ci_high: Result(metric=metric, value=value, ci_low=ci_low, ci_high=ci_high, **about)
