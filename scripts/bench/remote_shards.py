"""The training loader over shards from an HTTP and an S3 server on the loopback interface, against the local disk; its memory.

  uv pip install 'moto[server]' s3fs
  python -m scripts.bench.remote_shards --out docs/benchmarks/data_at_scale.json

One loader worker reads 256 px pictures out of 8 shards, in turn from each place. CPU seconds are those of loader and
worker, not of the servers; the clock counts the servers too, which share the machine's cores. "cached" is a second epoch
out of the disk cache. `--batches` is how many batches of 4 tiny samples the memory of 2 workers is watched over. Expected:
at least 0.9 of the local disk's samples a second.
"""

import argparse
import contextlib
import io
import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from clipkit.config.data import DataConfig
from clipkit.data.loader import TrainLoader, make_train_loader
from clipkit.data.samples import PictureExamples
from clipkit.data.write import ShardWriter
from scripts.bench.make_shards import NUM_SHARDS, make_shards
from scripts.bench.rounds import Figure, make_figure, save_figures, take_turns

PIXELS, IMAGE_SIZE, BATCH_SIZE = 256, 224, 64
TINY_BATCH_SIZE = 4
ROUNDS = 3
BUCKET = "shards"


def bench_throughput(out: Path | None, *, num_samples: int, servers: Sequence[str]) -> list[Figure]:
    """Read one epoch from each place in turn: samples a second by the clock, and CPU seconds a thousand samples."""
    figures = []
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as cleanup:
        local = make_shards(Path(scratch) / "shards", pixels=PIXELS, num=num_samples)
        places: dict[str, tuple[list[str], dict[str, Any]]] = {}
        if "http" in servers:
            urls = cleanup.enter_context(serve_http(local))
            places["http"] = urls, {}
            places["http, cached"] = urls, {"shard_cache_gb": 10, "cache_dir": f"{scratch}/cache"}
        if "s3" in servers:
            places["s3"] = cleanup.enter_context(serve_s3(local)), {}
        for name, (urls, settings) in places.items():
            cpu: dict[str, list[float]] = {"ours": [], "peer": []}

            def turn(arm: str, shards: list[str], cpu: dict[str, list[float]] = cpu, **settings: Any) -> float:
                speed, seconds = read_epoch(shards, num_samples, **settings)
                cpu[arm].append(1000 * seconds / num_samples)
                return speed

            speeds = take_turns({"ours": lambda turn=turn, urls=urls, settings=settings: turn("ours", urls, **settings),
                                 "peer": lambda turn=turn: turn("peer", local)}, rounds=ROUNDS)
            shared = {"peer_version": "local disk", "threads": 1, "samples": num_samples, "batch_size": BATCH_SIZE}
            figures += [make_figure("remote_shards", f"{name}, samples", speeds, unit="samples/s", more_is_better=True,
                                    **shared),
                        make_figure("remote_shards", f"{name}, CPU", list(zip(cpu["ours"][1:], cpu["peer"][1:], strict=True)),
                                    unit="CPU s / 1000 samples", **shared)]
            for figure in figures[-2:]:
                print(f"{figure.case}: {figure.ours:.2f}, local {figure.peer:.2f} {figure.unit}, "
                      f"ratio {figure.ratio_median:.2f} ({figure.ratio_min:.2f} to {figure.ratio_max:.2f})", flush=True)
            if out:
                save_figures(out, figures)
    return figures


def read_epoch(shards: list[str], num_samples: int, **settings: Any) -> tuple[float, float]:
    """Samples a second and CPU seconds of one pass with one worker, from its first batch on: without imports and forks."""
    loader = open_loader(shards, batch_size=BATCH_SIZE, image_size=IMAGE_SIZE, workers=1, **settings)
    next(loader)
    processes = [os.getpid(), *(child.pid or 0 for child in multiprocessing.active_children())]
    begin, cpu_begin = time.perf_counter(), sum(map(cpu_seconds, processes))
    num_batches = num_samples // BATCH_SIZE - 1
    for _ in range(num_batches):
        next(loader)
    seconds, cpu = time.perf_counter() - begin, sum(map(cpu_seconds, processes)) - cpu_begin
    loader.close()
    assert not loader.bad, loader.bad
    return num_batches * BATCH_SIZE / seconds, cpu


