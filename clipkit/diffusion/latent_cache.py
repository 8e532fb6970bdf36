"""Latents in the place of pictures: each shard encoded once, into a shard with the same samples in the same order."""

import hashlib
import io
import json
import random
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import fsspec
import numpy as np
import torch
from torch import Tensor

from clipkit.data.emoji.shards import default_cache_dir
from clipkit.data.remote import remote_shards
from clipkit.data.samples import Example, PictureExamples, SampleError, choose_caption, read_fields
from clipkit.data.tars import BadSample, DataError, RawSample, read_shard
from clipkit.diffusion.autoencoder import CONFIG_NAME, WEIGHTS_NAME, autoencoder_folder, to_pixel_values
from clipkit.model.build import file_sha256
from clipkit.training.atomic_files import fsync_file, one_line_os_error, remove_quietly, write_text_atomically

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    from clipkit.config.data import AugmentConfig, DataConfig

LAYOUT_VERSION = 1  # raise when the same latents would be written otherwise
BATCH_SIZE = 64  # pictures encoded at once


@dataclass(frozen=True, kw_only=True)
class LatentExamples:
    """Examples of cached latents: (2C, h, w) fp32, the mean and the standard deviation of a picture's distribution."""

    data: "DataConfig"
    channels: int  # C of a latent
    side: int  # cells
    dtype = torch.float32
    reads_npy = True

    @property
    def shape(self) -> tuple[int, ...]:
        return 2 * self.channels, self.side, self.side

    def __call__(self, raw: RawSample, rng: random.Random) -> Example | BadSample:
        """Read a sample; its caption is drawn first, then whether it is flipped, as for pictures."""
        try:
            fields = read_fields(raw, self.data.class_names)
            caption = choose_caption(raw.text, fields, self.data.caption_fields, self.data.caption_weights, rng)
            views = self._views(raw)  # (V, 2C, h, w)
        except SampleError as error:
            return BadSample(error.cause, raw.url, raw.key, error.detail)
        return Example(views[1 if len(views) > 1 and rng.random() < self.data.augment.flip else 0], caption, 0)

    def _views(self, raw: RawSample) -> Tensor:
        try:
            views = np.load(io.BytesIO(raw.multi_hot or b""), allow_pickle=False)
        except (ValueError, EOFError, OSError) as error:
            raise SampleError("bad latents", f"{error}; remove the cache's folder {Path(raw.url).parent}") from error
        if views.shape[1:] != self.shape or views.dtype != np.float32 or not np.isfinite(views).all():
            raise SampleError("bad latents", f"{views.dtype} {views.shape}; remove the cache's folder {Path(raw.url).parent}")
        return torch.from_numpy(views)


def cached_latents(shards: Sequence[str], autoencoder: "AutoencoderKL", *, source: str, data: "DataConfig", image_size: int,
                   rank: int = 0, world_size: int = 1, show: Callable[[int, int], None] | None = None) -> list[str]:
    """Return shards of latents, encoding those that the cache lacks. Every rank encodes its share; wait for all before reading.

    Args:
      shards: of pictures.
      autoencoder: on its device.
      source: where it was loaded from; with its weights, the latents are of it alone.
      data: cache_dir, decode, max_pixels, allow_pipe, max_bad_fraction and augment.flip are read.
      image_size: pixels a side of the middle square that is encoded.
      rank, world_size: of this process.
      show: told how many of this rank's shards are done, and how many there are.

    Raises:
      ValueError: the pictures are augmented in ways that a cache cannot follow, or too many of them are bad.
      OSError: the cache cannot be written.
    """
    check_cacheable(data.augment)
    folder = cache_folder(shards, source=source, data=data, image_size=image_size)
    places = [folder / f"{number:06d}.tar" for number in range(len(shards))]
    own = list(zip(shards, places, strict=True))[rank::world_size]
    for done, (shard, place) in enumerate(own):
        if not _is_whole(place):
            try:
                _encode_shard(shard, place, autoencoder, data=data, image_size=image_size)
            except OSError as error:
                raise one_line_os_error(error, folder, "; set data.cache_dir, or cache_latents=false") from error
        if show:
            show(done + 1, len(own))
    return [str(place) for place in places]


def check_cacheable(augment: "AugmentConfig") -> None:
    """Raise ValueError if pictures are changed anew each time they are seen, other than by a flip."""
    still = {"flip", "keep_white", "crop_ratio", "colour_jitter_probability"}  # the last three change nothing by themselves
    moving = [f"data.augment.{name}" for name, value in asdict(augment).items()
              if name not in still and value not in (0, (1.0, 1.0), (0.0,) * 4)]
    if moving:
        raise ValueError(f"{', '.join(moving)} change a picture each time it is seen, and cached latents are encoded once; set "
                         "cache_latents=false, or leave only data.augment.flip")


