"""The images of a task to features, on one process or spread over all of them. Evaluation mode, fp32."""

from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from clipkit.evaluation.feature_rows import (
    Progress,
    evaluation_mode,
    gather_rows,
    ranks_of,
    refuse_not_finite,
    share_rows,
    warn_if_not_kept,
)
from clipkit.evaluation.image_entry import EncodedImages
from clipkit.evaluation.image_loader import ImageReader, LoadedImage, in_batches, load_images
from clipkit.evaluation.image_sets import Share
from clipkit.evaluation.store import EmbeddingStore, identify, image_key
from clipkit.evaluation.tasks import Task
from clipkit.evaluation.text_features import encode_texts
from clipkit.model.image_text import ImageTextModel
from clipkit.training.distributed import from_main, gather_objects

__all__ = ["EncodedTask", "encode_task", "encode_texts", "evaluation_mode", "gather_rows"]

PART_SAMPLES = 4096  # images after which a process keeps what it has: minutes of work on a CPU, 20 MB for a ViT-B


class EncodedTask(NamedTuple):
    """The images of a task in the task's order. Legend: N images, D embed_dim, F width of the trunk."""

    image_features: Tensor  # (N, D) unit norm, fp32, on the model's device
    keys: list[str]  # N, unique
    labels: Tensor  # (N,) int64 class of each image, -1 where several are right; in a task without classes its number
    label_sets: list[tuple[int, ...]]  # N, all right classes
    captions: list[tuple[str, ...]]  # N; empty in a classification task
    num_bad: Counter[str]  # samples left out, by cause
    trunk_features: Tensor | None = None  # (N, F) fp32, before the projection


def encode_task(model: ImageTextModel, task: Task, *, batch_size: int, spread: bool = False,
                store: EmbeddingStore | None = None, trunk: bool = False, workers: int = 0,
                progress: Progress | None = None) -> EncodedTask:
    """Encode all images of a task, or read from a store what was encoded before.

    With a store, a long encoding that was interrupted goes on where it was; the model is not called for what is there.

    Args:
      model: encodes the images; left in the mode it was in.
      task: has the images.
      batch_size: images that are encoded at once.
      spread: over all processes: each encodes whole batches, and each gets all, the bits that one process would get. All
        of them must call this. The store of the first is read and written.
      store: where features are kept.
      trunk: give the features before the projection too.
      workers: processes that decode and preprocess for this one; 0 = this one does. The features are the same.
      progress: called after each batch.

    Raises:
      ValueError: no image of the task can be used, a feature is not finite, or trunk is asked of a tower without any.
      OSError: the images cannot be read.
    """
    rank, _ = ranks_of(spread)
    key, found = "", None
    if store is not None and rank == 0:
        key = image_key(identify(model), task.images.fingerprint)
        found = store.read_images(key, trunk=trunk)
    if spread:
        key, found = from_main(key), _share_images(found, model.device)
    if found is None:
        share = _Share(model, task, batch_size=batch_size, spread=spread, store=store, key=key, trunk=trunk)
        found = share.encode(workers, progress)
    return _as_task(task, found, model.device)


