"""Generated pictures before a CLIP that had no part in them: do they show their prompts, look real, copy what was trained on?

Each number stands beside those of others that were judged alike: the same pictures with shuffled prompts, for each prompt the
nearest training picture (what a mere search would give), and real pictures.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from clipkit.diffusion.judged_prompts import JudgedPrompts
from clipkit.diffusion.metrics import (
    MIN_FID_SAMPLES,
    Measure,
    clip_score,
    fid,
    kernel_distance,
    nearest_images,
    prompt_accuracy,
)
from clipkit.evaluation.retrieval import rank_targets
from clipkit.evaluation.statistics import clustered_interval, mean_interval

RIDGE = 1e-3  # of the mean variance: features that hardly vary within styles decide nothing
COPY_QUANTILE = 0.99  # of held-out real pictures; a sample that is nearer to a training picture than these looks copied


# Whose pictures: title, and what stands before the names of their numbers in the results.
SAMPLES, SHUFFLED, RETRIEVED, REAL = "samples", "shuffled prompts", "nearest training picture", "real pictures"
PREFIXES = {SAMPLES: "", SHUFFLED: "shuffled_", RETRIEVED: "retrieved_", REAL: "real_"}


class Pictures(NamedTuple):
    """Pictures as the scorer sees them."""

    features: Tensor  # (N, D) unit norm, fp32
    style_features: Tensor  # (N, F), by which styles are told: before the projection, which keeps little of them

    def rows(self, places: Tensor) -> "Pictures":
        return Pictures(self.features[places], self.style_features[places])


class StyleClassifier(NamedTuple):
    """Tells the style of a picture by its features: the nearest mean of the styles' training pictures. Legend: S styles.

    Features mostly differ by what a picture shows. So distances are taken in units of how far pictures of one style are from
    their mean: linear discriminant analysis, all styles equally likely.
    """

    names: list[str]  # S
    weight: Tensor  # (S, F)
    bias: Tensor  # (S,)

    def __call__(self, style_features: Tensor) -> Tensor:
        """Features (N, F) to styles (N,) int64."""
        return (style_features.double() @ self.weight.T + self.bias).argmax(dim=1)


class Judge(NamedTuple):
    """What pictures are compared with, as the scorer sees it. Legend: P prompts, C classes, D embed_dim."""

    task: JudgedPrompts
    scored_by: str
    prompt_features: Tensor  # (P, D) unit norm
    class_features: Tensor  # (C, D) unit norm
    styles: StyleClassifier | None  # None where prompts ask for none


def make_judge(task: JudgedPrompts, scored_by: str, prompt_features: Tensor, class_features: Tensor, *,
               training: Pictures, training_styles: Sequence[str | None]) -> Judge:
    """Prepare to judge.

    What a style's name means no CLIP need know; so a style is told by its training pictures. How often that is right of real
    pictures is measured beside.

    Args:
      task: what is asked.
      scored_by: name of the scorer.
      prompt_features: (P, D), unit norm.
      class_features: (C, D), unit norm.
      training: N pictures.
      training_styles: N, None where it is not known.

    Raises:
      ValueError: the prompts ask for a style that no training picture has.
    """
    for style in sorted(set(task.styles or ()) - set(training_styles)):
        raise ValueError(f"prompts={task.name} asks for the style {style!r}, and no picture of real=... is known to have it; "
                         "give real=emoji, or other prompts")
    styles = fit_styles(training.style_features, training_styles, sorted(set(task.styles))) if task.styles else None
    return Judge(task, scored_by, prompt_features, class_features, styles)


def fit_styles(features: Tensor, styles: Sequence[str | None], names: list[str]) -> StyleClassifier:
    """Fit a StyleClassifier.

    Args:
      features: (N, F).
      styles: N, None where it is not known.
      names: S, each the style of at least one picture.

    Source: Fisher 1936; Hastie et al., The Elements of Statistical Learning, section 4.3.
    """
    groups = [features[[row for row, other in enumerate(styles) if other == name]].double() for name in names]  # (n, F) each
    means = torch.stack([group.mean(dim=0) for group in groups])  # (S, F)
    within = torch.cat([group - mean for group, mean in zip(groups, means, strict=True)])  # (N, F)
    covariance = within.T @ within / len(within)  # (F, F)
    ridge = RIDGE * covariance.diagonal().mean() * torch.eye(len(covariance), dtype=torch.float64)
    weight = torch.linalg.solve(covariance + ridge, means.T).T  # (S, F)
    return StyleClassifier(names, weight, -(weight * means).sum(dim=1) / 2)


class Copies(NamedTuple):
    """The copying check."""

    nearest: Tensor  # (N,) int64, the training picture that each sample is most like
    cosine: Tensor  # (N,)
    measures: dict[str, Measure]  # of the samples
    real_measures: dict[str, Measure]  # of held-out real pictures


class Judgement(NamedTuple):
    """What a judge says of N samples."""

    judge: Judge
    prompt_of: Tensor  # (N,) int64
    guess: Tensor  # (N,) int64, the class that each is nearest to
    measures: dict[str, dict[str, Measure]]  # whose pictures (of PREFIXES) -> name -> number
    copies: Copies


def judge_samples(judge: Judge, generated: Pictures, prompt_of: Tensor, *, training: Pictures, held_out: Pictures | None = None,
                  real_of_prompts: Pictures | None = None) -> Judgement:
    """Judge samples, and beside them all that they are to be compared with.

    Args:
      judge: from `make_judge`.
      generated: N samples.
      prompt_of: (N,) int64.
      training: M pictures.
      held_out: K real pictures that were not trained on.
      real_of_prompts: P, the real picture of each prompt, where there is one.
    """
    by = judge.scored_by
    every = torch.arange(len(judge.prompt_features))  # (P,)
    retrieved = training.rows(nearest_images(judge.prompt_features, training.features, k=1)[0][:, 0])  # P pictures
    found = copies(generated.features, training.features, held_out.features if held_out else None, scored_by=by)
    measures = {SAMPLES: follows_prompts(judge, generated, prompt_of)
                | looks_real(training.features, generated.features, scored_by=by) | found.measures,
                SHUFFLED: follows_prompts(judge, generated, shuffled(prompt_of)),
                RETRIEVED: follows_prompts(judge, retrieved, every)}
    if held_out is not None:
        measures[REAL] = looks_real(training.features, held_out.features, scored_by=by) | found.real_measures
    if real_of_prompts is not None:
        measures.setdefault(REAL, {}).update(follows_prompts(judge, real_of_prompts, every))
    guess = (generated.features @ judge.class_features.float().T).argmax(dim=1)  # (N,)
    return Judgement(judge, prompt_of, guess, measures, found)


def follows_prompts(judge: Judge, pictures: Pictures, prompt_of: Tensor) -> dict[str, Measure]:
    """How well pictures show what they were asked to show.

    Args:
      judge: from `make_judge`.
      pictures: N.
      prompt_of: (N,) int64, each picture's prompt.

    Returns:
      clip_score and prompt_acc1 (nearest of all P prompts); where prompts are pairs, concept_acc1, style_acc1 and both_acc1.
    """
    task, by = judge.task, judge.scored_by
    found = {"clip_score": clip_score(pictures.features, judge.prompt_features, prompt_of, scored_by=by),
             "prompt_acc1": prompt_accuracy(pictures.features, judge.prompt_features, prompt_of, scored_by=by)}
    if not task.styles:
        return found
    assert judge.styles is not None
    concepts = torch.tensor(task.class_of)[prompt_of]  # (N,)
    styles = torch.tensor([judge.styles.names.index(style) for style in task.styles])[prompt_of]  # (N,)
    classes = torch.arange(len(judge.class_features))  # (C,)
    right_concept = rank_targets(pictures.features, judge.class_features, concepts, classes).rank == 0  # (N,) bool
    right_style = judge.styles(pictures.style_features) == styles  # (N,) bool
    for name, hits in (("concept", right_concept), ("style", right_style), ("both", right_concept & right_style)):
        low, high = clustered_interval(hits, concepts)
        found[f"{name}_acc1"] = Measure(hits.double().mean().item(), len(hits), low, high, by)
    return found


def shuffled(prompt_of: Tensor, *, seed: int = 0) -> Tensor:
    """Give the pictures (N,) each other's prompts, by chance: what accuracy is left has other reasons than the prompts."""
    return prompt_of[torch.randperm(len(prompt_of), generator=torch.Generator().manual_seed(seed))]