def cpu_seconds(process: int) -> float:
    """Of a process that runs, in user and system mode (Linux)."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def open_loader(shards: list[str], *, batch_size: int, image_size: int, workers: int, **changes: Any) -> TrainLoader:
    from omegaconf import OmegaConf

    from clipkit.config import parse
    from clipkit.config.command_line import conf_dir

    settings: Any = OmegaConf.to_container(OmegaConf.load(conf_dir() / "pretrain" / "data" / "shards.yaml"))
    data = parse(DataConfig, settings | {"train": shards, "workers": workers, "block_samples": 64,
                                         "lanes": NUM_SHARDS} | changes)
    return make_train_loader(data, shards=[shards], lanes=data.lanes or 1, seed=0, tokenize=first_bytes,
                             global_batch_size=batch_size,
                             examples=PictureExamples(data=data, image_size=image_size, group_by="none"))


def first_bytes(texts: list[str]) -> torch.Tensor:
    """A tokenizer that costs nothing."""
    return torch.tensor([list(text.encode()[:16].ljust(16, b"\0")) for text in texts], dtype=torch.int32)  # (N, 16)


@contextlib.contextmanager
def serve_http(shards: Sequence[str]) -> Iterator[list[str]]:
    """The URLs of shards on a server in a process of its own."""
    folder, port = Path(shards[0]).parent, free_port()
    with ended([sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1", "--directory", str(folder)], port):
        yield [f"http://127.0.0.1:{port}/{Path(shard).name}" for shard in shards]


@contextlib.contextmanager
def serve_s3(shards: Sequence[str]) -> Iterator[list[str]]:
    """The URLs of shards in a bucket of moto's S3 server; fsspec is told where it is, as a user would tell it."""
    from fsspec.config import conf

    port = free_port()
    with ended([sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)], port):
        conf["s3"] = {"endpoint_url": f"http://127.0.0.1:{port}", "key": "any", "secret": "any"}
        upload = multiprocessing.get_context("spawn").Process(target=put_shards, args=(conf["s3"], list(shards)))
        upload.start()  # in a process of its own: the loader's workers are forked from this one
        upload.join()
        yield [f"s3://{BUCKET}/{Path(shard).name}" for shard in shards]
        del conf["s3"]


def put_shards(options: dict[str, Any], shards: Sequence[str]) -> None:
    import fsspec

    filesystem = fsspec.filesystem("s3", **options)
    filesystem.mkdir(BUCKET)
    for shard in shards:
        filesystem.put(shard, f"{BUCKET}/{Path(shard).name}")


@contextlib.contextmanager
def ended(command: Sequence[str], port: int) -> Iterator[None]:
    """Run a server until the end of the block; begin when it takes connections."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(600):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                break
            time.sleep(0.1)
        yield
    finally:
        process.terminate()
        process.wait()


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def bench_memory(out: Path | None, *, num_batches: int) -> Figure:
    """Memory of the loader's main process and its 2 workers over many batches: at 10 % against at the end, MB."""
    with tempfile.TemporaryDirectory() as scratch:
        shards = make_tiny_shards(Path(scratch) / "tiny")
        loader = open_loader(shards, batch_size=TINY_BATCH_SIZE, image_size=8, workers=2, lanes=2)
        seen: dict[int, list[float]] = {}
        for done in range(1, num_batches + 1):
            next(loader)
            if 10 * done % num_batches == 0:
                workers = sorted(child.pid or 0 for child in multiprocessing.active_children())
                seen[100 * done // num_batches] = [resident_mb("self"), *map(resident_mb, workers)]
                print(f"{done:,} batches: " + ", ".join(f"{size:.1f}" for size in seen[100 * done // num_batches]) + " MB",
                      flush=True)
        loader.close()
    rounds = list(zip(seen[100], seen[10], strict=True))  # main, worker, worker
    figure = make_figure("remote_shards", "memory of the loader, 100 % against 10 %", rounds, unit="MB", threads=1,
                         peer_version="10 %", batches=num_batches, megabytes_by_percent=seen)
    if out:
        save_figures(out, [figure])
    return figure


def make_tiny_shards(folder: Path) -> list[str]:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (200, 10, 10)).save(file, "PNG")
    with ShardWriter(folder, samples_per_shard=500, name="{:03d}.tar") as writer:
        for number in range(500 * 2 * NUM_SHARDS):
            writer.write({"png": file.getvalue(), "txt": f"{number}".encode()})
    return [str(folder / name) for name in writer.sizes]


def resident_mb(process: int | str) -> float:
    """Resident memory without what is shared with other processes (Linux)."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{process}/status").read_text().splitlines() if ":" in line)
    return int(fields["RssAnon"].split()[0]) / 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--samples", type=int, default=2048)
    parser.add_argument("--servers", nargs="*", choices=("http", "s3"), default=["http", "s3"])
    parser.add_argument("--batches", type=int, default=100_000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.servers:
        bench_throughput(options.out, num_samples=options.samples, servers=options.servers)
    if options.batches:
        bench_memory(options.out, num_batches=options.batches)


if __name__ == "__main__":
    main()
