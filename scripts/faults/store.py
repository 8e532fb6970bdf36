"""What the runs read: shards made by seed, on disk or from a loopback server that fails as it is told."""

import contextlib
import functools
import http.server
import io
import itertools
import os
import random
import signal
import socket
import tarfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from scripts.faults.ranks import PR_SET_PDEATHSIG, libc

SHARDS, SAMPLES_PER_SHARD = 8, 24


class Trouble(NamedTuple):
    """What a server does to some of the requests that it gets."""

    kind: str  # "500", "403", "slow", "half"
    first: int  # request
    count: int


def write_shards(folder: Path) -> None:
    """Eight shards of coloured squares. PNG, whose checksums show a flipped bit; a caption's bytes have none."""
    from PIL import Image

    rng = random.Random(0)
    folder.mkdir(parents=True)
    for number in range(SHARDS):
        with tarfile.open(folder / f"{number:02d}.tar", "w") as tar:
            for index in range(SAMPLES_PER_SHARD):
                file = io.BytesIO()
                picture = Image.frombytes("RGB", (12, 12), rng.randbytes(3 * 144)).resize((36, 36))
                picture.save(file, "PNG")
                for suffix, data in (("png", file.getvalue()), ("txt", f"picture {index} of shard {number}".encode())):
                    header = tarfile.TarInfo(f"{number:02d}{index:03d}.{suffix}")
                    header.size = len(data)
                    tar.addfile(header, io.BytesIO(data))


def damage_shard(path: Path, rng: random.Random) -> str:
    """Flip bits in pictures or headers of a shard, or cut it; returns what was done."""
    data = bytearray(path.read_bytes())
    if rng.random() < 0.3:
        length = rng.randrange(1, len(data))
        path.write_bytes(data[:length])
        return f"{path.name} cut to {length} of {len(data)} bytes"
    with tarfile.open(path) as tar:
        members = tar.getmembers()
    places = [place for member in members for place in range(member.offset, member.offset + 512)]
    if rng.random() < 0.7:
        places = [place for member in members if member.name.endswith("png")
                  for place in range(member.offset_data, member.offset_data + member.size)]
    flipped = rng.sample(places, rng.choice([1, 16, 256]))
    for place in flipped:
        data[place] ^= 1 << rng.randrange(8)
    path.write_bytes(data)
    return f"{path.name}: {len(flipped)} bits flipped, the first at byte {flipped[0]}"


class _Handler(http.server.SimpleHTTPRequestHandler):
    def __init__(self, *arguments: Any, trouble: Trouble | None, numbers: Any, **named: Any) -> None:
        self.trouble, self.numbers = trouble, numbers
        super().__init__(*arguments, **named)

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):  # a client that was killed
            super().handle()

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        trouble, number = self.trouble, next(self.numbers)
        if trouble is None or not trouble.first <= number < trouble.first + trouble.count:
            super().do_GET()
        elif trouble.kind == "slow":
            time.sleep(2)
            super().do_GET()
        elif trouble.kind == "half":
            data = Path(self.translate_path(self.path)).read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[:len(data) // 2])
            self.close_connection = True
        else:
            self.send_error(int(trouble.kind))


class Server:
    """A server of a folder in a process of its own, always at one port: a run's settings hold its URL."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.pid = folder, 0
        self.socket = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"

    def start(self, trouble: Trouble | None) -> None:
        """Serve, in the place of what was served before."""
        self.stop()
        self.pid = os.fork()
        if self.pid == 0:
            libc().prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            handler = functools.partial(_Handler, directory=str(self.folder), trouble=trouble, numbers=itertools.count(1))
            server = http.server.ThreadingHTTPServer(self.socket.getsockname(), handler, bind_and_activate=False)
            server.socket.close()
            server.socket = self.socket
            server.serve_forever()

    def stop(self) -> None:
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            self.pid = 0
