"""What is wrong with a run that does not do well, judged from numbers and features alone; None where nothing is."""

from collections.abc import Sequence

import torch
from torch import Tensor

BOTTLENECK_WAIT = 0.3  # of the time; below this, waiting costs less than a change of settings is worth
FLAT_MARGIN = 0.02  # of log(G): a CLIP that learns is further from chance than this within some dozen steps
MIN_RECORDS = 10  # logged losses before anything is said
COLLAPSED_COSINE = 0.95  # mean over pairs; random features have 0, trained ones 0.1 to 0.5
MANY_DUPLICATES = 0.25  # of a batch's captions
MANY_CUT = 0.1  # likewise
LOWEST_USUAL_LR, HIGHEST_USUAL_LR = 1e-5, 1e-2  # AdamW from random weights


def loader_bottleneck(data_wait_fraction: float, *, samples_per_second: float, workers: int, cores: int,
                      decode: str = "exact") -> str | None:
    """Say whether training waits for data, and what to change.

    Args:
      data_wait_fraction: Share of the time spent waiting, over at least some dozen steps after the first.
      samples_per_second: Of this process.
      workers: Loader workers of this process.
      cores: CPU cores that this process and its workers can use.
      decode: data.decode.
    """
    if data_wait_fraction < BOTTLENECK_WAIT:
        return None
    finding = (f"the loader is the bottleneck: {data_wait_fraction:.0%} of the time is spent waiting for data "
               f"({samples_per_second:,.0f} samples/s with {workers} workers)")
    if workers < cores - 1:
        return f"{finding}; raise data.workers to {cores - 1}"
    if decode == "exact":
        return f"{finding}; use data.decode=fast, shards of smaller images, or a machine with more than {cores} cores"
    return f"{finding}; use shards of smaller images, a faster disk, or a machine with more than {cores} cores"


def flat_loss(losses: Sequence[float], *, chance_loss: float, step: int, total_steps: int, warmup_steps: int,
              learning_rate: float, image_features: Tensor | None = None, text_features: Tensor | None = None,
              duplicate_fraction: float | None = None) -> str | None:
    """Say whether the loss is stuck near that of guessing, with the likely cause.

    Args:
      losses: The logged losses so far, oldest first; the last quarter is judged.
      chance_loss: Loss of a model that knows nothing: log(global batch size) for the clip loss.
      step: Steps done.
      total_steps: Steps of the run.
      warmup_steps: Steps of linear warm-up.
      learning_rate: The highest of the schedule.
      image_features: (B, D), unit norm, of a recent batch.
      text_features: (B, D), unit norm.
      duplicate_fraction: Share of a batch's captions that stand in it more than once; see `duplicate_captions`. None
        or 0 where they are masked as false negatives.

    Returns:
      One line, or None: the loss falls, or it is too early to say (a tenth of the run, at least 50 and at most 500
      steps, or a warm-up that is not suspiciously long).
    """
    if len(losses) < MIN_RECORDS or step < min(500, max(50, total_steps // 10)):
        return None
    recent = losses[-max(3, len(losses) // 4):]
    mean = sum(recent) / len(recent)
    if not mean > chance_loss * (1 - FLAT_MARGIN):
        return None
    if step < warmup_steps <= total_steps // 5:
        return None
    finding = f"after {step:,} steps the loss is {mean:.3f}, that of guessing ({chance_loss:.3f})"
    cause = (_long_warmup(step, total_steps, warmup_steps) or _collapse(image_features, text_features)
             or _duplicates(duplicate_fraction) or _learning_rate(learning_rate))
    return f"{finding}; {cause}"


def cut_captions(tokens: Tensor, pad_id: int) -> str | None:
    """Say whether many captions fill the context of the text tower to its last token, and so are cut.

    Args:
      tokens: (B, L), padded with pad_id.
      pad_id: Of the tokenizer.
    """
    full = (tokens[:, -1] != pad_id).float().mean().item()
    if full < MANY_CUT:
        return None
    return (f"{full:.0%} of the captions fill all {tokens.shape[1]} tokens that the text tower takes, and what is "
            "behind them is cut off; choose a model with a longer context (text_cfg.context_length), or shorter captions")


def duplicate_captions(tokens: Tensor) -> float:
    """Return the share of the rows of tokens (B, L) that occur more than once."""
    _, counts = torch.unique(tokens, dim=0, return_counts=True)
    return counts[counts > 1].sum().item() / max(1, len(tokens))


def mean_cosine(features: Tensor) -> float:
    """Return the mean cosine over all pairs of different rows of features (B, D), unit norm."""
    count = len(features)
    if count < 2:
        return 0.0
    total = features.double().sum(dim=0).square().sum().item()  # over all B x B pairs; the diagonal gives B
    return (total - count) / (count * (count - 1))


def _long_warmup(step: int, total_steps: int, warmup_steps: int) -> str | None:
    if warmup_steps >= total_steps:
        return (f"likely cause: the warm-up ({warmup_steps:,} steps) is longer than the run ({total_steps:,} steps), "
                "so the learning rate never gets up; set schedule.warmup=2%")
    if step < warmup_steps:
        return (f"likely cause: the warm-up takes {warmup_steps:,} of {total_steps:,} steps and the learning rate is "
                "still low; set schedule.warmup=2%")
    return None


def _collapse(image_features: Tensor | None, text_features: Tensor | None) -> str | None:
    for what, features in (("image", image_features), ("text", text_features)):
        if features is not None and (cosine := mean_cosine(features)) > COLLAPSED_COSINE:
            return (f"likely cause: the {what} features have collapsed (mean cosine {cosine:.3f}: all inputs look the "
                    f"same to the {what} tower); lower optim.lr, set optim.max_grad_norm=1, and look at the data "
                    "(`clipkit shards check`)")
    return None


def _duplicates(fraction: float | None) -> str | None:
    if fraction is None or fraction < MANY_DUPLICATES:
        return None
    return (f"likely cause: {fraction:.0%} of a batch's captions are in it more than once and count as each other's "
            "wrong answers; set loss.mask_false_negatives=caption")


def _learning_rate(learning_rate: float) -> str:
    check = "if train.overfit_batches=1 brings it down, the pictures and captions may not belong together"
    if learning_rate < LOWEST_USUAL_LR:
        return f"likely cause: optim.lr={learning_rate:g} is very low; usual are 1e-4 to 2e-3; {check}"
    if learning_rate > HIGHEST_USUAL_LR:
        return f"likely cause: optim.lr={learning_rate:g} is very high; usual are 1e-4 to 2e-3; {check}"
    return f"try optim.lr three times lower, then higher than {learning_rate:g}; {check}"
