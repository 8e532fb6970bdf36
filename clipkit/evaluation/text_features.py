"""Texts to features: equal ones once, those in the store not at all, and no padding where that is exact."""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from clipkit.evaluation.feature_rows import (
    Progress,
    evaluation_mode,
    gather_rows,
    ranks_of,
    refuse_not_finite,
    share_rows,
    warn_if_not_kept,
)
from clipkit.evaluation.store import EmbeddingStore, identify, text_key
from clipkit.model.image_text import ImageTextModel
from clipkit.model.trim import encode_by_length


def encode_texts(model: ImageTextModel, texts: Sequence[str], *, batch_size: int, spread: bool = False,
                 store: EmbeddingStore | None = None, progress: Progress | None = None) -> Tensor:
    """Encode texts; equal ones once, and those that a store has not at all.

    Args:
      model: encodes the texts; left in the mode it was in.
      texts: T texts.
      batch_size: texts of full length that are encoded at once (as many tokens of shorter ones where that is exact).
      spread: over all processes: each encodes its share, and each gets the whole, the bits that one process would get.
        All of them must call this. The store of the first is read and written.
      store: where features are kept.
      progress: called after each batch.

    Returns:
      (T, D) unit norm, fp32, on the model's device.

    Raises:
      ValueError: a feature is not finite.
    """
    rank, _ = ranks_of(spread)
    row_of = {text: row for row, text in enumerate(dict.fromkeys(texts))}
    distinct = list(row_of)
    key, known, stored = "", torch.empty(0, dtype=torch.int64), torch.empty(0, 0)
    if store is not None and rank == 0:
        key = text_key(identify(model))
        known, stored = store.read_texts(key, distinct)  # (n,), (n, D)
    if spread:
        known, stored = share_rows(known, model.device).cpu(), share_rows(stored, model.device)
    is_missing = torch.ones(len(distinct), dtype=torch.bool)
    is_missing[known] = False
    missing_rows = is_missing.nonzero()[:, 0]  # (T distinct - n,)
    missing = [distinct[row] for row in missing_rows.tolist()]
    features = stored.to(model.device)  # (n, D)
    if missing or not distinct:
        fresh = _encode_distinct(model, missing, batch_size, spread, progress)  # (missing, D)
        refuse_not_finite(fresh, lambda row: f"text {missing[row]!r}")
        if store is not None and rank == 0:
            warn_if_not_kept(lambda: store.add_texts(key, missing, fresh))
        features = torch.cat([features, fresh]) if len(known) else fresh
    place_of_row = torch.cat([known, missing_rows]).argsort()  # (distinct,) where each row came to stand
    places = place_of_row[torch.tensor([row_of[text] for text in texts], dtype=torch.int64)]  # (T,)
    in_order = torch.equal(places, torch.arange(len(features)))
    return features if in_order else features[places.to(features.device)]


def check_prompts(prompts: Sequence[Sequence[str]]) -> None:
    """Raise a ValueError where a class has no prompt."""
    for number, of_class in enumerate(prompts):
        if not of_class:
            raise ValueError(f"class {number} of {len(prompts)} has no prompt; give each class at least one text")


def average_prompts(features: Tensor, texts: Sequence[str], prompts: Sequence[Sequence[str]]) -> Tensor:
    """Average the prompts of each class, and bring the means to unit norm.

    A class's sum is taken in the order of its prompts, whatever the other classes are.

    Args:
      features: (T, D) unit norm.
      texts: T, each once.
      prompts: for each of C classes its texts, all of them among `texts`.

    Returns:
      (C, D) unit norm, on the device of the features.
    """
    row_of = {text: row for row, text in enumerate(texts)}
    rows = torch.tensor([row_of[text] for of_class in prompts for text in of_class])  # (all prompts,)
    starts = torch.tensor([0, *(len(of_class) for of_class in prompts[:-1])]).cumsum(0)  # (C,)
    means = F.embedding_bag(rows.to(features.device), features, starts.to(features.device), mode="mean")  # (C, D)
    return F.normalize(means, dim=-1)


def stored_class_weights(store: EmbeddingStore, key: str, prompts: Sequence[Sequence[str]]) -> Tensor | None:
    """Make the weights of `class_weights` without the model.

    Args:
      store: has the features of the prompts.
      key: from `text_key`.
      prompts: for each of C classes its texts, at least one.

    Returns:
      (C, D) unit norm, fp32, on the CPU; None if a prompt is not in the store.
    """
    check_prompts(prompts)
    texts = list(dict.fromkeys(text for of_class in prompts for text in of_class))
    rows, features = store.read_texts(key, texts)
    return average_prompts(features, [texts[row] for row in rows.tolist()], prompts) if len(rows) == len(texts) else None


def _encode_distinct(model: ImageTextModel, texts: list[str], batch_size: int, spread: bool,
                     progress: Progress | None) -> Tensor:
    """Encode this process's batches of the texts, and gather all. (T, D)"""
    rank, world_size = ranks_of(spread)
    # In this order batches are a function of the set of texts; in that of the caller the last bits would hang on it too.
    order = torch.tensor(sorted(range(len(texts)), key=texts.__getitem__), dtype=torch.int64)  # (T,)
    rows, parts, done = [torch.empty(0, dtype=torch.int64)], [], 0
    with evaluation_mode(model):
        for places, features in _text_batches(model, [texts[row] for row in order.tolist()], batch_size, rank, world_size):
            parts.append(F.normalize(features.float(), dim=-1))  # (b, D)
            rows.append(order[places])  # (b,)
            done += len(places)
            if progress is not None:
                progress(min(done * world_size, len(texts)), len(texts))
    features = torch.cat(parts or [torch.empty(0, 0, device=model.device)])  # (this process's, D)
    row_of = torch.cat(rows).to(model.device)
    if spread:
        features, row_of = gather_rows(features), gather_rows(row_of)
    return features[row_of.argsort()]


def _text_batches(model: ImageTextModel, texts: list[str], batch_size: int, rank: int,
                  world_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (places (b,) of texts, their features (b, D), not normalised), all that fall to this process.

    The batches are the same for any number of processes: each takes whole ones, or all those of a length.
    """
    if not texts:
        return
    tokens = model.tokenize(texts)  # (T, L)
    if model.trims_text:
        lengths, counts = (tokens.argmax(dim=-1) + 1).unique(return_counts=True)  # (number of lengths,), as the towers cut
        own = lengths[(lengths * counts).argsort(descending=True, stable=True)][rank::world_size]  # the dearest first
        places = torch.isin(tokens.argmax(dim=-1) + 1, own).nonzero()[:, 0]
        for rows, features in encode_by_length(model.towers, tokens[places], batch_size=batch_size, device=model.device):
            yield places[rows], features
        return
    for rows in torch.arange(len(texts)).split(batch_size)[rank::world_size]:
        yield rows, model.towers.encode_text(tokens[rows].to(model.device))
