"""Prompts of random words: the baseline that a description of the classes has to beat before it is believed."""

import random
import string

NUM_PAIRS = 15  # as in the paper; each gives a text of words and one of letters
WORDS_PER_TEXT = 2
COMMON_TOKENS = 10_000  # of the tokenizer, the first merged: most are words
WORD_LETTERS = range(4, 10)


def random_word_templates(seed: int = 0) -> list[str]:
    """Write templates that end in words, or letters, that mean nothing: 30, the same for every class.

    The words are those that CLIP's tokenizer has a token for; the letters are as long as they are.

    Source: Roth et al. 2023, WaffleCLIP (arXiv:2306.07282).
    """
    from open_clip.tokenizer import SimpleTokenizer

    tokens = list(SimpleTokenizer().encoder)[:COMMON_TOKENS]
    words = [word for token in tokens if token.endswith("</w>") and (word := token.removesuffix("</w>")).isalpha()
             and word.isascii() and len(word) in WORD_LETTERS]
    draw = random.Random(seed).random  # the only draw that Python promises to keep from version to version
    templates = []
    for _ in range(NUM_PAIRS):
        chosen = [words[int(draw() * len(words))] for _ in range(WORDS_PER_TEXT)]
        letters = ["".join(string.ascii_lowercase[int(draw() * 26)] for _ in word) for word in chosen]
        templates += [f"a photo of a {{}}, which has {' '.join(ending)}." for ending in (chosen, letters)]
    return templates
