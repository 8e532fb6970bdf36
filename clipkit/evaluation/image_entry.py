"""One entry of the embedding store: the features of an image set as files that tell whether they are whole."""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from clipkit.model.build import file_sha256
from clipkit.training.atomic_files import fsync_file, fsync_folder

SCHEMA_VERSION = 1  # of the whole store: raise when the layout changes, or the way in which clipkit decodes or encodes
HASHED_BYTES = 2**26  # files up to this size are hashed when they are read; of larger ones the size is compared
CHECKED_ROWS = 1024  # rows in which a reader looks for values that are not finite
FEATURES, TRUNK, SAMPLES, INDEX = "image_features.npy", "trunk_features.npy", "samples.parquet", "store.json"


class SampleInfo(NamedTuple):
    """What is known of one picture of a task, beside the picture (see `TaskSample`)."""

    position: tuple[int, int]
    key: str
    label: int
    labels: tuple[int, ...]
    captions: tuple[str, ...]


class EncodedImages(NamedTuple):
    """The pictures of an image set in its order. Legend: N images, D embed_dim, F width of the trunk."""

    image_features: Tensor  # (N, D) unit norm, fp32
    trunk_features: Tensor | None  # (N, F) fp32, before the projection
    samples: list[SampleInfo]  # N
    num_bad: Counter[str]  # samples left out, by cause


def write_entry(folder: Path, images: EncodedImages) -> None:
    """Write the features of an image set into an empty folder.

    Raises:
      OSError: a file cannot be written.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    np.save(folder / FEATURES, images.image_features.cpu().numpy())
    if images.trunk_features is not None:
        np.save(folder / TRUNK, images.trunk_features.cpu().numpy())
    pq.write_table(pa.table(sample_columns(images.samples), schema=_sample_schema()), folder / SAMPLES)
    files = {}
    for path in sorted(folder.iterdir()):
        fsync_file(path)
        files[path.name] = {"size": path.stat().st_size, "sha256": file_sha256(path)}
    index = {"schema_version": SCHEMA_VERSION, "num_images": len(images.samples), "num_bad": dict(images.num_bad),
             "files": files}
    (folder / INDEX).write_text(json.dumps(index | {"sha256": json_sha256(index)}, indent=1) + "\n", encoding="utf-8")
    fsync_file(folder / INDEX)
    fsync_folder(folder)


def read_entry(folder: Path) -> EncodedImages:
    """Read an entry, its features mapped into memory.

    Raises:
      OSError, ValueError, KeyError, TypeError, AttributeError: it is damaged; the error says how in a few words.
    """
    import pyarrow.parquet as pq

    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    if index.pop("sha256") != json_sha256(index):
        raise ValueError(f"{INDEX} has another sha256 than it says")
    for name, facts in index["files"].items():
        size = (folder / name).stat().st_size
        if size != facts["size"]:
            raise ValueError(f"{name} has {size} bytes in the place of {facts['size']}")
        if size <= HASHED_BYTES and file_sha256(folder / name) != facts["sha256"]:
            raise ValueError(f"{name} has another sha256 than in {INDEX}")
    samples = samples_of(pq.read_table(folder / SAMPLES).to_pydict())
    features = [_map_features(folder / name, len(samples)) if name in index["files"] else None for name in (FEATURES, TRUNK)]
    assert features[0] is not None
    return EncodedImages(features[0], features[1], samples, Counter(index["num_bad"]))


def sample_columns(samples: Sequence[SampleInfo]) -> dict[str, list[Any]]:
    """Bring samples into the columns of a table."""
    return {"shard": [sample.position[0] for sample in samples], "number": [sample.position[1] for sample in samples],
            "key": [sample.key for sample in samples], "label": [sample.label for sample in samples],
            "labels": [list(sample.labels) for sample in samples], "captions": [list(sample.captions) for sample in samples]}


def samples_of(columns: dict[str, list[Any]]) -> list[SampleInfo]:
    """Bring the columns that `sample_columns` made back into samples."""
    rows = zip(*(columns[name] for name in ("shard", "number", "key", "label", "labels", "captions")), strict=True)
    return [SampleInfo((shard, number), key, label, tuple(labels), tuple(captions))
            for shard, number, key, label, labels, captions in rows]


def json_sha256(value: Any) -> str:
    """Hash a plain value: 64 hex digits."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _map_features(path: Path, num_images: int) -> Tensor:
    """Map an array (N, D) into memory; changes to it stay in this process."""
    rows = np.load(path, mmap_mode="c", allow_pickle=False)
    if rows.dtype != np.float32 or rows.ndim != 2 or len(rows) != num_images:
        raise ValueError(f"{path.name} holds {rows.shape} of {rows.dtype} in the place of {num_images} rows of float32")
    if not np.isfinite(rows[::max(1, num_images // CHECKED_ROWS)]).all():
        raise ValueError(f"{path.name} holds values that are not finite")
    return torch.from_numpy(rows)


def _sample_schema() -> Any:
    import pyarrow as pa

    return pa.schema({"shard": pa.int64(), "number": pa.int64(), "key": pa.string(), "label": pa.int64(),
                      "labels": pa.list_(pa.int64()), "captions": pa.list_(pa.string())})
