"""CLIP's byte-pair encoding, which open_clip ships, as the files of transformers' CLIPTokenizer."""

import json
from pathlib import Path
from typing import Any

SPECIAL = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}  # open_clip's names -> transformers'

LOADED_FROM = ("is_local", "local_files_only", "name_or_path")  # of the files that transformers read here, not of the tokenizer


def write_clip_tokenizer(folder: Path, *, context_length: int, pad_token_id: int = 49407) -> Any:
    """Write vocabulary, merges and settings, and load them.

    transformers 4 and tools of its age read vocab.json and merges.txt; transformers 5 writes tokenizer.json beside them.

    Args:
      folder: Exists.
      context_length: Tokens of a text; longer ones are cut, as open_clip cuts them: the end of text stays.
      pad_token_id: What fills up a row. As any special token, it is found in a text too: 0 makes padding of a literal "!".

    Returns:
      The CLIPTokenizer that the folder gives.
    """
    from open_clip.tokenizer import SimpleTokenizer
    from transformers import CLIPTokenizer

    bpe = SimpleTokenizer()
    vocab = {SPECIAL.get(token, token): index for token, index in bpe.encoder.items()}
    merges = sorted(bpe.bpe_ranks, key=lambda merge: bpe.bpe_ranks[merge])
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, merges), ""]), encoding="utf-8")
    tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=context_length,
                                              pad_token=next(token for token, index in vocab.items() if index == pad_token_id))
    tokenizer.save_pretrained(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    kept = {key: value for key, value in settings.items() if key not in LOADED_FROM}
    (folder / "tokenizer_config.json").write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
    return CLIPTokenizer.from_pretrained(folder)
