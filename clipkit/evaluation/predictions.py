"""What a model says about single pictures: the texts it finds nearest. For people; the numbers: zero_shot.py."""

from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from clipkit.evaluation.classifier import class_weights
from clipkit.evaluation.encode import encode_texts, evaluation_mode
from clipkit.evaluation.tasks import CLASSIFICATION, Task, TaskSample, load_task, read_task
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
            prompts: str = "label", batch_size: int = 256, cache_dir: str | Path | None = None) -> list[Prediction]:
    """Name the first pictures of a task. On one process; the emoji shards are mixed, so the first are a fair sample.

    Args:
      model: measured in evaluation mode and fp32.
      task: as in `load_task`, or loaded.
      num_images: pictures, at most.
      num_guesses: names for each.
      prompts: the task's prompt rule; a retrieval task has none, its names are captions of its first samples.
      batch_size: texts that are encoded at once.
      cache_dir: folder for unpacked data, None = the user's cache.
    """
    if isinstance(task, str):
        task = load_task(task, cache_dir=cache_dir)
    good = (sample for sample in read_task(task) if isinstance(sample, TaskSample))
    if task.kind == CLASSIFICATION:
        samples = list(islice(good, num_images))
        names, answers = list(task.classes.values()), [sample.label for sample in samples]
        weight = class_weights(model, task.prompts[prompts], batch_size=batch_size)  # (C, D)
    else:
        candidates = list(islice(good, MAX_CANDIDATES))
        samples, names = candidates[:num_images], [sample.captions[0] for sample in candidates]
        answers = list(range(len(samples)))
        weight = encode_texts(model, names, batch_size=batch_size)  # (C, D)
    if not samples:
        return []
    with evaluation_mode(model):
        features = model.encode_image(stack_images(model, [sample.image for sample in samples]))  # (N, D)
    nearest = (features @ weight.T).topk(min(num_guesses, len(names))).indices.tolist()  # N lists
    predictions = []
    for sample, answer, guesses in zip(samples, answers, nearest, strict=True):
        named = tuple((names[guess], names[guess] == names[answer]) for guess in guesses)
        predictions.append(Prediction(sample.image, names[answer], named))
    return predictions
