"""Tell whether a folder's tokenizer is CLIP's own byte-pair encoding, which open_clip runs without transformers."""

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path


def read_bpe(folder: Path) -> tuple[dict[str, int], list[tuple[str, str]]] | None:
    """Read vocabulary and merges from vocab.json with merges.txt, or from tokenizer.json; None if the folder has no BPE."""
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
        merges = [line for line in lines if line and not line.startswith("#version")]
        return json.loads((folder / "vocab.json").read_text(encoding="utf-8")), [_pair(merge) for merge in merges]
    if (folder / "tokenizer.json").is_file():
        model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8")).get("model", {})
        if isinstance(model.get("vocab"), dict) and "merges" in model:
            return model["vocab"], [_pair(merge) for merge in model["merges"]]
    return None


def is_clip_bpe(vocab: Mapping[str, int], merges: Sequence[tuple[str, str]]) -> bool:
    """True if ids and merges are those of CLIP's BPE; only its two special tokens go by other names there."""
    clip_vocab, clip_merges = _clip_bpe()
    special = len(clip_vocab) - 2  # start and end of text, the last two
    return (len(vocab) == len(clip_vocab) and list(merges) == clip_merges
            and all(vocab.get(token) == index for token, index in clip_vocab.items() if index < special))


@functools.cache
def _clip_bpe() -> tuple[dict[str, int], list[tuple[str, ...]]]:
    from open_clip.tokenizer import SimpleTokenizer

    tokenizer = SimpleTokenizer()
    return tokenizer.encoder, sorted(tokenizer.bpe_ranks, key=lambda merge: tokenizer.bpe_ranks[merge])


def _pair(merge: str | Sequence[str]) -> tuple[str, str]:
    first, second = merge.split(" ") if isinstance(merge, str) else merge
    return first, second
