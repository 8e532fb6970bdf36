"""Samples per CPU second of clipkit's loader and of open_clip_train's, over the same shards.

  python -m scripts.bench.loader --peer-python .venv-open-clip/bin/python --out loader.json

JPEG and caption to batches of 64 at 224 px with open_clip's augmentation (a crop of 0.9 to 1 of the area), each in one
process without workers. Before a time is taken the same pictures and crop boxes go through both, and the same captions:
pixels are equal to 60 dB (Pillow rounds otherwise in the resize), ids exactly.

Expected on AVX2 cores: 4.2 to 4.6, 3.5 and 3.1 to 3.6 times as many at 256, 512 and 1024 px; 70 to 78 % of our time at 512 px
and above is in libjpeg-turbo, which the peer calls, too.
"""

import argparse
import math
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from scripts.bench.rounds import ROUNDS, Arm, Figure, Stopwatch, answer, make_figure, save_figures, take_turns

MODEL = "ViT-B-32"
IMAGE_SIZE = 224
BATCH_SIZE = 64
# Shorter side, pixels: pictures in the shards. The peer drops what is left of a worker's pass over its share of them, and
# never ends where that is less than a batch.
PICTURES = {256: 256, 512: 128, 1024: 128}
BATCHES = {256: 6, 512: 4, 1024: 2}  # of a turn: about two seconds of the peer's
NUM_COMPARED = 8  # pictures a size
MIN_PSNR = 60.0
WORKERS = 2
AHEAD = 4 * WORKERS  # batches that workers may have prepared while the other arm had its turn


def bench(peer_python: Path, out: Path | None, *, quick: bool, rounds: int = ROUNDS,
          shards: Path | None = None) -> list[Figure]:
    """Measure both loaders at each size.

    Args:
      peer_python: of an environment with open_clip_torch 3.3 and webdataset 0.2.86.
      out: JSON file of figures to add to.
      quick: leave out the turns with worker processes.
      rounds: of turns.
      shards: folder that keeps the shards. None = a temporary one.
    """
    from scripts.bench.make_shards import digest, make_shards

    figures = []
    with (tempfile.TemporaryDirectory() as temporary,
          Arm([sys.executable, "-m", "scripts.bench.loader", "--arm"], threads=1) as ours,
          Arm([peer_python, "-m", "scripts.bench.peer_loader"], threads=1) as peer):
        arms = {"ours": ours, "peer": peer}
        versions = {name: arm.ask(task="versions") for name, arm in arms.items()}
        for pixels, num in PICTURES.items():
            paths = make_shards((shards or Path(temporary)) / f"{pixels}px", pixels=pixels, num=num)
            notes = {"equal": compare(arms, paths, Path(temporary)), "md5": digest(paths), "versions": versions,
                     "kib_per_picture": sum(Path(path).stat().st_size for path in paths) / num / 1024}
            turns, notes["by_the_clock"] = race(arms, paths, BATCHES[pixels], rounds=rounds)
            if not quick:
                _, by_the_clock = race(arms, paths, 4 * BATCHES[pixels], rounds=rounds, workers=WORKERS)
                notes[f"by_the_clock_{WORKERS}_workers"] = by_the_clock
            figures.append(make_figure("loader", f"{pixels} px", turns, unit="samples per CPU second", threads=1,
                                       peer_version=f"open_clip_train {versions['peer']['open_clip_torch']}",
                                       more_is_better=True, **notes))
            print(describe(figures[-1]), flush=True)
    if out:
        save_figures(out, figures)
    return figures


def describe(figure: Figure) -> str:
    return (f"{figure.bench}, {figure.case} ({figure.notes['kib_per_picture']:.0f} KiB): {figure.ours:.0f} {figure.unit}, "
            f"{figure.peer_version} {figure.peer:.0f}: {figure.ratio_median:.2f} "
            f"[{figure.ratio_min:.2f}, {figure.ratio_max:.2f}] times; PSNR {figure.notes['equal']['psnr_db']:.1f} dB")


def race(arms: dict[str, Arm], shards: list[str], num_batches: int, *, rounds: int,
         workers: int = 0) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
    """Let both loaders read in turn; (ours, peer) of each round in samples per CPU second and per second by the clock."""
    by_the_clock = []

    def turn(name: str) -> float:
        read = arms[name].ask(task="read", num_batches=num_batches, skip=AHEAD if workers else 0)
        by_the_clock.append((name, read["samples"] / read["seconds"]))
        return read["samples"] / read["cpu_seconds"]

    shapes = [arm.ask(task="open", shards=shards, batch_size=BATCH_SIZE, workers=workers) for arm in arms.values()]
    if shapes[0] != shapes[1]:
        raise ValueError(f"batches have shapes {shapes[0]} and {shapes[1]}; they must be alike to be compared")
    turns = take_turns({name: lambda name=name: turn(name) for name in arms}, rounds=rounds)
    found = {name: [rate for arm, rate in by_the_clock if arm == name][1:] for name in arms}
    return turns, list(zip(found["ours"], found["peer"], strict=True))


