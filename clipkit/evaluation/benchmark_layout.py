"""Sets in the layout of CLIP_benchmark: tars under root/<split>/, class names and templates in text files beside them.

Written by `clipkit shards write`, by benchmark_writer.py, and by CLIP_benchmark's own exporter.
"""

import io
import math
import os
from functools import partial
from pathlib import Path

import numpy as np

from clipkit.data.samples import SampleError
from clipkit.data.tars import RawSample, is_local, open_shard
from clipkit.evaluation.image_sets import CLASSIFICATION, MULTI_LABEL, RETRIEVAL, OpenedSet, ShardImages, Target

DATASET_TYPES = {"classification": CLASSIFICATION, "multilabel": MULTI_LABEL, "retrieval": RETRIEVAL}
SPLITS = ("test", "val", "validation", "train")  # asked for where a folder cannot be listed
SHARD_SIGNS = (".tar", ".tgz", "{", "*", "[")  # of shards or a pattern of them, in the last part of a URL
MAX_TEXT_BYTES = 2**24  # far above any list of class names
MAX_LABEL_BYTES = 2**20  # of a .npy: a million classes of one byte
NPY_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def find_benchmark_set(name: str) -> tuple[str, str | None] | None:
    """Recognise a set in this layout.

    Args:
      name: a folder or a URL: of the set, or of one of its splits.

    Returns:
      (root, the split that was named or None); None where the name is none of this layout.
    """
    if not is_local(name):
        url = _tar_url(name.rstrip("/"))
        root, _, last = url.rpartition("/")
        if url.startswith("pipe:") or any(sign in last for sign in SHARD_SIGNS):
            return None
        return (root, last) if last in SPLITS and _read_text(f"{url}/nshards.txt") is not None else (url, None)
    folder = Path(name).expanduser()
    if (folder / "nshards.txt").is_file():
        return os.path.dirname(os.path.abspath(folder)), os.path.abspath(folder).rpartition("/")[2]
    described = (folder / "dataset_type.txt").is_file() or (folder / "classnames.txt").is_file()
    if _splits_in(str(folder)) or (described and any(folder.glob("*/*.tar"))):
        return str(folder), None
    return None


def open_benchmark_set(root: str, split: str, kind: str | None = None, *, with_train: bool = True) -> OpenedSet:
    """Open one split of a set.

    Args:
      root: of the set, a folder or a URL.
      split: name of the folder that holds the tars.
      kind: what the labels are read for; None = as dataset_type.txt says, without it classification.
      with_train: open the train split too, where there is one.

    Raises:
      FileNotFoundError: there is no such split.
      ValueError: nshards.txt disagrees with the tars, or dataset_type.txt or classnames.txt cannot be used.
    """
    shards = _shards_of(root, split)
    if kind is None:
        given = (_read_text(f"{root}/dataset_type.txt") or "classification").strip().lower()
        if given not in DATASET_TYPES:
            raise ValueError(f"{root}/dataset_type.txt says {given!r}; it can say {', '.join(DATASET_TYPES)}")
        kind = DATASET_TYPES[given]
    if kind == RETRIEVAL:
        return OpenedSet(kind, split, ShardImages(shards, _captions_in_lines, "lines of captions"))
    classes = _lines(f"{root}/classnames.txt")
    if not classes:
        raise ValueError(f"{root}/classnames.txt is missing or empty; give the name of each class on a line of its own, in "
                         "the order of the labels")
    train = None
    if with_train and split != "train" and _read_text(f"{root}/train/nshards.txt") is not None:
        train = _labelled(_shards_of(root, "train"), kind, len(classes))
    return OpenedSet(kind, split, _labelled(shards, kind, len(classes)), tuple(classes),
                     tuple(line for line in _lines(f"{root}/zeroshot_classification_templates.txt") if line), train,
                     f"{root}/classnames.txt")


def _labelled(shards: tuple[str, ...], kind: str, num_classes: int) -> ShardImages:
    if kind == MULTI_LABEL:
        return ShardImages(shards, partial(_multi_hot, num_classes=num_classes), f"npy of {num_classes}", with_npy=True)
    return ShardImages(shards, partial(_class_number, num_classes=num_classes), f"cls of {num_classes}")


def _class_number(raw: RawSample, *, num_classes: int) -> Target:
    if raw.label is None:
        raise SampleError("no label", "the sample has no .cls")
    try:
        label = int(raw.label)
    except ValueError as error:
        raise SampleError("bad label", f"the .cls is {raw.label[:40]!r}, not a number") from error
    if not 0 <= label < num_classes:
        raise ValueError(f"label {label} of sample {raw.key} in {raw.url} is outside the {num_classes} classes of "
                         f"classnames.txt (0 to {num_classes - 1}); give classnames.txt the line that is missing, or "
                         "number the labels from 0")
    return Target(label, (label,))


