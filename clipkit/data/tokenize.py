"""Captions to token ids, with the tokenizer that the text tower was built for."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

MAX_TOKEN_BYTES = 32  # the longest of CLIP's vocabulary
MAX_WORDS = 2**16  # whose ids are kept; some 20 MB
# What a text_cfg may pass on. A Hugging Face tokenizer would take more, trust_remote_code for one.
OPTIONS = ("clean", "strip_sep_token", "language", "additional_special_tokens", "reduction_mask")
NUM_SPECIAL_TOKENS = 2  # start and end of text


class Tokenizer:
    """Call it with texts; it answers with (N, L) int32 ids, padded or cut to the context length. Picklable."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.context_length: int = tokenizer.context_length
        self._is_clips = _is_clips(tokenizer)
        self._ids_of_word: dict[str, list[int]] = {}

    def __call__(self, texts: Sequence[str]) -> Tensor:
        texts = [self._beginning(text) for text in texts]
        if not self._is_clips:
            return self.tokenizer(texts).int()  # (N, L)
        tokens = np.zeros((len(texts), self.context_length), np.int32)  # (N, L)
        for row, text in zip(tokens, texts, strict=True):
            ids = [self.tokenizer.sot_token_id, *self._encode(text)][: self.context_length - 1]
            row[: len(ids) + 1] = [*ids, self.tokenizer.eot_token_id]
        return torch.from_numpy(tokens)

    def _beginning(self, text: str) -> str:
        """Cut a text where no token that the context holds can reach: to merge a word takes the square of its length.

        CLIP's vocabulary only; Hugging Face's tokenizers need no more time than the length, and may have longer tokens.
        """
        if not self._is_clips:
            return text
        limit = MAX_TOKEN_BYTES * self.context_length
        if len(text) * 4 <= limit or len(data := " ".join(text.split()).encode("utf-8", "replace")) <= limit:
            return text
        return data[:limit].decode("utf-8", "ignore")

    def _encode(self, text: str) -> list[int]:
        """Ids of a text, as the tokenizer's own `encode` gives them.

        CLIP's tokens never reach over a space, and its cleaning (ftfy, html.unescape) does nothing to printable ASCII
        without "&": such words are encoded once.
        """
        if len(self.tokenizer.cache) > MAX_WORDS:  # open_clip keeps every word that it ever met
            special = [self.tokenizer.decoder[index] for index in self.tokenizer.all_special_ids]
            self.tokenizer.cache = {word: word for word in special}
        if not (text.isascii() and text.isprintable()) or "&" in text:
            return self.tokenizer.encode(text)
        ids = []
        for word in text.split():
            found = self._ids_of_word.get(word)
            if found is None:
                if len(self._ids_of_word) >= MAX_WORDS:
                    self._ids_of_word.clear()
                found = self.tokenizer.encode(word)
                if len(word) <= MAX_TOKEN_BYTES:
                    self._ids_of_word[word] = found
            ids += found
        return ids

    def count_cut(self, texts: Sequence[str]) -> int:
        """Count the texts with more tokens than the context holds; the rest of each is cut off."""
        # A token holds at least one byte, and two are start and end: shorter texts need no second look.
        long = [self._beginning(text) for text in texts if len(text.encode()) > self.context_length - 2]
        inner = getattr(self.tokenizer, "tokenizer", None)
        if inner is None:
            return sum(len(self.tokenizer.encode(text)) + 2 > self.context_length for text in long)
        return sum(len(ids) > self.context_length for ids in inner(long)["input_ids"]) if long else 0

    @property
    def pad_id(self) -> int:
        """What fills a row behind its text."""
        inner = getattr(self.tokenizer, "tokenizer", None)
        return 0 if inner is None else inner.pad_token_id

    @property
    def num_ids(self) -> int:
        """Ids are below this."""
        inner = getattr(self.tokenizer, "tokenizer", None)
        return self.tokenizer.vocab_size if inner is None else len(inner)

    def save(self, folder: Path) -> None:
        """Write the files of a Hugging Face tokenizer; CLIP's own needs none, it ships with open_clip."""
        inner = getattr(self.tokenizer, "tokenizer", None)
        if inner is not None:
            inner.save_pretrained(folder)


def _is_clips(tokenizer: Any) -> bool:
    """Whether it is CLIP's own, without further special tokens (which may hold spaces) and without shortening of texts."""
    from open_clip.tokenizer import SimpleTokenizer

    return (isinstance(tokenizer, SimpleTokenizer) and tokenizer.reduction_fn is None
            and len(tokenizer.all_special_ids) == NUM_SPECIAL_TOKENS)


def make_tokenizer(text_cfg: Mapping[str, Any], folder: Path | None = None) -> Tokenizer:
    """Build the tokenizer that an open_clip text_cfg names.

    Args:
      text_cfg: open_clip's `text_cfg`; `hf_tokenizer_name` picks a Hugging Face tokenizer, else CLIP's BPE is used.
      folder: A model folder whose own tokenizer files are preferred to the name.

    Raises:
      ValueError: the tokenizer is Hugging Face's, and transformers is not installed; it is code; or tokenizer_kwargs has other
        keys than OPTIONS.
    """
    from open_clip.tokenizer import HFTokenizer, SimpleTokenizer

    context_length = text_cfg.get("context_length", 77)
    options = text_cfg.get("tokenizer_kwargs") or {}
    if not isinstance(options, Mapping) or not set(options) <= set(OPTIONS):
        raise ValueError(f"text_cfg.tokenizer_kwargs is {options!r}; it can have {', '.join(OPTIONS)}")
    name = text_cfg.get("hf_tokenizer_name")
    if not name:
        return Tokenizer(SimpleTokenizer(context_length=context_length, **options))
    source = str(folder) if folder and (folder / "tokenizer_config.json").exists() else name
    try:
        tokenizer = HFTokenizer(source, context_length=context_length, tokenizer_mode=text_cfg.get("tokenizer_mode"),
                                trust_remote_code=False, **options)
    except ImportError as error:
        raise ValueError(f"the text tower needs the tokenizer {source}, which transformers reads: pip install "
                         f'"clipkit-vl[export]" ({error})') from error
    return Tokenizer(tokenizer)
