"""data.train to shards: one list a source."""

from collections.abc import Sequence

from clipkit.data.emoji import emoji_shards
from clipkit.data.shards import expand_shards

EMOJI = "emoji"


def find_sources(train: Sequence[str], *, weighted: bool, cache_dir: str | None = None,
                 allow_pipe: bool = False) -> list[list[str]]:
    """Find the shards that `data.train` names.

    Args:
      train: "emoji" for the embedded set, or shard patterns, globs and URLs.
      weighted: True keeps every entry a source of its own; False makes them one.
      cache_dir: Where the embedded set is unpacked; None = the user's cache.
      allow_pipe: Allow pipe: URLs.

    Raises:
      FileNotFoundError: a pattern matches nothing.
      ValueError: an entry is a folder, a table or a refused URL; the line says what to do.
    """
    sources = [emoji_shards("train", cache_dir) if entry == EMOJI else expand_shards([entry], allow_pipe=allow_pipe)
               for entry in train]
    return sources if weighted else [[shard for source in sources for shard in source]]
