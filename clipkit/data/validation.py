"""Training pairs that are set aside: drawn once, by seed and name, and kept as shards in the run's folder."""

import hashlib
import json
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from clipkit.data.decode import DecodeError, decode_image
from clipkit.data.samples import SampleError, choose_caption, group_id, read_fields
from clipkit.data.tars import BadSample, RawSample, read_shard
from clipkit.data.write import ShardWriter, write_sizes, write_text

if TYPE_CHECKING:
    from clipkit.config.data import DataConfig

FOLDER = "validation"  # in the run's folder
RECORD = "validation.json"  # in that
SAMPLES_PER_SHARD = 10_000
SHOWN_EVERY = 1000  # samples read


@dataclass(frozen=True, kw_only=True)
class Split:
    """Which samples are set aside: a function of the seed and their names, wherever the shards lie."""

    fraction: float
    seed: int

    def holds_out(self, raw: RawSample) -> bool:
        """Whether a sample is set aside; its name is that of its shard's file and its key."""
        digest = hashlib.blake2b(f"{self.seed}/{source_name(raw)}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
        return int.from_bytes(digest, "little") < self.fraction * 2**64


class Drawn(NamedTuple):
    """What was set aside."""

    folder: Path
    num_pairs: int
    max_pixels: int  # as they were checked


def source_name(raw: RawSample) -> str:
    return f"{raw.url.rpartition('/')[2]}/{raw.key}"


def draw_validation(folder: Path, shards: Sequence[str], split: Split, *, data: "DataConfig", group_by: str,
                    show: Callable[[int, int | None], None] = lambda done, total: None) -> Drawn:
    """Write the pairs that a split sets aside as shards; those drawn before are taken as they are.

    Each has one caption, drawn by its name and written as its .txt, and a json with its group and where it comes from. Pairs
    that training could not use are left out.

    Args:
      folder: Where to; `validation.json` in it says that it is whole.
      shards: All of the training data; each is read once.
      split: What is set aside.
      data: How captions are chosen and what is a bad sample.
      group_by: As in `make_example`.
      show: Told the samples read.

    Raises:
      ValueError: fewer than two pairs would be set aside, or all.
    """
    record = folder / RECORD
    if record.exists():
        return Drawn(folder, json.loads(record.read_text(encoding="utf-8"))["num_pairs"], data.max_pixels)
    read = 0
    with ShardWriter(folder, samples_per_shard=SAMPLES_PER_SHARD, name="{:06d}.tar") as writer:
        for read, raw in enumerate(_samples(shards, data), 1):
            if read % SHOWN_EVERY == 0:
                show(read, None)
            members = _members(raw, split, data, group_by) if split.holds_out(raw) else None
            if members:
                writer.write(members)
        if writer.num_samples < 2 or writer.num_samples == read:
            raise ValueError(f"train.validation_fraction={split.fraction:g} sets {writer.num_samples} of {read} pairs aside; "
                             "validation needs at least two, and training the rest: give another share, more data, or null")
    write_sizes(folder, writer.sizes)
    write_text(record, json.dumps({"num_pairs": writer.num_samples, "of": read, "fraction": split.fraction,
                                   "seed": split.seed}, indent=1) + "\n")
    return Drawn(folder, writer.num_samples, data.max_pixels)


def _samples(shards: Sequence[str], data: "DataConfig") -> Iterable[RawSample]:
    for shard in dict.fromkeys(shards):
        for item in read_shard(shard, allow_pipe=data.allow_pipe):
            if not isinstance(item, BadSample):
                yield item


def _members(raw: RawSample, split: Split, data: "DataConfig", group_by: str) -> dict[str, bytes] | None:
    """A pair as it is kept; None where it cannot be used."""
    try:
        fields = read_fields(raw, data.class_names)
        rng = random.Random(f"{split.seed}/{source_name(raw)}")
        caption = choose_caption(raw.text, fields, data.caption_fields, data.caption_weights, rng)
        group = group_id(group_by, caption, fields)
        if raw.image is None:
            return None
        decode_image(raw.image, max_pixels=data.max_pixels)
    except (SampleError, DecodeError):
        return None
    about = {"group_id": group, "source": source_name(raw)}
    return {raw.suffix: raw.image, "txt": caption.encode(), "json": json.dumps(about).encode()}
