"""Which shards there are: patterns to paths and URLs, and how many samples they hold. How one is read: tars.py."""

import glob
import json
import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import fsspec

from clipkit.data.tars import (
    BadSample,
    DataError,
    RawSample,
    is_local,
    open_shard,
    read_numbered,
    read_shard,
    refuse_pipe,
)

__all__ = ["BadSample", "DataError", "RawSample", "count_samples", "expand_shards", "open_shard", "read_shard"]

TABLE_SUFFIXES = (".csv", ".tsv", ".parquet")
COUNTS_FILE = "shard_counts.json"


def expand_shards(patterns: Sequence[str], *, allow_pipe: bool = False) -> list[str]:
    """Turn shard patterns into the shards that they mean.

    Args:
      patterns: paths or fsspec URLs; each may hold braces (`{000..003}`, `{a,b}`), `*`, `?` and `[...]`, or start with
        `~`. A file whose name itself holds such characters is found too.
      allow_pipe: whether `pipe:` commands may stand among them.

    Returns:
      Paths and URLs, in the order given; those of one glob sorted.

    Raises:
      FileNotFoundError: a file is missing, or nothing matches a glob.
      ValueError: no pattern, `pipe:` without allow_pipe, a folder or a table in place of shards, bad braces, or an
        unknown protocol.
    """
    if isinstance(patterns, str) or not patterns or not all(patterns):
        raise ValueError(f"shards are {patterns!r}; give a list of tar files, such as ['data/{{000..099}}.tar']")
    return [shard for pattern in patterns for shard in _expand(pattern, allow_pipe)]


def _expand(pattern: str, allow_pipe: bool) -> list[str]:
    if pattern.startswith("pipe:"):
        if not allow_pipe:
            raise ValueError(refuse_pipe(pattern))
        return [pattern]  # braces and stars are the shell's
    if is_local(_without_scheme(pattern)):
        pattern = os.path.expanduser(_without_scheme(pattern))
        if os.path.exists(pattern):
            return [_checked_path(pattern)]
        escaped = pattern.replace("\\", "\\\\")  # braceexpand takes a backslash for an escape
        return [shard for name in _braces(escaped) for shard in _local_shards(name)]
    names = _braces(pattern)
    shards = [shard for name in names for shard in _remote_shards(name)]
    if not any(map(_is_remote_glob, names)):
        _check_remote(shards[0], pattern)  # of many, one request: the first
    return shards


def _braces(pattern: str) -> list[str]:
    from braceexpand import braceexpand

    try:
        return list(braceexpand(pattern))
    except ValueError as error:
        raise ValueError(f"braces in {pattern!r} do not close; write for instance data/{{000..099}}.tar") from error


def _without_scheme(pattern: str) -> str:
    for scheme in ("file://", "local://"):
        if pattern.startswith(scheme):
            return pattern.removeprefix(scheme)
    return pattern


def _local_shards(name: str) -> list[str]:
    if glob.has_magic(name) and not os.path.exists(name):
        shards = sorted(glob.glob(name, recursive=True))
        if not shards:
            raise FileNotFoundError(f"no shard matches {name!r} (looked in {os.path.abspath(os.path.dirname(name))})")
        return [_checked_path(shard) for shard in shards]
    return [_checked_path(name)]


def _checked_path(path: str) -> str:
    """The path of a local shard.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is a folder or a table, which `clipkit shards write` turns into shards.
    """
    if os.path.isdir(path):
        folder = os.path.normpath(path)
        tars = sorted(Path(folder).glob("*.tar*"))
        if tars:
            raise ValueError(f"{path!r} is a folder with {len(tars)} tars; give its shards: '{folder}/*.tar'")
        raise ValueError(f"{path!r} is a folder, not a shard; make shards of it first: "
                         f"clipkit shards write source={folder} out={folder}-shards")
    if path.lower().endswith(TABLE_SUFFIXES):
        out = os.path.splitext(path)[0]
        raise ValueError(f"{path!r} is a table, not a shard; make shards of it first: "
                         f"clipkit shards write source={path} out={out}-shards")
    if not os.path.exists(path):
        raise FileNotFoundError(f"no shard at {path!r} (that is {os.path.abspath(path)}); check the path and the "
                                "numbers in braces")
    return path


