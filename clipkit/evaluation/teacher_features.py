"""What a teacher makes of training data: every picture as it stands, and every caption that training may draw."""

import json
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from clipkit.config.data import DataConfig
from clipkit.config.distill import DistillConfig
from clipkit.data.loader import default_workers
from clipkit.data.samples import SampleError, captions_by_field, check_text, hash63, read_fields
from clipkit.data.tars import RawSample
from clipkit.evaluation.encode import encode_task, encode_texts
from clipkit.evaluation.image_sets import RETRIEVAL, ShardImages, Target
from clipkit.evaluation.lazy_model import facts_of, open_model
from clipkit.evaluation.progress_line import ProgressLine
from clipkit.evaluation.store import EmbeddingStore, image_key
from clipkit.evaluation.tasks import Task
from clipkit.training.distributed import Process
from clipkit.training.teacher import FeatureTable, Teacher, keep_teacher


def load_teacher(distill: DistillConfig, data: DataConfig, shards: Sequence[str], *, run_dir: Path,
                 process: Process) -> Teacher | None:
    """Encode the training data with the teacher, or read from the store what was encoded before. All processes call this.

    Args:
      distill: names the teacher.
      data: says which captions may be drawn.
      shards: paths and URLs of all sources.
      run_dir: of the student; gets teacher.json.
      process: this one; each encodes its share.

    Returns:
      None where no teacher is named.

    Raises:
      ValueError: the teacher has no weights, or others than the run began with; no picture can be used, or a feature is
        not finite.
      FileNotFoundError: there is no such teacher.
      OSError: the data cannot be read.
    """
    if distill.teacher is None:
        return None
    store, started, cpu = EmbeddingStore(data.cache_dir), time.monotonic(), time.process_time()
    model = open_model(distill.teacher, pretrained=distill.pretrained, device=process.device, store=store)
    facts = facts_of(model)
    if facts.source_sha256 is None:
        raise ValueError(f"distill.teacher is {distill.teacher!r}, and an open_clip name alone has no weights; give a run, a "
                         "model folder, or distill.pretrained=<tag or weights file> with the name")
    keep_teacher(run_dir, distill.teacher, facts.source_sha256, is_main=process.is_main)
    task = teacher_task(", ".join(data.train), shards, caption_fields=data.caption_fields, class_names=data.class_names)
    workers = default_workers(process.local_world_size) if data.workers is None else data.workers
    with ProgressLine("teacher   pictures: ", process.is_main) as line:
        encoded = encode_task(model, task, batch_size=distill.batch_size, spread=True, store=store, workers=workers,
                              progress=line.show)
    texts = list(dict.fromkeys(caption for of_image in encoded.captions for caption in of_image))
    with ProgressLine("teacher   captions: ", process.is_main, unit="done") as line:
        text_features = encode_texts(model, texts, batch_size=distill.batch_size, spread=True, store=store,
                                     progress=line.show)  # (texts, T)
    num_bad = encoded.num_bad.total()
    if process.is_main:
        bad = f" ({num_bad:,} bad samples left out)" if num_bad else ""
        print(f"teacher   {distill.teacher}: {len(encoded.keys):,} pictures{bad}, {len(texts):,} captions: "
              f"{time.monotonic() - started:.1f} s ({time.process_time() - cpu:.1f} CPU s), kept in {store.folder}", flush=True)
    entry = store.folder / f"images-{image_key(facts.identity, task.images.fingerprint)}"
    found = f"it could not use {num_bad} samples ({dict(encoded.num_bad)})" if num_bad else "the shards changed meanwhile"
    image_ids = torch.tensor([labels[0] for labels in encoded.label_sets])  # (N,)
    caption_ids = torch.tensor([hash63(text.encode()) for text in texts])  # (texts,)
    return Teacher(FeatureTable(image_ids, encoded.image_features.cpu()), FeatureTable(caption_ids, text_features.cpu()),
                   facts.logit_scale, weight=distill.share,
                   cure=f"{found}: see that all shards can be read and stay as they are, remove {entry}, and run the same "
                        "command again")


def teacher_task(name: str, shards: Sequence[str], *, caption_fields: Sequence[str] | None,
                 class_names: Sequence[str] | None = None) -> Task:
    """Open training shards with all that training may draw: of each picture its id as its label, and all captions.

    Args:
      name: for messages.
      shards: paths and URLs.
      caption_fields: as in `choose_caption`.
      class_names: as in `read_fields`.
    """
    target = partial(_target, caption_fields=caption_fields, class_names=class_names)
    meaning = json.dumps(["picture ids and all captions", caption_fields, class_names])
    return Task(name, "train", RETRIEVAL, ShardImages(tuple(dict.fromkeys(shards)), target, meaning))


def _target(raw: RawSample, *, caption_fields: Sequence[str] | None, class_names: Sequence[str] | None) -> Target:
    assert raw.image is not None
    found = captions_by_field(raw.text, read_fields(raw, class_names), caption_fields)
    captions = tuple(dict.fromkeys(caption for of_field in found for caption in of_field if _is_text(caption)))
    if not captions:
        raise SampleError("no caption")
    return Target(labels=(hash63(raw.image),), captions=captions)


def _is_text(caption: str) -> bool:
    try:
        check_text(caption)
    except SampleError:
        return False
    return True
