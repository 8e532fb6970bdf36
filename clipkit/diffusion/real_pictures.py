"""Real pictures that generated ones are compared with: what a model was trained on, and others."""

from collections.abc import Sequence
from pathlib import Path

import yaml

from clipkit.data.emoji.pack import EmojiRow, read_emoji_rows
from clipkit.data.emoji.shards import emoji_shards, sample_key
from clipkit.data.shards import expand_shards
from clipkit.data.sources import EMOJI
from clipkit.data.tars import RawSample, is_local
from clipkit.evaluation.image_sets import RETRIEVAL, ImageSet, ShardImages, Target, pictures_in
from clipkit.evaluation.tasks import EMOJI_SPLITS, Task


def trained_on(source: str) -> tuple[str, ...]:
    """What `data.train` of a run says.

    Raises:
      ValueError: there is no run that says it.
    """
    settings = Path(source).expanduser() / "config.yaml"
    train = yaml.safe_load(settings.read_text(encoding="utf-8")).get("data", {}).get("train") if settings.is_file() else None
    if not train:
        raise ValueError(f"real is empty, and {source} is no run that says what it was trained on; give real=emoji, or the "
                         "shards or the folder of the training pictures")
    return tuple([train] if isinstance(train, str) else train)


def open_pictures(given: Sequence[str], *, cache_dir: str | None = None) -> Task:
    """Open pictures without asking what is on them.

    Args:
      given: "emoji" (its train split), "emoji_val" and the other emoji tasks, shard patterns; or a folder of pictures.
      cache_dir: where the emoji set is unpacked; None = the user's cache.

    Raises:
      FileNotFoundError: there is nothing.
      ValueError: the folder has no picture, or there are more places than one and a folder among them.
    """
    name = ", ".join(given)
    folders = [place for place in given if is_local(place) and Path(place).expanduser().is_dir()
               and not any(Path(place).expanduser().glob("*.tar"))]
    if not folders:
        shards = [shard for place in given for shard in _shards(place, cache_dir)]
        return _task(name, ShardImages(tuple(shards), _no_target, "pictures"))
    if len(given) > 1:
        raise ValueError(f"real is {name}, of which {folders[0]} is a folder of pictures; give that alone, or shards (clipkit "
                         "shards write makes them)")
    return _task(name, pictures_in(given[0]))


def emoji_rows_of(keys: Sequence[str]) -> list[EmojiRow | None]:
    """What is known of the emoji among some samples, by their keys; None for other samples."""
    rows = {sample_key(row): row for row in read_emoji_rows()}
    return [rows.get(key.rpartition("/")[2]) if key.startswith("emoji-") else None for key in keys]


def _no_target(raw: RawSample) -> Target:
    return Target()


def places_of(wanted: Sequence[str], keys: Sequence[str]) -> list[int] | None:
    """Find samples by the last part of their keys; None where one is missing."""
    place_of = {key.rpartition("/")[2]: place for place, key in enumerate(keys)}
    return [place_of[key] for key in wanted] if place_of.keys() >= set(wanted) else None


def _task(name: str, images: ImageSet) -> Task:
    return Task(name, "all", RETRIEVAL, images)


def _shards(place: str, cache_dir: str | None) -> list[str]:
    if place == EMOJI or place in EMOJI_SPLITS:
        return emoji_shards("train" if place == EMOJI else EMOJI_SPLITS[place], cache_dir)
    path = Path(place).expanduser()
    return expand_shards([f"{path}/*.tar" if is_local(place) and path.is_dir() else place])
