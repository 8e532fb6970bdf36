"""The embedding store: what a model made of pictures and texts, kept on disk, so that each is encoded once.

<cache>/embeddings/images-<key>/  image_features.npy, trunk_features.npy, samples.parquet, store.json
                   texts-<key>/   files of texts with their features, one added by each call that met new ones
                   parts/         what an interrupted encoding had done
                   facts/         small values that are slow to find: of models, prompts, pixels
"""

import hashlib
import json
import os
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clipkit.data.emoji.shards import default_cache_dir
from clipkit.evaluation.feature_files import feature_column, read_feature_files, write_feature_file
from clipkit.evaluation.feature_rows import warn_if_not_kept
from clipkit.evaluation.image_entry import (
    SCHEMA_VERSION,
    EncodedImages,
    json_sha256,
    read_entry,
    sample_columns,
    samples_of,
    write_entry,
)
from clipkit.model.image_text import ImageTextModel
from clipkit.training.atomic_files import fsync_folder, one_line_os_error, remove_quietly

TEXTS_PER_FILE = 65536  # bounds the memory that writing takes
TOKENIZER_PROBE = "A photo of 12 naïve cats, don't they PURR?"  # capitals, digits, accents, punctuation


@dataclass(frozen=True)
class ModelIdentity:
    """All of a model that its features depend on.

    The versions of torch, torchvision and Pillow are no part of it: like the processor, they move the last bits only.
    Of open_clip, which makes towers and preprocessing out of the configuration, the major version is.
    """

    weights_sha256: str
    config: dict[str, Any]  # model_cfg (the activation with it) and preprocess_cfg (the transform)
    dtype: str  # of the weights, which is that of the computation
    probe_tokens: tuple[int, ...]  # what the tokenizer makes of a fixed text
    open_clip: str  # major version


def identify(model: ImageTextModel) -> ModelIdentity:
    """Collect what a model's features depend on. Weights that were not loaded from a file are hashed now."""
    from importlib.metadata import version

    facts = getattr(model, "facts", None)  # of a LazyModel
    if facts is not None:
        return facts.identity
    return ModelIdentity(
        weights_sha256=model.source_sha256 or state_sha256(model),
        config=model.config,
        dtype=", ".join(sorted({str(parameter.dtype) for parameter in model.towers.parameters()})),
        probe_tokens=tuple(model.tokenize([TOKENIZER_PROBE])[0].tolist()),
        open_clip=version("open_clip_torch").split(".")[0],
    )