def cache_folder(shards: Sequence[str], *, source: str, data: "DataConfig", image_size: int) -> Path:
    """Name the folder of these latents by all that they depend on: the weights, and what the shards' stores say of them."""
    folder = autoencoder_folder(source)
    facts = {"layout": LAYOUT_VERSION, "config": json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8")),
             "weights": file_sha256(folder / WEIGHTS_NAME), "image_size": image_size, "decode": data.decode,
             "max_pixels": data.max_pixels, "flipped": data.augment.flip > 0, "shards": [_identify(shard) for shard in shards]}
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:20]
    cache = Path(data.cache_dir).expanduser() if data.cache_dir else default_cache_dir()
    return cache / f"latents-{key}"


def bad_pictures(latents: Sequence[str]) -> Counter[str]:
    """Count, by cause, the pictures that could not be encoded."""
    return sum((Counter(_facts(Path(place))["bad"]) for place in latents), Counter())


def _identify(shard: str) -> list[str]:
    if shard.startswith("pipe:"):
        raise ValueError("cached latents are kept by what their shards' store says of them, and of a pipe: nothing is known; "
                         "set cache_latents=false")
    filesystem, path = fsspec.url_to_fs(shard)
    return [shard, str(filesystem.ukey(path))]


def _is_whole(place: Path) -> bool:
    try:
        return place.stat().st_size == _facts(place)["bytes"]
    except (OSError, ValueError, KeyError):
        return False


def _facts(place: Path) -> dict[str, Any]:
    return json.loads(place.with_suffix(".json").read_text(encoding="utf-8"))


def _encode_shard(shard: str, place: Path, autoencoder: "AutoencoderKL", *, data: "DataConfig", image_size: int) -> None:
    """Write the latents of one shard; it is whole once its .json is there."""
    place.parent.mkdir(parents=True, exist_ok=True)
    hidden = place.with_name(f".{place.name}.{uuid4().hex}")  # two runs may write at once
    bad: Counter[str] = Counter()
    count = 0
    try:
        with tarfile.open(hidden, "w", format=tarfile.PAX_FORMAT) as tar:
            for samples in _batches(shard, data, image_size, bad):
                pixels = torch.stack([image for _, image in samples])  # (B, 3, H, W) uint8
                views = [pixels, pixels.flip(3)] if data.augment.flip else [pixels]
                moments = torch.stack([_moments(autoencoder, view) for view in views], dim=1)  # (B, V, 2C, h, w)
                for (raw, _), one in zip(samples, moments.numpy(), strict=True):
                    _add_sample(tar, f"{count:09d}", raw, one)
                    count += 1
        _check_bad(shard, count, bad, data.max_bad_fraction)
        fsync_file(hidden)
        size = hidden.stat().st_size
        hidden.replace(place)
        write_text_atomically(place.with_suffix(".json"), json.dumps({"samples": count, "bytes": size, "bad": bad}))
    finally:
        remove_quietly(hidden)


def _batches(shard: str, data: "DataConfig", image_size: int, bad: Counter[str]) -> Iterator[list[tuple[RawSample, Tensor]]]:
    """The samples of a shard with their pictures (3, H, W) uint8, not flipped; the bad ones are counted."""
    still = replace(data, augment=replace(data.augment, flip=0.0))
    pictures = PictureExamples(data=still, image_size=image_size, group_by="none")
    batch: list[tuple[RawSample, Tensor]] = []
    for raw in read_shard(shard, allow_pipe=data.allow_pipe, remote=remote_shards(data)):
        example = pictures(raw, random.Random(0)) if isinstance(raw, RawSample) else raw
        if isinstance(example, Example):
            assert isinstance(raw, RawSample)
            batch.append((raw, example.image))
        else:
            bad[example.cause] += 1
        if len(batch) == BATCH_SIZE:
            yield batch
            batch = []
    if batch:
        yield batch


@torch.no_grad()
def _moments(autoencoder: "AutoencoderKL", images: Tensor) -> Tensor:
    """Mean and standard deviation (B, 2C, h, w), fp32, of the latents of pictures (B, 3, H, W) uint8."""
    latents = autoencoder.encode(to_pixel_values(images.to(autoencoder.device))).latent_dist  # pyright: ignore
    return torch.cat([latents.mean, latents.std], dim=1).float().cpu()


def _add_sample(tar: tarfile.TarFile, key: str, raw: RawSample, moments: np.ndarray) -> None:
    array = io.BytesIO()
    np.save(array, moments, allow_pickle=False)
    for suffix, content in (("npy", array.getvalue()), ("txt", raw.text), ("json", raw.json)):
        if content is not None:
            member = tarfile.TarInfo(f"{key}.{suffix}")  # time 0, no owner: the same bytes each time
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def _check_bad(shard: str, good: int, bad: Counter[str], allowed: float) -> None:
    seen = good + bad.total()
    if not good or bad.total() > max(allowed * seen, 1):
        causes = ", ".join(f"{count} {cause}" for cause, count in bad.most_common()) or "it is empty"
        raise DataError(f"{bad.total()} of {seen} samples of {shard} have no latents ({causes}), allowed are {allowed:.0%} "
                        "(data.max_bad_fraction); look with: clipkit shards check data=<shards>")
