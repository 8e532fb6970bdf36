"""Does a written model give what clipkit gives? Fixed texts, the hidden states of open_clip's text tower, comparisons."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from clipkit.interop.to_transformers_text import END_OF_TEXT, text_tower

# fp32: two orders of summing differ by some 5e-7 of the greatest value of a vector. Single tokens of trained towers reach
# hundreds, so that one bound for all numbers would be too tight there, or too loose everywhere else.
ATOL = 1e-5
TEXTS = ("", "!", "a photo of a cat", "A red square!", "it's  a_photo of 2 cats, on a café's mat", "naïve 東京 🎉 it'll",
         "two\nlines,\ta tab", "wow ! ok!!! (really?) -- 3.14 & 42%", "Tom &amp; Jerry &lt;b&gt;", "schÃ¶n “quoted” ﬁne",
         "antidisestablishmentarianism", "word " * 120, "don't we'll I'd they've you're I'm", "👩‍👩‍👧 family")
CLEANING = ("before the tokenizer: ftfy.fix_text, html.unescape twice, white space to single spaces, lower case (open_clip's "
            "clean='lower'); CLIPTokenizer of transformers 5 does the last two and NFC; without the rest, texts with HTML "
            "entities, mojibake, curly quotes, ligatures and full-width letters get other ids; literal names of special tokens "
            "(`<|startoftext|>`, `<|endoftext|>`, `<start_of_text>`, `<end_of_text>`), an apostrophe before a long s, and code "
            "points newer than one library's Unicode tables differ in any case")


class TextStates(NamedTuple):
    """What a text tower gives. Legend: B texts, L tokens, W width, D embed_dim."""

    hidden: tuple[Tensor, ...]  # each (B, L, W): the embeddings, then after each layer
    last: Tensor  # (B, L, W), after the final layer norm
    pooled: Tensor  # (B, W), of `last` at the end of text
    projected: Tensor  # (B, D), not normalised


def clean(texts: Sequence[str]) -> list[str]:
    """Clean texts as open_clip's CLIP tokenizer does before it splits them."""
    from open_clip.tokenizer import get_clean_fn

    return [get_clean_fn("lower")(text) for text in texts]


@torch.no_grad()
def text_states(towers: Any, tokens: Tensor, num_layers: int | None = None) -> TextStates:
    """Run the modules of an open_clip text tower one by one.

    Args:
      towers: CLIP or CustomTextCLIP with a causal Transformer, without a class token.
      tokens: (B, L), full context length.
      num_layers: Layers to run; None = all.
    """
    text = text_tower(towers)
    states = text.token_embedding(tokens) + text.positional_embedding  # (B, L, W)
    hidden = [states]
    for block in text.transformer.resblocks[:num_layers]:
        states = block(states, attn_mask=text.attn_mask)
        hidden.append(states)
    last = text.ln_final(states)  # (B, L, W)
    pooled = last[torch.arange(len(tokens)), (tokens == END_OF_TEXT).int().argmax(dim=-1)]  # (B, W)
    return TextStates(tuple(hidden), last, pooled, pooled @ text.text_projection)


def check_close(place: str, theirs: Tensor, ours: Tensor, found: dict[str, float], *, detail: str = "",
                atol: float | None = None) -> None:
    """Note the greatest absolute difference under `place`.

    Args:
      place: What is compared; `detail` says which of several.
      theirs: Any shape; vectors lie along the last axis.
      ours: The same of the model itself.
      found: Gets the difference.
      atol: What is allowed of any number; None = 1e-5, times the greatest number of the vector where that is above 1.

    Raises:
      ValueError: the difference is more, or the shapes differ.
    """
    if theirs.shape != ours.shape:
        raise ValueError(f"nothing was written: the export first differs from the model in {place}{detail}: shapes "
                         f"{tuple(theirs.shape)} and {tuple(ours.shape)}")
    difference = (theirs.double() - ours.double()).abs()
    greatest = torch.atleast_1d(ours.double().abs()).amax(dim=-1, keepdim=True)
    allowed = ATOL * greatest.clamp(min=1) if atol is None else torch.tensor(atol)
    if not bool((difference <= allowed).all()):  # also where it is NaN
        raise ValueError(f"nothing was written: the export first differs from the model in {place}{detail}: by "
                         f"{difference.max():.2g} of {greatest.max():.2g}, where {allowed.min():.2g} to {allowed.max():.2g} is "
                         "allowed")
    found[place] = max(difference.max().item(), found.get(place, 0.0))


def check_token_ids(tokenizer: Any, model: Any, texts: Sequence[str] = TEXTS) -> Tensor:
    """Compare a CLIPTokenizer on cleaned texts with the model's own, up to the end of text; the padding is its own.

    Returns:
      (B, L) its ids of the texts.

    Raises:
      ValueError: they differ; says for which text. Texts with the padding token in them are passed over.
    """
    length = model.tokenize.context_length
    ids = tokenizer(clean(texts), padding="max_length", truncation=True, max_length=length, return_tensors="pt").input_ids
    for text, theirs, ours in zip(texts, ids.tolist(), model.tokenize(texts).tolist(), strict=True):
        end = ours.index(END_OF_TEXT) + 1
        if theirs[:end] != ours[:end] and not (tokenizer.pad_token == "!" and "!" in text):
            raise ValueError(f"nothing was written: for the text {text[:40]!r} the written tokenizer gives {theirs[:end]} and "
                             f"the model's own {ours[:end]}")
    return ids
