"""The emoji pack as WebDataset shards (png + json), unpacked once into the user's cache."""

import hashlib
import io
import json
import os
import shutil
import tarfile
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from clipkit.data.emoji.captions import emoji_captions
from clipkit.data.emoji.pack import SPLITS, EmojiRow, emoji_pictures, pack_fingerprint, read_emoji_rows

if TYPE_CHECKING:
    from PIL import Image

LAYOUT_VERSION = 1  # raise when shards of the same pack would be written otherwise
NUM_SHARDS = {"train": 16, "val": 1, "test_style": 2, "test_concept": 1}


def emoji_shards(split: str, cache_dir: str | Path | None = None) -> list[str]:
    """Return the shards of one split of the embedded emoji set, unpacking the set where the cache lacks it.

    Any number of processes may call this at once: each writes a folder of its own, the first to finish renames
    it into place. A folder whose files differ in size from its manifest is written anew.

    Args:
      split: "train", "val", "test_style" or "test_concept".
      cache_dir: folder for unpacked data; by default `default_cache_dir()`.

    Returns:
      Paths of the tars, in a fixed order.

    Raises:
      ValueError: the split does not exist.
      OSError: the cache cannot be written.
    """
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; choose one of {list(SPLITS)}")
    cache = Path(cache_dir).expanduser() if cache_dir else default_cache_dir()
    folder = cache / f"emoji-{LAYOUT_VERSION}-{pack_fingerprint()}"
    if not is_complete(folder):
        try:
            unpack(folder)
        except OSError as error:
            raise OSError(
                f"cannot unpack the emoji shards into {cache} ({error.strerror or error}); "
                "set data.cache_dir or CLIPKIT_CACHE to a folder that can be written (about 50 MB)"
            ) from error
    return [str(folder / shard_name(split, number)) for number in range(NUM_SHARDS[split])]


def default_cache_dir() -> Path:
    """Return the cache folder of this user: $CLIPKIT_CACHE, else $XDG_CACHE_HOME/clipkit, else ~/.cache/clipkit."""
    if given := os.environ.get("CLIPKIT_CACHE"):
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "clipkit"


def is_complete(folder: Path) -> bool:
    """Tell whether every shard that the manifest names is there with its size (hashes: `damaged_shards`)."""
    try:
        shards = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["shards"]
        return all((folder / name).stat().st_size == entry["bytes"] for name, entry in shards.items())
    except (OSError, ValueError, KeyError):
        return False


def damaged_shards(folder: str | Path) -> list[str]:
    """Name the shards of an unpacked folder whose sha256 differs from the manifest's; reads them all."""
    folder = Path(folder)
    shards = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["shards"]
    return [
        name
        for name, entry in shards.items()
        if hashlib.sha256((folder / name).read_bytes()).hexdigest() != entry["sha256"]
    ]


def unpack(folder: Path) -> None:
    """Write every split beside `folder` and rename the result into place, unless another process was first."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    workplace = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    damaged = Path(f"{workplace}-damaged")
    try:
        workplace.chmod(0o755)  # mkdtemp gives 0700; a cache may be shared
        write_shards(workplace)
        if folder.exists() and not is_complete(folder):
            os.replace(folder, damaged)
        try:
            os.replace(workplace, folder)
        except OSError:
            if not is_complete(folder):
                raise
    finally:
        shutil.rmtree(workplace, ignore_errors=True)
        shutil.rmtree(damaged, ignore_errors=True)


def write_shards(folder: Path) -> None:
    """Write the tars of all splits, `sizes.json` (samples each) and `manifest.json` (bytes, sha256) into `folder`."""
    samples = {(row.style, row.index): tar_members(row, picture) for row, picture in emoji_pictures(read_emoji_rows())}
    shards: dict[str, dict[str, int | str]] = {}
    for name, rows in deal_rows(read_emoji_rows()).items():
        with tarfile.open(folder / name, "w", format=tarfile.USTAR_FORMAT) as tar:
            for row in rows:
                for member, content in samples[row.style, row.index]:
                    header = tarfile.TarInfo(member)  # owner, mode and time are constants: the same bytes anywhere
                    header.size = len(content)
                    tar.addfile(header, io.BytesIO(content))
        content = (folder / name).read_bytes()
        shards[name] = {"samples": len(rows), "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    sizes = {name: entry["samples"] for name, entry in shards.items()}
    (folder / "sizes.json").write_text(json.dumps(sizes, indent=1), encoding="utf-8")
    (folder / "manifest.json").write_text(json.dumps({"shards": shards}, indent=1), encoding="utf-8")


def deal_rows(rows: list[EmojiRow]) -> dict[str, list[EmojiRow]]:
    """Deal the rows of each split to its shards in the order of a hash, so that a shard mixes styles and concepts."""
    shards: dict[str, list[EmojiRow]] = {}
    for split in SPLITS:
        shuffled = sorted((row for row in rows if row.split == split), key=hash_of_key)
        for number in range(NUM_SHARDS[split]):
            shards[shard_name(split, number)] = shuffled[number :: NUM_SHARDS[split]]
    return shards


def tar_members(row: EmojiRow, picture: "Image.Image") -> list[tuple[str, bytes]]:
    """Encode one sample: (member name, content) of its png and its json."""
    png = io.BytesIO()
    picture.save(png, "png", compress_level=1, compress_type=3)  # Z_RLE: faster and smaller here than the default
    fields = {
        **emoji_captions(row),
        "tags": list(row.tags),
        **{name: getattr(row, name) for name in ("group", "subgroup", "style", "concept", "split", "emoji", "license")},
    }
    text = json.dumps(fields, ensure_ascii=False).encode()
    return [(f"{sample_key(row)}.png", png.getvalue()), (f"{sample_key(row)}.json", text)]


def hash_of_key(row: EmojiRow) -> bytes:
    return hashlib.sha256(sample_key(row).encode()).digest()


def sample_key(row: EmojiRow) -> str:
    return f"{row.style}-{row.index:04d}"


def shard_name(split: str, number: int) -> str:
    return f"emoji-{split}-{number:03d}.tar"