def _multi_hot(raw: RawSample, *, num_classes: int) -> Target:
    """The classes that are set in a .npy, which is never unpickled and never larger than it says."""
    if raw.multi_hot is None:
        raise SampleError("no label", "the sample has no .npy")
    file = io.BytesIO(raw.multi_hot)
    try:
        if len(raw.multi_hot) > MAX_LABEL_BYTES:
            raise ValueError(f"{len(raw.multi_hot)} bytes are too many for labels")
        shape, _, dtype = NPY_HEADERS[np.lib.format.read_magic(file)](file)
        if dtype.kind not in "biuf" or math.prod(shape) * dtype.itemsize != len(raw.multi_hot) - file.tell():
            raise ValueError(f"{shape} of {dtype} is no row of numbers, or not what the file holds")
        values = np.frombuffer(raw.multi_hot, dtype, offset=file.tell())  # (C,)
    except Exception as error:  # numpy's parser of a damaged header can raise anything (tokenize.TokenError, ...)
        raise SampleError("bad label", f"the .npy cannot be read: {error}") from error
    if len(values) != num_classes:
        raise ValueError(f"sample {raw.key} in {raw.url} has labels for {len(values)} classes, but classnames.txt names "
                         f"{num_classes}; the two must agree")
    labels = tuple(np.flatnonzero(values > 0).tolist())
    return Target(labels[0] if len(labels) == 1 else -1, labels)


def _captions_in_lines(raw: RawSample) -> Target:
    """The lines of the .txt; a line break inside a caption is written as a backslash and an n."""
    try:
        lines = (raw.text or b"").decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise SampleError("corrupt json or text", f"the .txt is not UTF-8: {error}") from error
    captions = tuple(caption for line in lines if (caption := line.replace("\\n", "\n").strip()))
    if not captions:
        raise SampleError("no caption", "the .txt is missing or blank")
    return Target(captions=captions)


def _shards_of(root: str, split: str) -> tuple[str, ...]:
    """The tars of a split, which must be as many as its nshards.txt says."""
    text = _read_text(f"{root}/{split}/nshards.txt")
    if text is None:
        there = _splits_in(root)
        if there:
            raise FileNotFoundError(f"split {split!r} is not in {root}: it has {', '.join(there)}; name one, as in "
                                    f"task={root}/{there[0]}")
        unseen = "" if is_local(root) else " (or its server cannot be reached)"
        raise FileNotFoundError(f"no set at {root}: there is no {split}/nshards.txt{unseen}, which says how many tars the "
                                "split has")
    try:
        num_shards = int(text)
    except ValueError as error:
        raise ValueError(f"{root}/{split}/nshards.txt holds {text[:40]!r}; it must be the number of tars") from error
    shards = tuple(f"{root}/{split}/{number}.tar" for number in range(num_shards))
    if is_local(root):
        there = sorted(int(path.stem) for path in Path(root, split).glob("*.tar") if path.stem.isdigit())
        agrees = num_shards > 0 and there == list(range(num_shards))
    else:
        import fsspec

        filesystem, path = fsspec.url_to_fs(f"{root}/{split}")
        there = [n for n in (num_shards - 1, num_shards) if n >= 0 and filesystem.exists(f"{path}/{n}.tar")]
        agrees = there == [num_shards - 1]
    if not agrees:
        found = ", ".join(f"{number}.tar" for number in there[:8]) or "none of them"
        raise ValueError(f"{root}/{split}/nshards.txt says {num_shards} tars (0.tar to {num_shards - 1}.tar), but there is "
                         f"{found}; copy what is missing, or correct nshards.txt")
    return shards


def _splits_in(root: str) -> list[str]:
    if is_local(root):
        return sorted(path.parent.name for path in Path(root).glob("*/nshards.txt"))
    return [split for split in SPLITS if _read_text(f"{root}/{split}/nshards.txt") is not None]


def _lines(url: str) -> list[str]:
    """The lines of a text without the blank ones at its end; [] where there is none."""
    return [line.strip() for line in (_read_text(url) or "").rstrip().splitlines()]


def _read_text(url: str) -> str | None:
    """A small text, or None where there is none."""
    try:
        with open_shard(url) as file:
            data = file.read(MAX_TEXT_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except Exception as error:  # fsspec's backends raise classes of their own
        raise ValueError(f"{url} cannot be read: {type(error).__name__}: {error}") from error
    if len(data) > MAX_TEXT_BYTES:
        raise ValueError(f"{url} has more than {MAX_TEXT_BYTES} bytes, which is no list of names")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{url} is not UTF-8: {error}") from error


def _tar_url(url: str) -> str:
    """The address of the files of a Hugging Face data set, where that of its page was given."""
    return url.replace("/tree/", "/resolve/", 1) if url.startswith("https://huggingface.co/datasets/") else url
