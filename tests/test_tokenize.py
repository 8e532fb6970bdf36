"""Token ids: CLIP's tokenizer encodes plain texts word by word here, and must give what open_clip gives for any text."""

import pickle
import random

import pytest
import torch

from clipkit.data import tokenize
from clipkit.data.tokenize import make_tokenizer
from scripts.bench.make_shards import make_captions

ODD = [
    "", " ", "a  b\tc\nd\r\ne", "A DOG, isn't it?", "it's we're I'll 'S x'y", "I'M  'RE", "123 4,567.89%", "snake_case --- ~~~",
    "tom & jerry", "&amp;lt;b&amp;gt;", "x < &amp;amp;lt;", "a&b;c", "http://example.org/a?b=c&d=e",
    "caf\u00e9 na\u00efve", "caf\u00c3\u00a9",
    "\u2018quoted\u2019", "\ufb01sh", "\u6771\u4eac tower", "\U0001f600 face", "\u00a0no break\u00a0", "\u200bzero\u200bwidth",
    "\u0130stanbul \u03a3\u03a3", "\ud800 alone", "\x1b[31mred\x1b[0m", "nul\x00byte\x7f", "\x1cfile\x1dmarks",
    "<start_of_text> a <end_of_text>b", "x<END_OF_TEXT>", "w" * 300, "one " * 90, "a " * 75 + "b",
]


def random_texts(num: int) -> list[str]:
    """Texts of arbitrary printable and other characters, most of them ASCII."""
    rng = random.Random(0)
    characters = [chr(code) for code in range(128)] + list("  '&;,.\u00e9\u00df\u2014\u4e2d\u0301\u00c3\u20ac")
    return ["".join(rng.choices(characters, k=rng.randrange(1, 60))) for _ in range(num)]


@pytest.mark.parametrize("options", [{}, {"clean": "whitespace"}, {"clean": "canonicalize"},
                                     {"additional_special_tokens": ["a b"]}, {"reduction_mask": "random"}], ids=str)
def test_ids_are_open_clips_for_any_text(options) -> None:
    from open_clip.tokenizer import SimpleTokenizer

    texts = ODD + make_captions("alt-text", 200) + make_captions("long", 50) + random_texts(300)
    ours, theirs = make_tokenizer({"tokenizer_kwargs": options}), SimpleTokenizer(**options)
    for _ in range(2):  # the second time with the words known
        torch.manual_seed(0)
        found = ours(texts)
        torch.manual_seed(0)
        assert torch.equal(found, theirs(texts).int())
    assert found.dtype == torch.int32
    assert found.shape == (len(texts), 77)


@pytest.mark.parametrize("context_length", [2, 3, 16])
def test_longer_texts_are_cut_as_by_open_clip(context_length) -> None:
    from open_clip.tokenizer import SimpleTokenizer

    ours, theirs = make_tokenizer({"context_length": context_length}), SimpleTokenizer(context_length=context_length)
    texts = [" ".join(["red"] * length) for length in range(20)]
    assert torch.equal(ours(texts), theirs(texts).int())


def test_known_words_are_bounded_and_travel_with_the_tokenizer(monkeypatch) -> None:
    monkeypatch.setattr(tokenize, "MAX_WORDS", 5)
    tokenizer = make_tokenizer({})
    texts = [f"word{number} and more" for number in range(40)]
    expected = tokenizer(texts)
    assert len(tokenizer._ids_of_word) <= 5
    assert torch.equal(pickle.loads(pickle.dumps(tokenizer))(texts), expected)
