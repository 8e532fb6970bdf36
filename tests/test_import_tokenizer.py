"""The tokenizer of a transformers folder: CLIP's own BPE without transformers, any other through it, SigLIP's padded fully."""

import itertools
import json
import sys
from pathlib import Path

import pytest
import torch

from clipkit.interop.clip_bpe import is_clip_bpe, read_bpe
from clipkit.model.build import make_towers
from clipkit.model.folder import load_model
from tests.test_import import TEXTS, write_clip, write_clip_bpe, write_siglip


def slow_bpe(folder: Path, words: list[str]) -> list[int]:
    """Ids of ASCII words: the best-ranked pair is joined until no pair has a rank."""
    vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    ranks = {line: rank for rank, line in enumerate((folder / "merges.txt").read_text(encoding="utf-8").split("\n"))}
    ids = [vocab["<|startoftext|>"]]
    for word in words:
        parts = [*word[:-1], f"{word[-1]}</w>"]
        while pairs := [(ranks[pair], i) for i, pair in enumerate(map(" ".join, itertools.pairwise(parts))) if pair in ranks]:
            _, first = min(pairs)
            parts[first:first + 2] = ["".join(parts[first:first + 2])]
        ids += [vocab[part] for part in parts]
    return [*ids, vocab["<|endoftext|>"]]


def test_clips_own_bpe_runs_without_transformers_and_gives_its_ids(tmp_path):
    from transformers import CLIPTokenizer

    from clipkit.data.tokenize import make_tokenizer

    write_clip_bpe(tmp_path)
    files = read_bpe(tmp_path)
    assert files is not None and is_clip_bpe(*files)
    ours = make_tokenizer({"context_length": 77})
    theirs = CLIPTokenizer.from_pretrained(tmp_path)
    for text in [*TEXTS, "mammals' 12345 3.14 don't-stop!!! antidisestablishmentarianism", "ẞtraße İstanbul"]:
        ids = ours([text])[0].tolist()
        assert ids[:ids.index(49407) + 1] == theirs(text, truncation=True, max_length=77).input_ids, text
    words = ["it", "'s", "antidisestablishmentarianism", ",", "don", "'t", "4", "2", "!!!"]
    assert [i for i in ours(["It's antidisestablishmentarianism, don't 42!!!"])[0].tolist() if i] == slow_bpe(tmp_path, words)
    theirs.save_pretrained(tmp_path / "one_file")
    vocab, merges = files
    assert read_bpe(tmp_path / "one_file") == files  # tokenizer.json alone
    assert not is_clip_bpe(vocab, [merges[1], merges[0], *merges[2:]]) and not is_clip_bpe({**vocab, "new": 49408}, merges)


def test_another_bpe_than_clips_is_run_by_transformers(tmp_path, monkeypatch):
    write_clip(tmp_path, {}, {}, {})
    merges = (tmp_path / "merges.txt").read_text(encoding="utf-8").split("\n")
    (tmp_path / "merges.txt").write_text("\n".join(merges[:1] + merges[5:]), encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer", "model_max_length": 16}))
    ids = load_model(tmp_path).tokenize(["a red square"])[0].tolist()
    assert len(ids) == 16 and ids[0] == 49406 and 49407 in ids
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match=r'pip install "clipkit-vl\[export\]"') as error:
        load_model(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["ViT-B-16-SigLIP", "ViT-SO400M-14-SigLIP", "ViT-B-32-SigLIP2-256"])
def test_open_clips_siglip_names_canonicalise_pad_fully_and_are_not_trimmed(name, tmp_path):
    """With a small tokenizer in the place of the hub's."""
    import open_clip

    from clipkit.data.tokenize import make_tokenizer
    from clipkit.model.trim import can_trim

    write_siglip(tmp_path)
    cfg = open_clip.get_model_config(name)
    assert cfg is not None
    tokens = make_tokenizer(cfg["text_cfg"], tmp_path)(["A photo of a_RED square!", "photo"])
    assert tokens.shape == (2, cfg["text_cfg"]["context_length"])
    assert tokens[0, :7].tolist() == [2, 7, 8, 2, 3, 5, 1] and (tokens[0, 7:] == 1).all() and tokens[1, 0] == 7
    with torch.device("meta"):
        assert not can_trim(make_towers(cfg))
