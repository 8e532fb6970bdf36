"""A stand-in for the Hugging Face hub on the loopback interface: as much of its API as huggingface_hub asks for."""

import hashlib
import http.server
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

API = re.compile(r"/api/(datasets|models)/([^/]+/[^/]+)(?:/(revision|tree)/([^/?]+))?(?:\?.*)?$")
FILE = re.compile(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)$")


class HubServer:
    """Repositories, the requests that came, and which file breaks off once."""

    def __init__(self) -> None:
        self.files: dict[tuple[str, str], dict[str, bytes]] = {}  # (kind, repo id) -> path -> content
        self.commits: dict[tuple[str, str], str] = {}
        self.requests: list[tuple[str, str, str | None]] = []  # method, path, Range
        self.gated: set[str] = set()  # repo ids
        self.cut_once: dict[str, int] = {}  # end of a path -> bytes after which the connection breaks
        self.url = ""

    def add(self, kind: str, repo_id: str, folder: Path) -> str:
        """Publish a folder as a repository ("datasets" or "models"), or its next commit; returns the commit."""
        files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
        commit = hashlib.sha1(repr(files).encode()).hexdigest()
        self.files[kind, repo_id] = self.files[kind, f"{repo_id}@{commit}"] = files
        self.commits[kind, repo_id] = commit
        return commit

    def find(self, kind: str, repo_id: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        commit = self.commits.get((kind, repo_id), "") if revision == "main" else revision
        files = self.files.get((kind, f"{repo_id}@{commit}"))
        return (commit, files) if files is not None else None

    @property
    def downloads(self) -> list[str]:
        return [path.rpartition("/")[2] for method, path, _ in self.requests if method == "GET" and "/resolve/" in path]


class _Handler(http.server.BaseHTTPRequestHandler):
    hub: HubServer

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.hub.requests.append((self.command, self.path, self.headers.get("Range")))
        if api := API.match(self.path):
            self.answer_api(*api.groups())
        elif file := FILE.match(self.path):
            self.answer_file(*file.groups())
        else:
            self.refuse("RepoNotFound")

    def answer_api(self, kind: str, repo_id: str, what: str | None, revision: str | None) -> None:
        found = self.hub.find(kind, repo_id, revision or "main")
        if repo_id in self.hub.gated:
            self.refuse("GatedRepo", 403)
            return
        if found is None:
            self.refuse("RevisionNotFound" if (kind, repo_id) in self.hub.commits else "RepoNotFound")
            return
        commit, files = found
        tree = [{"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for path, data in files.items()]
        info = {"id": repo_id, "sha": commit, "private": False, "gated": False, "downloads": 0, "likes": 0, "tags": [],
                "siblings": [{"rfilename": path} for path in files]}
        self.send(200, json.dumps(tree if what == "tree" else info).encode(), {"Content-Type": "application/json"})

    def answer_file(self, dataset: str | None, repo_id: str, revision: str, path: str) -> None:
        found = self.hub.find("datasets" if dataset else "models", repo_id, revision)
        if found is None or path not in found[1]:
            self.refuse("RepoNotFound" if found is None else "EntryNotFound")
            return
        data = found[1][path]
        facts = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": found[0], "Accept-Ranges": "bytes"}
        start = int(re.sub(r"\D.*", "", (self.headers.get("Range") or "bytes=0").removeprefix("bytes=")))
        if start:
            facts["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        cut = self.hub.cut_once.pop(path, None) if self.command == "GET" else None
        self.send(206 if start else 200, data[start:], facts, cut)

    def refuse(self, code: str, status: int = 404) -> None:
        self.send(status, b"", {"X-Error-Code": code, "X-Error-Message": "not here"})

    def send(self, status: int, data: bytes, facts: dict[str, str], cut: int | None = None) -> None:
        self.send_response(status)
        for name, value in {**facts, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data[:cut])
        self.close_connection = cut is not None


@contextmanager
def hub_server() -> Iterator[HubServer]:
    """Serve a hub without repositories."""
    hub = HubServer()
    handler = type("Handler", (_Handler,), {"hub": hub})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        hub.url = f"http://127.0.0.1:{httpd.server_port}"
        yield hub
        httpd.shutdown()
