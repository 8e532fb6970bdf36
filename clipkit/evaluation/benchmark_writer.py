"""Write any task as a set in the layout of CLIP_benchmark. How such a set is read: benchmark_layout.py."""

import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from clipkit.data.tars import BadSample
from clipkit.data.write import ShardWriter, existing_shards, write_benchmark_files, write_text
from clipkit.evaluation.tasks import CLASSIFICATION, MULTI_LABEL, RETRIEVAL, Task, TaskSample

DATASET_TYPES = {CLASSIFICATION: "classification", MULTI_LABEL: "multilabel", RETRIEVAL: "retrieval"}
SHARD_NAME = "{}.tar"
SAMPLES_PER_SHARD = 10_000  # as CLIP_benchmark's own exporter


def write_benchmark_set(task: Task, folder: str | Path, *, templates: Sequence[str] = ("a photo of a {c}.",),
                        samples_per_shard: int = SAMPLES_PER_SHARD) -> Counter[str]:
    """Write a task's pictures (lossless, as PNG) and what is right for each, and its train split where it has one.

    Args:
      task: of any kind.
      folder: of the set; made where missing.
      templates: with {c} or {} in the class name's place; unused in retrieval.
      samples_per_shard: pictures in a tar.

    Returns:
      The samples that could not be used and are left out, by cause.

    Raises:
      ValueError: the folder holds this split already, a template has no place for the name, or no picture can be used.
    """
    folder, num_bad = Path(folder).expanduser(), Counter()
    lines = [text.replace("{}", "{c}") for text in templates]
    wrong = [text for text in lines if "{c}" not in text]
    if wrong:
        raise ValueError(f"template {wrong[0]!r} holds neither {{c}} nor {{}}, where the class name goes")
    split = task.split if task.split != "all" else "test"
    parts = {split: task.images, **({"train": task.train.images} if task.train else {})}
    for name, images in parts.items():
        place = folder / name
        if existing_shards(place, SHARD_NAME):
            raise ValueError(f"{place} holds shards already; give another folder")
        with ShardWriter(place, samples_per_shard=samples_per_shard, name=SHARD_NAME) as writer:
            for sample in images.read():
                if isinstance(sample, BadSample):
                    num_bad[sample.cause] += 1
                else:
                    writer.write(_members(task, sample))
            if not writer.num_samples:
                raise ValueError(f"task {task.name} has no image in {name} that can be written (bad samples: {dict(num_bad)})")
        if task.kind == RETRIEVAL:
            write_text(place / "nshards.txt", f"{len(writer.sizes)}\n")
        else:
            write_benchmark_files(folder, name, task.classes, lines, len(writer.sizes))
        write_text(folder / "dataset_type.txt", f"{DATASET_TYPES[task.kind]}\n")
    return num_bad


def _members(task: Task, sample: TaskSample) -> dict[str, bytes]:
    picture = io.BytesIO()
    sample.image.save(picture, "PNG")
    if task.kind == CLASSIFICATION:
        return {"png": picture.getvalue(), "cls": str(sample.label).encode()}
    if task.kind == RETRIEVAL:
        # A caption is a line, so a line break inside one is written as a backslash and an n.
        lines = ["\\n".join(caption.splitlines()) for caption in sample.captions]
        return {"png": picture.getvalue(), "txt": "\n".join(lines).encode()}
    row, file = np.zeros(len(task.classes), np.int64), io.BytesIO()  # (C,)
    row[list(sample.labels)] = 1
    np.save(file, row, allow_pickle=False)
    return {"png": picture.getvalue(), "npy": file.getvalue()}
