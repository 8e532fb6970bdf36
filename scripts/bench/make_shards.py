"""Write the shards that the benchmarks read: pictures and captions made by seed, as costly as those of the web.

  python -m scripts.bench.make_shards /tmp/shards --pixels 512 --num 256

A picture is shapes with hard edges on noise whose contrast falls with its frequency as in photographs, and a little fine
noise; as JPEG (quality 90, 4:2:0) it has about 27 KiB at 256 px, 79 at 512 and 241 at 1024 (shorter side). Captions are of
English words in three mixes of lengths. The same arguments and versions give the same bytes; the MD5 of all is printed.
"""

import argparse
import hashlib
import io
import random
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from clipkit.data.write import ShardWriter

NUM_SHARDS = 8
JPEG_QUALITY = 90
SIDE_RATIOS = (3 / 4, 2 / 3, 1.0, 4 / 3, 4 / 3, 3 / 2)  # width / height
SHAPES = 24
COARSEST, FALL = 50.0, 0.67  # grey levels of the lowest of the noise's octaves; each next one has this share of it
FINE_NOISE = 1.5  # standard deviation, grey levels
ALT_TEXT_LOG_MEAN, ALT_TEXT_LOG_DEVIATION = 2.57, 0.525  # of a log-normal: mean 15, 95th percentile 31 tokens
LONG_MEAN, LONG_DEVIATION = 61, 10
CONTEXT_LENGTH = 77
MIXES = ("alt-text", "long", "full")
ODD_WORDS = ("café", "naïve", "—", "Zürich", "&amp;", "®", "it\u2019s", "東京", "£50")  # what cleaning must look at
ODD_SHARE = 1 / 16  # of the captions


def make_shards(folder: Path, *, pixels: int, num: int, captions: str = "alt-text", seed: int = 0) -> list[str]:
    """Write `num` pictures with captions as NUM_SHARDS shards.

    Args:
      folder: where the shards go; made where missing.
      pixels: shorter side.
      num: of pictures.
      captions: a mix of make_captions.
      seed: of pictures and captions.

    Returns:
      The paths of the shards.
    """
    texts = make_captions(captions, num, seed)
    with ShardWriter(folder, samples_per_shard=-(-num // NUM_SHARDS), name="{:03d}.tar") as writer:
        for number, text in enumerate(texts):
            writer.write({"jpg": make_jpeg(pixels, np.random.default_rng((seed, number))), "txt": text.encode()})
    return [str(folder / name) for name in writer.sizes]


def make_jpeg(pixels: int, rng: np.random.Generator) -> bytes:
    """Make one picture of the given shorter side."""
    ratio = rng.choice(SIDE_RATIOS)
    width, height = round(pixels * max(1, ratio)), round(pixels * max(1, 1 / ratio))
    image = Image.new("RGB", (width, height), tuple(rng.integers(60, 200, 3).tolist()))
    draw = ImageDraw.Draw(image)
    for _ in range(SHAPES):
        x, y = rng.uniform(0, width), rng.uniform(0, height)
        corners = [(x + dx, y + dy) for dx, dy in rng.normal(0, pixels / 5, (rng.integers(3, 7), 2))]
        draw.polygon(corners, fill=tuple(rng.integers(0, 256, 3).tolist()))
    levels = np.asarray(image, np.float32) / 2 + 64  # (H, W, 3)
    level, side = COARSEST, 4
    while side < pixels:
        grey = rng.normal(0, level, (side * height // pixels, side * width // pixels)).astype(np.float32)
        levels += np.asarray(Image.fromarray(grey).resize((width, height), Image.Resampling.BILINEAR))[:, :, None]
        level, side = level * FALL, side * 2
    levels += rng.normal(0, FINE_NOISE, levels.shape)
    file = io.BytesIO()
    Image.fromarray(levels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=JPEG_QUALITY, subsampling="4:2:0")
    return file.getvalue()


def make_captions(mix: str, num: int, seed: int = 0) -> list[str]:
    """Make captions with a mix of lengths, counted in CLIP's tokens with start and end.

    Args:
      mix: "alt-text" (mean 15, 95th percentile 31, at most 77), "long" (mean 60) or "full" (all 77).
      num: of captions.
      seed: of lengths and words.

    Raises:
      ValueError: there is no such mix.
    """
    if mix not in MIXES:
        raise ValueError(f"the mix of captions is {mix!r}; choose one of {list(MIXES)}")
    rng = random.Random(f"{mix}/{seed}")
    words, lengths = _words()
    short = [word for word, length in zip(words, lengths, strict=True) if length == 1]
    captions = []
    for _ in range(num):
        chosen, left = [], _draw_length(mix, rng) - 2
        if mix == "alt-text" and rng.random() < ODD_SHARE:
            chosen.append(rng.choice(ODD_WORDS))
            left -= 1
        while left > 0:
            place = rng.randrange(len(words))
            word, length = (words[place], lengths[place]) if lengths[place] <= left else (rng.choice(short), 1)
            chosen.append(word)
            left -= length
        captions.append(" ".join(chosen))
    return captions


def _draw_length(mix: str, rng: random.Random) -> int:
    if mix == "full":
        return CONTEXT_LENGTH
    drawn = rng.gauss(LONG_MEAN, LONG_DEVIATION) if mix == "long" else rng.lognormvariate(ALT_TEXT_LOG_MEAN,
                                                                                         ALT_TEXT_LOG_DEVIATION)
    return min(CONTEXT_LENGTH, max(3, round(drawn)))


def _words() -> tuple[list[str], list[int]]:
    """Words of ImageNet's class names and OpenAI's templates, capitalised and with commas too; tokens of each."""
    import open_clip
    from open_clip.tokenizer import SimpleTokenizer

    texts = [*open_clip.IMAGENET_CLASSNAMES, *(write("") for write in open_clip.OPENAI_IMAGENET_TEMPLATES * 4)]
    plain = [word for text in texts for word in text.replace(".", " ").split()]
    words = [word.capitalize() if number % 5 == 0 else word + "," if number % 9 == 0 else word
             for number, word in enumerate(plain)]
    encode = SimpleTokenizer().encode
    return words, [len(encode(word)) for word in words]


def digest(shards: list[str]) -> str:
    """MD5 of the shards' bytes, one after the other."""
    found = hashlib.md5(usedforsecurity=False)
    for shard in shards:
        found.update(Path(shard).read_bytes())
    return found.hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pixels", type=int, default=512, help="shorter side")
    parser.add_argument("--num", type=int, default=256, help="pictures")
    parser.add_argument("--captions", choices=MIXES, default="alt-text")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    shards = make_shards(options.folder, pixels=options.pixels, num=options.num, captions=options.captions, seed=options.seed)
    size = sum(Path(shard).stat().st_size for shard in shards)
    print(f"{options.num} pictures, {size / options.num / 1024:.1f} KiB each, {len(shards)} shards, MD5 {digest(shards)}")


if __name__ == "__main__":
    main()
