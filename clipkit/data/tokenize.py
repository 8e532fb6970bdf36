"""Captions to token ids, with the tokenizer that the text tower was built for."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor


class Tokenizer:
    """Call it with texts; it answers with (N, L) int32 ids, padded or cut to the context length. Picklable."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.context_length: int = tokenizer.context_length

    def __call__(self, texts: Sequence[str]) -> Tensor:
        return self.tokenizer(list(texts)).int()  # (N, L)

    def count_cut(self, texts: Sequence[str]) -> int:
        """Count the texts with more tokens than the context holds; the rest of each is cut off."""
        # A token holds at least one byte, and two are start and end: shorter texts need no second look.
        long = [text for text in texts if len(text.encode()) > self.context_length - 2]
        inner = getattr(self.tokenizer, "tokenizer", None)
        if inner is None:
            return sum(len(self.tokenizer.encode(text)) + 2 > self.context_length for text in long)
        return sum(len(ids) > self.context_length for ids in inner(long)["input_ids"]) if long else 0

    def save(self, folder: Path) -> None:
        """Write the files of a Hugging Face tokenizer; CLIP's own needs none, it ships with open_clip."""
        inner = getattr(self.tokenizer, "tokenizer", None)
        if inner is not None:
            inner.save_pretrained(folder)


def make_tokenizer(text_cfg: Mapping[str, Any], folder: Path | None = None) -> Tokenizer:
    """Build the tokenizer that an open_clip text_cfg names.

    Args:
      text_cfg: open_clip's `text_cfg`; `hf_tokenizer_name` picks a Hugging Face tokenizer, else CLIP's BPE is used.
      folder: A model folder whose own tokenizer files are preferred to the name.

    Raises:
      ValueError: the tokenizer is Hugging Face's, and transformers is not installed.
    """
    from open_clip.tokenizer import HFTokenizer, SimpleTokenizer

    context_length = text_cfg.get("context_length", 77)
    options = text_cfg.get("tokenizer_kwargs") or {}
    name = text_cfg.get("hf_tokenizer_name")
    if not name:
        return Tokenizer(SimpleTokenizer(context_length=context_length, **options))
    source = str(folder) if folder and (folder / "tokenizer_config.json").exists() else name
    try:
        tokenizer = HFTokenizer(source, context_length=context_length, tokenizer_mode=text_cfg.get("tokenizer_mode"), **options)
    except ImportError as error:
        raise ValueError(f"the text tower needs the tokenizer {source}, which transformers reads: pip install "
                         f'"clipkit-vl[export]" ({error})') from error
    return Tokenizer(tokenizer)