class _Share:
    """The encoding of a task's images: this process's share of it, and how all of them are put together."""

    def __init__(self, model: ImageTextModel, task: Task, *, batch_size: int, spread: bool, store: EmbeddingStore | None,
                 key: str, trunk: bool) -> None:
        self.model, self.task, self.store, self.key = model, task, store, key
        self.batch_size, self.spread, self.trunk = batch_size, spread, trunk
        self.part_files: list[Path] = []

    def encode(self, workers: int, progress: Progress | None) -> EncodedImages:
        """Encode, gather, check and keep."""
        failure, own = None, self._join([])
        try:
            own = self._encode_own(workers, progress)
        except (OSError, ValueError) as error:
            failure = error
        for one in gather_objects(failure) if self.spread else [failure]:
            if one is not None:  # of any process, on all: none waits for one that has ended
                raise one
        images = self._gather(own)
        if not images.samples:
            raise ValueError(f"task {self.task.name} has no image that can be used (bad samples: "
                             f"{dict(images.num_bad) or 'none'})")
        self._refuse_not_finite(images)
        if self.store is not None:
            store, is_first = self.store, ranks_of(self.spread)[0] == 0
            kept = is_first and warn_if_not_kept(lambda: store.write_images(self.key, images))
            if from_main(kept) if self.spread else kept:
                for path in self.part_files:
                    path.unlink(missing_ok=True)
        return images

    def _encode_own(self, workers: int, progress: Progress | None) -> EncodedImages:
        """Encode this process's share but for what an earlier run had done of it; keep a part now and then."""
        done = None
        if self.store is not None:
            done, self.part_files = self.store.read_parts(self.key, trunk=self.trunk)
        row_of = {sample.position: row for row, sample in enumerate(done.samples)} if done else {}
        rank, world_size = ranks_of(self.spread)
        share = Share(rank, world_size, self.batch_size)  # whole batches
        reader = ImageReader(self.task.images, self.model.transform, row_of.keys(), share)
        count = self.task.images.count() if progress is not None else None
        num_bad, num_done, num_kept, batches = Counter(), 0, 0, []
        known: list[int] = []  # rows of `done`
        with evaluation_mode(self.model):
            for loaded in in_batches(load_images(reader, num_bad, workers=workers), self.batch_size):
                known += [row_of[one.info.position] for one in loaded if one.pixels is None]
                batches.append(self._encode_batch([one for one in loaded if one.pixels is not None]))
                if self.store is not None and sum(len(one.samples) for one in batches[num_kept:]) >= PART_SAMPLES:
                    self._keep_part(batches[num_kept:])
                    num_kept = len(batches)
                num_done += len(loaded)
                if progress is not None:
                    progress(*_of_all(num_done + num_bad.total(), count, world_size))
        if done and known:
            device = self.model.device
            batches.append(EncodedImages(done.image_features[known].to(device),
                                         done.trunk_features[known].to(device) if done.trunk_features is not None else None,
                                         [done.samples[row] for row in known], Counter()))
        return self._join(batches)._replace(num_bad=num_bad)

    def _encode_batch(self, loaded: list[LoadedImage]) -> EncodedImages:
        if not loaded:
            return self._join([])
        pixels = torch.stack([one.pixels for one in loaded if one.pixels is not None]).to(self.model.device)  # (b, 3, H, W)
        features, trunk = self.model.encode_image_with_trunk(pixels) if self.trunk else (self.model.encode_image(pixels), None)
        return EncodedImages(features, trunk, [one.info for one in loaded], Counter())

    def _keep_part(self, batches: list[EncodedImages]) -> None:
        assert self.store is not None
        store, part = self.store, self._join(batches)
        self._refuse_not_finite(part)
        warn_if_not_kept(lambda: self.part_files.append(store.write_part(self.key, part)))

    def _join(self, batches: list[EncodedImages]) -> EncodedImages:
        nothing = torch.empty(0, 0, device=self.model.device)
        features = [one.image_features for one in batches if one.samples]
        trunk = [one.trunk_features for one in batches if one.trunk_features is not None and one.samples]
        return EncodedImages(torch.cat(features or [nothing]), torch.cat(trunk or [nothing]) if self.trunk else None,
                             [sample for one in batches for sample in one.samples], Counter())

    def _gather(self, own: EncodedImages) -> EncodedImages:
        """Bring the shares of all processes together, in the order of the data."""
        features, trunk, samples, num_bad = own
        if self.spread:
            features = gather_rows(features)  # (N, D)
            trunk = gather_rows(trunk) if trunk is not None else None  # (N, F)
            shares = gather_objects((samples, num_bad))
            samples = [sample for share in shares for sample in share[0]]
            num_bad = sum((share[1] for share in shares), Counter())
        order = sorted(range(len(samples)), key=lambda row: samples[row].position)
        rows = torch.tensor(order, dtype=torch.int64, device=features.device)
        return EncodedImages(features[rows], trunk[rows] if trunk is not None else None,
                             [samples[row] for row in order], num_bad)

    def _refuse_not_finite(self, images: EncodedImages) -> None:
        for features in (images.image_features, images.trunk_features):
            if features is not None:
                refuse_not_finite(features, lambda row: f"picture {images.samples[row].key} of task {self.task.name}")


def _of_all(done: int, count: int | None, world_size: int) -> tuple[int, int | None]:
    """Progress of all processes, judged by this one's: (done, count)."""
    return (done * world_size, None) if count is None else (min(done * world_size, count), count)


def _as_task(task: Task, images: EncodedImages, device: torch.device) -> EncodedTask:
    samples = images.samples
    labels = [sample.label for sample in samples] if task.classes else list(range(len(samples)))
    return EncodedTask(
        images.image_features.to(device), [sample.key for sample in samples], torch.tensor(labels, device=device),
        [sample.labels for sample in samples], [sample.captions for sample in samples], images.num_bad,
        images.trunk_features.to(device) if images.trunk_features is not None else None)


def _share_images(images: EncodedImages | None, device: torch.device) -> EncodedImages | None:
    """Give every process what the first one has."""
    if not dist.is_initialized():
        return images
    facts = from_main(None if images is None else (images.samples, images.num_bad, images.trunk_features is not None))
    if facts is None:
        return None
    nothing = torch.empty(0, 0)
    features = share_rows(images.image_features if images else nothing, device)  # (N, D)
    before = images.trunk_features if images and images.trunk_features is not None else nothing
    return EncodedImages(features, share_rows(before, device) if facts[2] else None, facts[0], facts[1])