def state_sha256(model: ImageTextModel) -> str:
    """Hash the weights as they are, with their names and shapes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.towers.state_dict().items()):
        digest.update(json.dumps([name, list(tensor.shape), str(tensor.dtype)]).encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def image_key(identity: ModelIdentity, fingerprint: str) -> str:
    """Name what a model makes of an image set: 64 hex digits, others for any other model, preprocessing or data."""
    return json_sha256(["images", SCHEMA_VERSION, asdict(identity), fingerprint])


def text_key(identity: ModelIdentity) -> str:
    """Name what a model makes of texts; as `image_key`."""
    return json_sha256(["texts", SCHEMA_VERSION, asdict(identity)])


class EmbeddingStore:
    """Features on disk. Reading needs a key and no model; processes may share a store, writers too.

    Attributes:
      folder: <cache>/embeddings.
    """

    def __init__(self, cache_dir: str | Path | None = None) -> None:
        """Name the place; nothing is made yet. cache_dir as in `emoji_shards`: None = the user's cache."""
        self.folder = (Path(cache_dir).expanduser() if cache_dir else default_cache_dir()) / "embeddings"

    def read_images(self, key: str, *, trunk: bool = False) -> EncodedImages | None:
        """Find the features of an image set, mapped into memory.

        Args:
          key: from `image_key`.
          trunk: the features before the projection are needed too.

        Returns:
          None if they are not there. A damaged entry is removed, and a warning says so.
        """
        entry = self.folder / f"images-{key}"
        if not entry.is_dir():
            return None
        try:
            found = read_entry(entry)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            cause = str(error).split("\n")[0]
            warnings.warn(f"{entry} is damaged ({cause}): it is removed, and its pictures are encoded again", stacklevel=2)
            remove_quietly(entry)
            return None
        return None if trunk and found.trunk_features is None else found

    def write_images(self, key: str, images: EncodedImages) -> None:
        """Keep the features of an image set, whole or not at all. An entry that has no less is left as it is.

        Raises:
          OSError: it cannot be written.
        """
        entry = self.folder / f"images-{key}"
        workplace = None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            workplace = Path(tempfile.mkdtemp(prefix=".tmp-images-", dir=self.folder))
            workplace.chmod(0o755)  # mkdtemp gives 0700; a cache may be shared
            write_entry(workplace, images)
            has_no_less = partial(self.read_images, key, trunk=images.trunk_features is not None)
            if has_no_less() is None:
                if entry.is_dir():
                    os.replace(entry, Path(f"{workplace}-poorer"))  # who has it mapped keeps it
                try:
                    os.replace(workplace, entry)
                except OSError:
                    if has_no_less() is None:  # else another process was first
                        raise
                fsync_folder(self.folder)
        except OSError as error:
            raise one_line_os_error(error, entry) from error
        finally:
            if workplace is not None:
                remove_quietly(workplace)
                remove_quietly(Path(f"{workplace}-poorer"))

    def read_texts(self, key: str, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Find those of some texts that are there.

        Args:
          key: from `text_key`.
          texts: T texts, each once.

        Returns:
          (rows (n,) int64 of the texts that were found, in any order; their features (n, D) fp32, unit norm).
        """
        import pyarrow as pa
        import pyarrow.compute as pc

        missing, found, features = np.arange(len(texts)), [], np.empty((0, 0), np.float32)
        for _, table in read_feature_files(self.folder / f"texts-{key}"):
            asked = pa.array([texts[row] for row in missing.tolist()], pa.string())
            places = pc.call_function("index_in", [asked], pc.SetLookupOptions(table["text"])).fill_null(-1).to_numpy()
            here, rows = places >= 0, feature_column(table, "features")
            if here.any():
                if not found:
                    features = np.empty((len(texts), rows.shape[1]), np.float32)
                start = sum(map(len, found))
                found.append(missing[here])
                np.take(rows, places[here], axis=0, out=features[start:start + len(found[-1])])
                missing = missing[~here]
        rows = np.concatenate([np.empty(0, np.int64), *found])  # (n,)
        return torch.from_numpy(rows), torch.from_numpy(features[:len(rows)])

    def add_texts(self, key: str, texts: Sequence[str], features: Tensor) -> None:
        """Keep the features (T, D) of texts that `read_texts` did not find.

        Raises:
          OSError: they cannot be written.
        """
        rows = features.detach().float().cpu().numpy()  # (T, D)
        for start in range(0, len(texts), TEXTS_PER_FILE):
            part = slice(start, start + TEXTS_PER_FILE)
            write_feature_file(self.folder / f"texts-{key}", {"text": list(texts[part])}, {"features": rows[part]})

    def read_parts(self, key: str, *, trunk: bool = False) -> tuple[EncodedImages | None, list[Path]]:
        """Find what an interrupted encoding of an image set had done on this machine, and the files that hold it."""
        files = read_feature_files(self.folder / "parts", prefix=f"{key}-")
        usable = [table for _, table in files if not trunk or "trunk_features" in table.column_names]
        paths = [path for path, _ in files]
        if not usable:
            return None, paths
        features = torch.from_numpy(np.concatenate([feature_column(table, "image_features") for table in usable]))
        before = torch.from_numpy(np.concatenate([feature_column(table, "trunk_features") for table in usable])
                                  ) if trunk else None
        samples = [sample for table in usable for sample in samples_of(table.to_pydict())]
        return EncodedImages(features, before, samples, Counter()), paths

    def write_part(self, key: str, images: EncodedImages) -> Path:
        """Keep a finished part of an image set (its bad samples are counted again by who goes on).

        Raises:
          OSError: it cannot be written.
        """
        features = {"image_features": images.image_features.cpu().numpy()}
        if images.trunk_features is not None:
            features["trunk_features"] = images.trunk_features.cpu().numpy()
        return write_feature_file(self.folder / "parts", sample_columns(images.samples), features, prefix=f"{key}-")

    def fact(self, name: Any, find: Callable[[], Any]) -> Any:
        """Return a small plain value that was found before, or find it now and keep it.

        Args:
          name: plain value that changes with all that the fact depends on.
          find: finds the fact.
        """
        path = self.folder / "facts" / f"{json_sha256([SCHEMA_VERSION, name])}.json"
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
            if kept["sha256"] == json_sha256(kept["value"]):
                return kept["value"]
        except (OSError, ValueError, KeyError, TypeError):
            pass  # not there, or damaged
        value = find()
        warn_if_not_kept(lambda: _write_fact(path, value))
        return value


def _write_fact(path: Path, value: Any) -> None:
    beside = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    path.parent.mkdir(parents=True, exist_ok=True)
    beside.write_text(json.dumps({"sha256": json_sha256(value), "value": value}) + "\n", encoding="utf-8")
    os.replace(beside, path)
