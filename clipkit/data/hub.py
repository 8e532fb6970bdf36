"""Data sets and models on the Hugging Face hub, fetched into its own cache. huggingface_hub does the fetching.

The cache (HF_HOME, HF_HUB_CACHE), another server (HF_ENDPOINT) and the token (HF_TOKEN) are set as for all its users.
"""

import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

MODEL_PREFIX = "hf-hub:"  # as in open_clip
SET_PREFIX = "hf://"
REPOSITORY = re.compile(r"([\w.-]+/[\w.-]+)(?:@((?!.*\.\.)[\w./-]+))?")  # no git reference holds ".."
MODEL_TEXTS = ("*.json", "*.txt", "*.model")  # configuration and tokenizer


class Repository(NamedTuple):
    """What a name means."""

    name: str  # as it was given
    kind: str  # "dataset" or "model"
    repo_id: str  # <user>/<repository>
    revision: str  # a commit, branch or tag


class Fetched(NamedTuple):
    """A repository's files in the cache: all that were asked for."""

    folder: Path
    commit: str


def find_hub_set(name: str) -> Repository | None:
    """Recognise hf://<user>/<dataset>[@revision]; a longer path is a file for fsspec, and None.

    Raises:
      ValueError: hf:// is followed by no user and data set.
    """
    if not name.startswith(SET_PREFIX):
        return None
    found = REPOSITORY.fullmatch(name.removeprefix(SET_PREFIX).removeprefix("datasets/"))
    if found is None and name.removeprefix(SET_PREFIX).partition("@")[0].count("/") < 2:
        raise ValueError(f"task is {name!r}; a set on the hub is hf://<user>/<dataset>, or hf://<user>/<dataset>@<revision>")
    return Repository(name, "dataset", found[1], found[2] or "main") if found else None


def go_offline() -> None:
    """From here on take everything that is on the hub from the cache, in open_clip and transformers too."""
    from huggingface_hub import constants

    os.environ["HF_HUB_OFFLINE"] = "1"  # for processes that are started later
    constants.HF_HUB_OFFLINE = True  # the library reads the variable once


def fetch_set(repository: Repository, split: str = "test", *, with_train: bool = False) -> Fetched:
    """Fetch one split of a set in the layout of CLIP_benchmark, and where asked for its train split too.

    Files that are in the cache are not fetched again. Of several processes only the first of each machine fetches.

    Raises:
      FileNotFoundError: there is no such set, revision or split; the hub cannot be reached; or, offline, the cache
        lacks a part.
    """

    def fetch(offline: bool) -> Fetched:
        found = _cached(repository, f"{split}/nshards.txt") if offline else _snapshot(repository, ["*.txt"])
        splits = sorted(path.parent.name for path in found.folder.glob("*/nshards.txt"))
        if split not in splits:
            raise FileNotFoundError(f"{repository.name} has no {split}/nshards.txt; its splits in the layout of CLIP_benchmark "
                                    f"are: {', '.join(splits) or 'none'}; name one with split=..., or choose another set")
        wanted = [split, *(["train"] if with_train and "train" in splits and split != "train" else [])]
        if not offline:
            return _snapshot(repository._replace(revision=found.commit), ["*.txt", *(f"{one}/*" for one in wanted)])
        missing = [name for one in wanted for name in _shard_names(found.folder, one) if not (found.folder / name).is_file()]
        if missing:
            raise _not_cached(repository, missing)
        return found

    return _once_a_machine(fetch)


def fetch_model(name: str, weights: Sequence[str]) -> Fetched:
    """Fetch a model's configuration, tokenizer and weights.

    Args:
      name: hf-hub:<org>/<name>, or with @<revision> after it.
      weights: names of weights files, the preferred first: one is fetched; of a .json index, the files that it names.

    Raises:
      ValueError: it is no such name.
      FileNotFoundError: as in `fetch_set`, or the repository has no weights of these names.
    """
    found = REPOSITORY.fullmatch(name.removeprefix(MODEL_PREFIX))
    if found is None:
        raise ValueError(f"model is {name!r}; a model on the hub is hf-hub:<org>/<name>, or hf-hub:<org>/<name>@<revision>")
    repository = Repository(name, "model", found[1], found[2] or "main")

    def fetch(offline: bool) -> Fetched:
        if offline:
            return _cached(repository, *weights)
        texts = _snapshot(repository, MODEL_TEXTS)
        pinned = repository._replace(revision=texts.commit)
        for candidate in weights:
            folder = _snapshot(pinned, [candidate]).folder
            if (folder / candidate).is_file():
                return _snapshot(pinned, _parts(folder / candidate)) if candidate.endswith(".json") else texts
        raise FileNotFoundError(f"{name} has no weights that are read here ({', '.join(weights)}); choose another model")

    return _once_a_machine(fetch)


