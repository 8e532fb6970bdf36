"""Ranking in chunks against the full sorted score matrix."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from clipkit.evaluation.retrieval import best_ranks, rank_targets, recall_at


def ranks_by_sorting(queries: Tensor, targets: Tensor, query_groups: Tensor, target_groups: Tensor) -> Tensor:
    """The slow obvious way: sort the whole matrix (a stable sort keeps the lower index first), find the first hit."""
    order = (queries @ targets.T).argsort(dim=1, descending=True, stable=True)  # (Q, N)
    return torch.stack([(target_groups[row] == group).nonzero()[0, 0]
                        for row, group in zip(order, query_groups, strict=True)])


def several_captions_an_image(generator: torch.Generator, *, tied: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    num_images, captions_per_image = 57, 5
    if tied:  # small whole numbers: exact dot products, many of them equal
        images = torch.randint(-1, 2, (num_images, 4), generator=generator).float()
        texts = torch.randint(-1, 2, (num_images * captions_per_image, 4), generator=generator).float()
    else:
        images = F.normalize(torch.randn(num_images, 16, generator=generator), dim=-1)
        texts = torch.randn(num_images * captions_per_image, 16, generator=generator)
        texts = F.normalize(texts + 2 * images.repeat_interleave(captions_per_image, 0), dim=-1)
    image_ids = torch.arange(num_images)
    return images, texts, image_ids, image_ids.repeat_interleave(captions_per_image)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("chunk_size", [1, 10, 1024])
def test_ranks_equal_those_of_the_full_sort_both_ways_ties_included(tied: bool, chunk_size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    images, texts, image_ids, text_images = several_captions_an_image(generator, tied=tied)
    to_text = best_ranks(images, texts, image_ids, text_images, chunk_size=chunk_size)
    to_image = best_ranks(texts, images, text_images, image_ids, chunk_size=chunk_size)
    assert torch.equal(to_text, ranks_by_sorting(images, texts, image_ids, text_images))
    assert torch.equal(to_image, ranks_by_sorting(texts, images, text_images, image_ids))


@pytest.mark.parametrize("tied", [False, True])
def test_the_first_target_and_its_ties_are_those_of_the_full_sort(tied: bool) -> None:
    images, texts, image_ids, text_images = several_captions_an_image(torch.Generator().manual_seed(2), tied=tied)
    ranking = rank_targets(texts, images, text_images, image_ids, chunk_size=7)
    scores = texts @ images.T
    assert torch.equal(ranking.guess, scores.argsort(dim=1, descending=True, stable=True)[:, 0])
    top_two = scores.topk(2, dim=1).values
    assert torch.equal(ranking.tied, top_two[:, 0] == top_two[:, 1])
    assert ranking.tied.any() == tied


def test_equal_scores_go_to_the_lower_index() -> None:
    constant = torch.ones(4, 3)
    ids = torch.arange(4)
    assert best_ranks(constant, constant, ids, ids).tolist() == [0, 1, 2, 3]


def test_identical_features_are_found_first() -> None:
    features = F.normalize(torch.randn(20, 8, generator=torch.Generator().manual_seed(1)), dim=-1)
    ids = torch.arange(20)
    ranks = best_ranks(features, features, ids, ids)
    assert recall_at(ranks, 1) == 1.0


def test_recall_counts_ranks_below_k() -> None:
    ranks = torch.tensor([0, 4, 5, 9])
    assert [recall_at(ranks, k) for k in (1, 5, 10)] == [0.25, 0.5, 1.0]


@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_features_that_are_not_finite_are_refused(broken: float) -> None:
    features, ids = torch.ones(3, 2), torch.arange(3)
    features[1, 0] = broken
    with pytest.raises(ValueError, match="features hold NaN or infinity"):
        best_ranks(torch.ones(3, 2), features, ids, ids)


def test_a_query_without_a_target_is_refused() -> None:
    with pytest.raises(ValueError, match="a query has no target"):
        best_ranks(torch.ones(2, 2), torch.ones(1, 2), torch.arange(2), torch.arange(1))


@pytest.mark.slow
def test_twenty_five_thousand_captions_of_five_thousand_images_are_ranked_within_a_gigabyte() -> None:
    code = ("import resource, torch; torch.set_num_threads(1)\n"
            "from clipkit.evaluation.retrieval import rank_targets\n"
            "images, texts = torch.randn(5000, 512), torch.randn(25000, 512)\n"
            "ids = torch.arange(5000)\n"
            "rank_targets(texts, images, ids.repeat_interleave(5), ids)\n"
            "rank_targets(images, texts, ids, ids.repeat_interleave(5))\n"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)")
    between = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]], check=True)"
    # Linux counts what the starting process holds as the started one's: a small one stands between it and the tests' own.
    done = subprocess.run([sys.executable, "-c", between, code], capture_output=True, text=True, check=True)
    kilobytes = int(done.stdout) / (1024 if sys.platform == "darwin" else 1)
    assert kilobytes < 1e6  # torch alone is 0.5 GB of it