def _is_remote_glob(url: str) -> bool:
    # In a web address "?" starts the query.
    return glob.has_magic(url if not url.startswith(("http://", "https://")) else url.replace("?", ""))


def _remote_shards(url: str) -> list[str]:
    if not _is_remote_glob(url):
        return [url]
    if "::" in url:
        raise ValueError(f"{url!r} is a chain of file systems, which cannot be searched; use braces: {{000..099}}")
    filesystem, path = _filesystem(url)
    shards = sorted(str(filesystem.unstrip_protocol(str(name))) for name in filesystem.glob(path))
    if not shards:
        raise FileNotFoundError(f"no shard matches {url!r}; check the URL, or list them with braces: {{000..099}}")
    return shards


def _filesystem(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    try:
        return fsspec.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise ValueError(f"{url!r} cannot be opened: {error}") from error


def _check_remote(url: str, pattern: str) -> None:
    _filesystem(url)
    try:
        open_shard(url).close()
    except Exception as error:  # fsspec's backends raise classes of their own (aiohttp, botocore, ...)
        raise FileNotFoundError(f"no shard at {url} (from {pattern!r}; {type(error).__name__}: {error}); check the URL and "
                                "your access to it") from error


def count_samples(urls: Sequence[str], cache_dir: str | Path | None = None) -> int | None:
    """Count the samples of shards without reading their pictures.

    A shard's number is taken from `<shard>_stats.json` beside it (img2dataset's), else from `sizes.json` in its folder,
    else, for a local tar, from its headers, once: the result is kept in cache_dir by path, size and time of change.

    Args:
      urls: shards as expand_shards gives them.
      cache_dir: folder for counted shards, made where missing. None = count anew each time.

    Returns:
      The sum over all shards, or None where the number of one is not written down and it is remote.
    """
    known = _sizes_beside(urls)
    unknown = [url for url in dict.fromkeys(urls) if url not in known]
    if not all(map(is_local, unknown)):
        return None
    known.update(_count_headers(unknown, cache_dir))
    return sum(known[url] for url in urls)


def _sizes_beside(urls: Sequence[str]) -> dict[str, int]:
    """Numbers of samples that files beside the shards tell, for the shards where one does."""
    folders: dict[str, list[str]] = defaultdict(list)
    for url in dict.fromkeys(urls):
        if not url.startswith("pipe:"):
            folders[url.rpartition("/")[0]].append(url)
    known = {}
    for folder, shards in folders.items():
        sizes = _read_json(f"{folder}/sizes.json" if folder else "sizes.json")
        for position, shard in enumerate(shards):
            name = shard.rpartition("/")[2]
            stats = _read_json(shard.removesuffix(".tar") + "_stats.json") if name.endswith(".tar") else None
            count = (stats or {}).get("successes", (sizes or {}).get(name))
            if isinstance(count, int):
                known[shard] = count
            elif not is_local(shard) and position == 0:
                break  # a request a shard would be slow, and the others will hardly have what the first lacks
    return known


def _read_json(url: str) -> dict | None:
    try:
        with open_shard(url) as file:
            found = json.loads(file.read())
    except Exception:  # a side file is a help, never a must; fsspec's backends raise classes of their own
        return None
    return found if isinstance(found, dict) else None


def _count_headers(urls: Sequence[str], cache_dir: str | Path | None) -> dict[str, int]:
    cache_file = Path(cache_dir) / COUNTS_FILE if cache_dir else None
    cached = (_read_json(str(cache_file)) if cache_file else None) or {}
    counts, before = {}, len(cached)
    for url in urls:
        stat = os.stat(url)
        name = f"{os.path.abspath(url)} {stat.st_size} {stat.st_mtime_ns}"
        if name not in cached:
            cached[name] = sum(number >= 0 for number, _ in read_numbered(url, keep=lambda number: False))
        counts[url] = cached[name]
    if cache_file and len(cached) > before:
        cache_file.parent.mkdir(parents=True, exist_ok=True)
        temporary = cache_file.with_name(f"{cache_file.name}.{os.getpid()}")
        temporary.write_text(json.dumps(cached), encoding="utf-8")
        os.replace(temporary, cache_file)
    return counts
