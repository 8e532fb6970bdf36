"""A loopback server of shards that fails as object stores do, and what reading a shard from it gives."""

import http.server
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

from clipkit.data.remote import RemoteShards
from clipkit.data.tars import RawSample, read_numbered
from tests.conftest import write_tar

ALL = [f"a{i:03}" for i in range(60)]
Answer = Callable[["Handler", bytes, int], None]  # the handler, the file, the first byte asked for


class Handler(http.server.BaseHTTPRequestHandler):
    store: SimpleNamespace

    def log_message(self, format, *args):
        pass

    def do_GET(self):
        self.store.requests.append((self.path, self.headers.get("Range")))
        data = self.store.files.get(self.path)
        answer = self.store.answers.pop(0) if self.store.answers else whole
        if data is None:
            refuse(404)(self, b"", 0)
            return
        asked = (self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").rstrip("-")
        answer(self, data, int(asked))


def send(handler: Handler, status: int, data: bytes, length: int | None) -> None:
    handler.send_response(status)
    if length is not None:
        handler.send_header("Content-Length", str(length))
    handler.end_headers()
    handler.wfile.write(data)
    handler.wfile.flush()
    handler.close_connection = True


def whole(handler: Handler, data: bytes, start: int) -> None:
    send(handler, 206 if start else 200, data[start:], len(data) - start)


def from_the_start(handler: Handler, data: bytes, start: int) -> None:
    send(handler, 200, data, len(data))


def without_length(handler: Handler, data: bytes, start: int) -> None:
    send(handler, 200, data, None)


def refuse(status: int) -> Answer:
    return lambda handler, data, start: send(handler, status, b"no", 2)


def cut(share: float) -> Answer:
    return lambda handler, data, start: send(handler, 206 if start else 200, data[start:int(share * len(data))],
                                             len(data) - start)


def hang(handler: Handler, data: bytes, start: int) -> None:
    cut(0.3)(handler, data, start)
    handler.store.ended.wait(10)


@contextmanager
def shard_server() -> Iterator[SimpleNamespace]:
    """A server of files that answers the next requests as told, then as it should."""
    store = SimpleNamespace(files={}, requests=[], answers=[], ended=threading.Event(), url="")
    handler = type("OwnHandler", (Handler,), {"store": store})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        store.url = f"http://127.0.0.1:{server.server_port}"
        yield store
        store.ended.set()
        server.shutdown()


def add_shard(store, folder: Path, name: str = "a", count: int = 60) -> str:
    """Serve a shard of `count` samples of 4 kB; returns its URL."""
    members = [(f"{name}{i:03}.jpg", bytes([i]) * 4000) for i in range(count)]
    store.files[f"/{name}.tar"] = Path(write_tar(folder / f"{name}.tar", members)).read_bytes()
    return f"{store.url}/{name}.tar"


def keys(url: str, remote: RemoteShards) -> list[str]:
    """Keys of a shard's samples; of trouble with it, its cause and detail."""
    found = []
    for _, item in read_numbered(url, remote=remote):
        assert item is not None
        if isinstance(item, RawSample):
            number = int(item.key[1:])
            assert item.image == bytes([number]) * 4000
        found.append(item.key if isinstance(item, RawSample) else f"{item.cause}: {item.detail}")
    return found