def _once_a_machine(fetch: Callable[[bool], Fetched]) -> Fetched:
    """Let the first process of each machine fetch, unless the hub is off; the others find the files in the cache."""
    import torch.distributed as dist
    from huggingface_hub import constants

    from clipkit.training.distributed import gather_objects, ranks_from_environment

    if not dist.is_initialized():
        return fetch(constants.HF_HUB_OFFLINE)
    is_first, fetched, failure = ranks_from_environment()[2] == 0, None, None
    try:
        fetched = fetch(constants.HF_HUB_OFFLINE) if is_first else None
    except (OSError, ValueError) as error:
        failure = error
    for one in gather_objects(failure):  # of any process, on all: none waits for one that has ended
        if one is not None:
            raise one
    return fetched or fetch(True)


def _snapshot(repository: Repository, patterns: Sequence[str]) -> Fetched:
    """Fetch the files that match and are not in the cache; without a connection the cache has to have them all."""
    from huggingface_hub import constants, errors, snapshot_download

    name, kind, repo_id, revision = repository
    try:
        folder = snapshot_download(repo_id, repo_type=kind, revision=revision, allow_patterns=list(patterns),
                                   ignore_patterns=["*/*"] if kind == "model" else None)
    except errors.GatedRepoError as error:
        raise FileNotFoundError(f"{name} is gated: accept its terms on {constants.ENDPOINT} in a browser, then log in "
                                "(hf auth login) or set HF_TOKEN") from error
    except errors.RepositoryNotFoundError as error:
        raise FileNotFoundError(f"there is no {kind} {repo_id} on {constants.ENDPOINT}, or it is private; check the name, or "
                                "log in (hf auth login) or set HF_TOKEN") from error
    except errors.RevisionNotFoundError as error:
        raise FileNotFoundError(f"{kind} {repo_id} has no revision {revision!r} on {constants.ENDPOINT}; give a commit, branch "
                                "or tag that it has, or none for the newest") from error
    except errors.LocalEntryNotFoundError as error:
        raise FileNotFoundError(f"{name} cannot be fetched: {constants.ENDPOINT} cannot be reached, and the cache "
                                f"{constants.HF_HUB_CACHE} does not hold it whole; check the connection (and HF_ENDPOINT)"
                                ) from error
    except Exception as error:  # httpx, requests and hf_xet below raise classes of their own
        raise FileNotFoundError(f"{name} cannot be fetched from {constants.ENDPOINT}: {type(error).__name__}: "
                                f"{str(error).strip().partition(chr(10))[0]}; try again: files that are whole are kept"
                                ) from error
    return Fetched(Path(folder), Path(folder).name)


def _cached(repository: Repository, *names: str) -> Fetched:
    """The cached files of a repository of which at least one of these files is cached."""
    from huggingface_hub import try_to_load_from_cache

    for name in names:
        path = try_to_load_from_cache(repository.repo_id, name, revision=repository.revision, repo_type=repository.kind)
        if isinstance(path, str):
            folder = Path(path).parents[name.count("/")]
            missing = [part for part in _parts(Path(path)) if not (folder / part).is_file()] if name.endswith(".json") else []
            if missing:
                raise _not_cached(repository, missing)
            return Fetched(folder, folder.name)
    raise _not_cached(repository, names[:1])


def _not_cached(repository: Repository, missing: Sequence[str]) -> FileNotFoundError:
    from huggingface_hub import constants

    more = f" and {len(missing) - 3} more files" if len(missing) > 3 else ""
    return FileNotFoundError(f"offline, and the cache {constants.HF_HUB_CACHE} lacks {', '.join(missing[:3])}{more} of "
                             f"{repository.name}; fetch it once without offline=true (and HF_HUB_OFFLINE)")


def _shard_names(folder: Path, split: str) -> list[str]:
    text = (folder / split / "nshards.txt").read_text().strip()
    return [f"{split}/{number}.tar" for number in range(int(text))] if text.isdecimal() else []


def _parts(index: Path) -> list[str]:
    """The files that an index of weights names."""
    return sorted(set(json.loads(index.read_text())["weight_map"].values()))