def compare(arms: dict[str, Arm], shards: list[str], folder: Path) -> dict[str, Any]:
    """Give both arms the same pictures, crop boxes and captions.

    Raises:
      ValueError: pixels differ by more than MIN_PSNR says, or ids at all.
    """
    from clipkit.data.tars import RawSample, read_shard

    samples = [sample for sample in read_shard(shards[0]) if isinstance(sample, RawSample)][:NUM_COMPARED]
    gaps = []
    for number, sample in enumerate(samples):
        picture, pixels = folder / "picture.jpg", {name: str(folder / f"{name}.npy") for name in arms}
        picture.write_bytes(sample.image or b"")
        box = arms["peer"].ask(task="crop", picture=str(picture), seed=number, out=pixels["peer"])["box"]
        arms["ours"].ask(task="crop", picture=str(picture), box=box, out=pixels["ours"])
        ours, peer = (np.load(pixels[name]).astype(np.float64) for name in ("ours", "peer"))  # (H, W, 3)
        gaps.append(ours - peer)
    error, psnr = np.abs(gaps).mean(), 20 * math.log10(255) - 10 * math.log10(max(np.square(gaps).mean(), 1e-9))
    texts = [(sample.text or b"").decode() for shard in shards for sample in read_shard(shard) if isinstance(sample, RawSample)]
    ids = [arm.ask(task="tokenize", texts=texts)["tokens"] for arm in arms.values()]
    if psnr < MIN_PSNR or ids[0] != ids[1]:
        raise ValueError(f"pixels are equal to {psnr:.1f} dB (at least {MIN_PSNR} is needed), ids are "
                         f"{'' if ids[0] == ids[1] else 'not '}equal: the times are not comparable")
    return {"pictures": len(gaps), "mean_absolute_levels": error, "psnr_db": psnr, "captions": len(texts)}


def open_loader(shards: list[str], batch_size: int, workers: int) -> Iterator[Any]:
    """clipkit's endless loader, with the settings of data=shards."""
    from omegaconf import OmegaConf

    from clipkit.config import parse
    from clipkit.config.command_line import conf_dir
    from clipkit.config.data import DataConfig
    from clipkit.data.lanes import default_lanes
    from clipkit.data.loader import make_train_loader
    from clipkit.data.samples import PictureExamples
    from clipkit.data.tokenize import make_tokenizer

    settings: Any = OmegaConf.to_container(OmegaConf.load(conf_dir() / "pretrain" / "data" / "shards.yaml"))
    data = parse(DataConfig, settings | {"train": shards, "workers": workers})
    return make_train_loader(data, shards=[shards], lanes=default_lanes(len(shards)), seed=0,
                             tokenize=make_tokenizer({}), global_batch_size=batch_size,
                             examples=PictureExamples(data=data, image_size=IMAGE_SIZE, group_by="none"))


def crop(picture: str, box: Sequence[int], out: str) -> dict[str, Any]:
    from clipkit.data.decode import crop_and_resize, decode_image

    pixels = decode_image(Path(picture).read_bytes(), max_pixels=10**9)  # (H, W, 3)
    top, left, height, width = box
    np.save(out, crop_and_resize(pixels, (top, left, height, width), IMAGE_SIZE).permute(1, 2, 0).numpy())
    return {}


def tokenize(texts: list[str]) -> dict[str, Any]:
    from clipkit.data.tokenize import make_tokenizer

    return {"tokens": make_tokenizer({})(texts).tolist()}


def serve(open_loader: Callable[..., Iterator[Any]], *, packages: Sequence[str],
          **tasks: Callable[..., dict[str, Any]]) -> None:
    """Be an arm that opens a loader, reads batches of it, and does the further tasks by name."""
    current: list[Iterator[Any]] = []

    def read(num_batches: int, skip: int) -> dict[str, Any]:
        for _ in range(skip):
            next(current[0])
        with Stopwatch() as watch:
            samples = sum(len(next(current[0])[0]) for _ in range(num_batches))
        return {"samples": samples, "seconds": watch.seconds, "cpu_seconds": watch.cpu_seconds}

    def open_one(**request: Any) -> dict[str, Any]:
        current[:] = [open_loader(**request)]
        images, tokens = next(current[0])[:2]
        return {"images": list(images.shape), "tokens": list(tokens.shape)}

    known = {"read": read, "open": open_one, "versions": lambda: {name: version(name) for name in packages}, **tasks}
    answer(lambda task, **request: known[task](**request))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", type=Path, default=Path(".venv-open-clip/bin/python"))
    parser.add_argument("--out", type=Path, help="JSON file of figures to add to")
    parser.add_argument("--shards", type=Path, help="folder that keeps the shards; else they are temporary")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--workers", action="store_true", help=f"measure with {WORKERS} worker processes, too, by the clock")
    parser.add_argument("--arm", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.arm:
        serve(open_loader, crop=crop, tokenize=tokenize, packages=("torch", "torchvision", "simplejpeg", "webdataset"))
    else:
        bench(options.peer_python, options.out, quick=not options.workers, rounds=options.rounds, shards=options.shards)


if __name__ == "__main__":
    main()