def looks_real(real: Tensor, generated: Tensor, *, scored_by: str) -> dict[str, Measure]:
    """Distances of generated pictures (M, D) from real ones (N, D), both of unit norm.

    KID's kernel divides products by D, for features with values around 1: here they get a norm of sqrt(D) for it. CMMD takes
    them as they are. FID is left out below MIN_FID_SAMPLES.
    """
    root = real.shape[1] ** 0.5
    found = {"kid": kernel_distance(root * real, root * generated, metric="kid", scored_by=scored_by),
             "cmmd": kernel_distance(real, generated, metric="cmmd", scored_by=scored_by)}
    if min(len(real), len(generated)) >= MIN_FID_SAMPLES:
        found["fid"] = fid(root * real, root * generated, scored_by=scored_by)
    return found


def copies(generated: Tensor, training: Tensor, held_out: Tensor | None, *, scored_by: str) -> Copies:
    """Compare how near samples come to training pictures with how near real pictures come that were not trained on.

    Args:
      generated: (N, D), unit norm.
      training: (M, D), unit norm.
      held_out: (K, D), unit norm; None leaves the comparison out.
      scored_by: name of the scorer.

    Returns:
      With the measures training_cosine (mean of the nearest) of both, and copied (share of the samples that are nearer than
      COPY_QUANTILE of the held-out pictures; 1 % of these are, too).
    """
    nearest, cosine = (found[:, 0] for found in nearest_images(generated, training, k=1))
    found = Copies(nearest, cosine, {"training_cosine": _mean(cosine, scored_by)}, {})
    if held_out is not None:
        theirs = nearest_images(held_out, training, k=1)[1][:, 0]  # (K,)
        hits = cosine > torch.quantile(theirs, COPY_QUANTILE)  # (N,)
        low, high = clustered_interval(hits, torch.arange(len(hits)))
        found.measures["copied"] = Measure(hits.double().mean().item(), len(hits), low, high, scored_by)
        found.real_measures["training_cosine"] = _mean(theirs, scored_by)
    return found


def _mean(values: Tensor, scored_by: str) -> Measure:
    numbers = values.double().numpy(force=True).astype(np.float64)
    low, high = mean_interval(numbers) if len(numbers) > 1 else (None, None)
    return Measure(float(numbers.mean()), len(numbers), low, high, scored_by)
