"""What a model says about single pictures: the texts it finds nearest. For people; the numbers: zero_shot.py."""

from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from clipkit.evaluation.classifier import class_weights
from clipkit.evaluation.encode import encode_texts, evaluation_mode
from clipkit.evaluation.tasks import Task, TaskSample, load_task
from clipkit.model.image_text import ImageTextModel, stack_images

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_CANDIDATES = 512  # captions among which a retrieval task's pictures look for theirs


class Prediction(NamedTuple):
    """One picture and the names that the model gives it."""

    image: "Image"
    label: str  # the right name
    guesses: tuple[tuple[str, bool], ...]  # (name, whether it is right), the best first


def predict(model: ImageTextModel, task: str | Task, *, num_images: int = 40, num_guesses: int = 3,
            prompts: str | None = None, batch_size: int = 256, cache_dir: str | Path | None = None) -> list[Prediction]:
    """Name the first pictures of a task. On one process; the emoji shards are mixed, so the first are a fair sample.

    Args:
      model: measured in evaluation mode and fp32.
      task: as in `load_task`, or loaded.
      num_images: pictures, at most.
      num_guesses: names for each.
      prompts: the task's prompt rule, None = its first; a retrieval task has none, its names are captions of its first
        samples.
      batch_size: texts that are encoded at once.
      cache_dir: folder for unpacked data, None = the user's cache.
    """
    if isinstance(task, str):
        task = load_task(task, cache_dir=cache_dir)
    good = (sample for sample in task.images.read() if isinstance(sample, TaskSample))
    if task.classes:
        samples = list(islice(good, num_images))
        names, answers = list(task.classes), [sample.labels for sample in samples]
        weight = class_weights(model, task.prompts[prompts or next(iter(task.prompts))], batch_size=batch_size)  # (C, D)
    else:
        candidates = [sample for sample in islice(good, MAX_CANDIDATES) if sample.captions]  # a choice's stand elsewhere
        samples, names = candidates[:num_images], [sample.captions[0] for sample in candidates]
        answers = [(number,) for number in range(len(samples))]
        weight = encode_texts(model, names, batch_size=batch_size)  # (C, D)
    if not samples:
        return []
    with evaluation_mode(model):
        features = model.encode_image(stack_images(model, [sample.image for sample in samples]))  # (N, D)
    nearest = (features @ weight.T).topk(min(num_guesses, len(names))).indices.tolist()  # N lists
    predictions = []
    for sample, answer, guesses in zip(samples, answers, nearest, strict=True):
        right = [names[number] for number in answer]
        named = tuple((names[guess], names[guess] in right) for guess in guesses)
        predictions.append(Prediction(sample.image, ", ".join(right), named))
    return predictions
