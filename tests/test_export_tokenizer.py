"""The written CLIPTokenizer gives open_clip's ids for cleaned texts; where it cannot, the texts are listed here."""

import json
import random

import pytest

from clipkit.interop.clip_tokenizer_folder import write_clip_tokenizer
from clipkit.interop.self_check import CLEANING, TEXTS, clean

# First and last code points: ASCII, accents, Greek, Cyrillic, Hebrew, Arabic, Devanagari, Thai, punctuation, currency,
# letter-like and number forms, arrows, kana, Chinese, Korean, ligatures, full-width forms, emoji, flags.
SCRIPTS = ((0x20, 0x7E), (0xA0, 0x17E), (0x370, 0x3FF), (0x400, 0x45F), (0x5D0, 0x5EA), (0x620, 0x669), (0x904, 0x939),
           (0xE01, 0xE2E), (0x2010, 0x2027), (0x2070, 0x208E), (0x2090, 0x209C), (0x20A0, 0x20B5), (0x2100, 0x2199),
           (0x3041, 0x30FE), (0x4E00, 0x4FFF), (0xAC00, 0xADFF), (0xFB00, 0xFB04), (0xFF01, 0xFF5E), (0x1F300, 0x1F64F),
           (0x1F1E6, 0x1F1FF))
PIECES = ("'s", "'LL", "n't", "&amp;", "&lt;b&gt;", "&#39;", "&eacute;", "\n", "\t", "\r\n", "  ", "\u200b", "\u200d",
          "\ufe0f", "\x07", "e\u0301", "the ", "photo ", " of a ", "cat", "http://x.org/?a=b", "3.14", "schÃ¶n", "â€œyesâ€\x9d",
          "!!!", "...")
# No cleaning helps: what one of the two reads as a special token; an apostrophe before a long s, which only open_clip takes for
# 's; a code point that is a letter in only one of their Unicode tables.
HOPELESS = ("<|startoftext|>", "<|endoftext|>", "<start_of_text>", "<end_of_text>", "a <|ENDOFTEXT|> b", "'\u017ft", "\u209do")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return write_clip_tokenizer(tmp_path_factory.mktemp("tokenizer"), context_length=77)


@pytest.fixture(scope="module")
def reference():
    from open_clip.tokenizer import SimpleTokenizer

    return SimpleTokenizer()


def ids_of(tokenizer, texts: list[str]) -> list[list[int]]:
    return tokenizer(texts, truncation=True, max_length=77).input_ids


def reference_ids(reference, texts: list[str]) -> list[list[int]]:
    rows = reference(texts).tolist()
    return [row[:row.index(49407) + 1] for row in rows]


def fuzzed(number: int) -> list[str]:
    """Texts of one or two scripts, spaces and pieces of the kinds that tokenizers stumble over."""
    rng = random.Random(0)
    texts = []
    for _ in range(number):
        scripts = rng.choices(SCRIPTS, k=2)
        letters = [chr(rng.randint(*rng.choice(scripts))) for _ in range(rng.randrange(1, 40))]
        texts.append("".join(rng.choice((letter, letter, letter, " ", rng.choice(PIECES))) for letter in letters))
    return texts


@pytest.mark.parametrize("number", [300, pytest.param(6000, marks=pytest.mark.slow)])
def test_ids_are_those_of_open_clip_after_cleaning(number, tokenizer, reference):
    texts = [*TEXTS, *fuzzed(number)]
    wrong = [text for text, theirs, ours in zip(texts, ids_of(tokenizer, clean(texts)), reference_ids(reference, texts),
                                                strict=True) if theirs != ours]
    assert not wrong, f"{len(wrong)} of {len(texts)}: {wrong[:5]}"


def test_plain_english_needs_no_cleaning(tokenizer, reference):
    texts = ["A photo of a  cat, on the mat!", "it's 3.14\n(not 2.7)", "don't", "naïve café", "wow ! ok!!"]
    assert ids_of(tokenizer, texts) == reference_ids(reference, texts)


def test_without_cleaning_entities_and_mojibake_differ(tokenizer, reference):
    texts = ["Tom &amp; Jerry", "schÃ¶n", "“quoted”", "\ufb01ne", "\uff21"]
    assert all(theirs != ours for theirs, ours in zip(ids_of(tokenizer, texts), reference_ids(reference, texts), strict=True))


def test_literal_special_tokens_and_two_rarities_are_where_no_agreement_is_possible(tokenizer, reference):
    theirs, ours = ids_of(tokenizer, clean(HOPELESS)), reference_ids(reference, list(HOPELESS))
    assert all(one != other for one, other in zip(theirs, ours, strict=True))
    assert all(text in CLEANING for text in HOPELESS[:4])


def test_padding_is_a_setting_and_0_makes_padding_of_a_literal_exclamation_mark(tmp_path, tokenizer, reference):
    other = write_clip_tokenizer(tmp_path, context_length=16, pad_token_id=0)
    assert (tokenizer.pad_token_id, other.pad_token_id, other.pad_token, other.model_max_length) == (49407, 0, "!", 16)
    row = other("a cat", padding="max_length").input_ids
    assert row == reference(["a cat"])[0, :16].tolist() and len(tokenizer("a cat", padding="max_length").input_ids) == 77
    assert 0 in other("wow ! ok").input_ids and 0 not in tokenizer("wow ! ok").input_ids
    assert ids_of(tokenizer, ["wow ! ok!!"]) == reference_ids(reference, ["wow ! ok!!"])


def test_the_files_are_those_that_old_and_new_tools_read(tmp_path):
    write_clip_tokenizer(tmp_path, context_length=32)
    vocab = json.loads((tmp_path / "vocab.json").read_text(encoding="utf-8"))
    merges = (tmp_path / "merges.txt").read_text(encoding="utf-8").split("\n")
    assert (len(vocab), vocab["<|startoftext|>"], vocab["<|endoftext|>"], vocab["!"]) == (49408, 49406, 49407, 0)
    assert merges[0].startswith("#version") and len(merges) == 48894 + 2
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert (settings["model_max_length"], settings["tokenizer_class"]) == (32, "CLIPTokenizer")
