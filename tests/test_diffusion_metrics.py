"""PSNR, SSIM, KID, CMMD, FID, scores of prompts and nearest pictures, against torchmetrics, scipy, and the slow way."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from clipkit.diffusion import metrics
from clipkit.diffusion.metrics import clip_score, fid, kernel_distance, nearest_images, prompt_accuracy
from clipkit.diffusion.reconstruction import psnr, ssim


def rows(count, seed, *, dim=6, shift=0.0, unit=False):
    found = torch.randn(count, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + shift
    return F.normalize(found, dim=-1) if unit else found


def pictures(seed, count=3):
    smooth = torch.rand(count, 3, 6, 8, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return F.interpolate(smooth, (24, 32), mode="bilinear")


def test_psnr_and_ssim_of_each_picture_equal_torchmetrics():
    from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

    images = pictures(0)
    reconstruction = images + 0.2 * torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    cut = reconstruction.clamp(-1, 1)
    wanted = [peak_signal_noise_ratio(one[None], other[None], data_range=2.0) for one, other in zip(cut, images, strict=True)]
    assert torch.allclose(psnr(images, reconstruction), torch.stack(wanted), rtol=1e-4)
    _, places = structural_similarity_index_measure((cut + 1) / 2, (images + 1) / 2, data_range=1.0, return_full_image=True)
    wanted = places[..., 5:-5, 5:-5].mean(dim=(1, 2, 3))  # where the window lies wholly inside, as in the paper
    assert torch.allclose(ssim(images, reconstruction), wanted, atol=1e-5)


def test_equal_pictures_are_perfect():
    images = pictures(0)
    assert torch.allclose(ssim(images, images), torch.ones(3)) and (psnr(images, images) == math.inf).all()
    with pytest.raises(ValueError, match="SSIM of pictures of 8 x 10 px: its window needs at least 11 px"):
        ssim(images[:, :, :10, :8], images[:, :, :10, :8])


KERNELS = {"kid": lambda a, b: (a @ b / len(a) + 1) ** 3, "cmmd": lambda a, b: 1000 * math.exp(-((a - b) ** 2).sum() / 200)}


@pytest.mark.parametrize("metric", KERNELS)
def test_kernel_distances_are_the_mean_over_distinct_pairs(metric, monkeypatch):
    monkeypatch.setattr(metrics, "ROWS_AT_ONCE", 4)
    real, generated = rows(9, 0), rows(7, 1, shift=0.5)
    k = KERNELS[metric]
    x, y = real.numpy(), generated.numpy()

    def slow(x, y):
        within = [np.mean([k(z[i], z[j]) for i in range(len(z)) for j in range(len(z)) if i != j]) for z in (x, y)]
        return sum(within) - 2 * np.mean([k(a, b) for a in x for b in y])

    found = kernel_distance(real, generated, metric=metric, scored_by="a")
    assert found.value == pytest.approx(slow(x, y), rel=1e-9) and found.n == 7 and found.scored_by == "a"
    without = [[slow(np.delete(x, i, 0), y) for i in range(9)], [slow(x, np.delete(y, j, 0)) for j in range(7)]]
    spread = math.sqrt(sum((len(one) - 1) * np.var(one) for one in without))
    assert found.ci_high == pytest.approx(found.value + 1.96 * spread, rel=1e-9)
    assert found.ci_low == pytest.approx(found.value - 1.96 * spread, rel=1e-9)


def test_kid_equals_that_of_torchmetrics():
    from torchmetrics.image.kid import poly_mmd

    real, generated = rows(50, 0), rows(50, 1, shift=0.3)
    wanted = poly_mmd(real, generated)
    assert kernel_distance(real, generated, scored_by="").value == pytest.approx(wanted.item(), rel=1e-9)


def test_kid_of_one_distribution_is_zero_on_average_and_its_interval_holds():
    found = [kernel_distance(rows(40, 2 * seed), rows(60, 2 * seed + 1), scored_by="") for seed in range(200)]
    values = np.array([one.value for one in found])
    assert abs(values.mean()) < 3 * values.std() / math.sqrt(len(values))
    covered = np.mean([one.ci_low <= 0 <= one.ci_high for one in found])
    assert covered > 0.9  # of 0.95: the jackknife's variance is too large where both sets are of one kind


def test_fid_equals_scipy_and_needs_enough_pictures():
    from scipy.linalg import sqrtm

    mixing = rows(6, 9)
    real, generated = rows(10_000, 0), rows(10_500, 1, shift=0.1) @ mixing
    x, y = real.numpy(), generated.numpy()
    root = sqrtm(np.cov(x.T) @ np.cov(y.T)).real
    wanted = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(np.cov(x.T) + np.cov(y.T) - 2 * root)
    found = fid(real, generated, scored_by="a")
    assert found.value == pytest.approx(wanted, rel=1e-8) and found.ci_low is None
    assert fid(real, real, scored_by="a").value == pytest.approx(0, abs=1e-9)
    with pytest.raises(ValueError, match=r"fid of 10,000 real and 9,999 generated pictures.*at least 10,000.*use kid"):
        fid(real, generated[:9999], scored_by="a")


def test_the_score_of_prompts_is_their_mean_cosine():
    texts, wanted = rows(4, 0, unit=True), torch.tensor([0, 0, 1, 2, 3, 3])
    images = F.normalize(texts[wanted] + 0.5 * rows(6, 1), dim=-1)
    cosines = [100 * float(images[row] @ texts[wanted[row]]) for row in range(6)]
    found = clip_score(images, texts, wanted, scored_by="judge")
    assert found.value == pytest.approx(np.mean(cosines)) and found.n == 6 and found.scored_by == "judge"
    assert found.ci_low is not None and found.ci_high is not None and found.ci_low < found.value < found.ci_high


def test_pictures_of_their_prompts_are_named_and_shuffled_ones_are_not():
    texts, wanted = torch.eye(50, dtype=torch.float64), torch.arange(50).repeat(2)
    images = F.normalize(texts[wanted] + 0.02 * rows(100, 1, dim=50), dim=-1)
    right = prompt_accuracy(images, texts, wanted, scored_by="judge")
    assert right.value == 1 and right.n == 100 and right.ci_low is not None and right.ci_low < 1
    assert prompt_accuracy(images, texts, wanted.roll(1), scored_by="judge").value == 0
    assert prompt_accuracy(images, texts, torch.cat([wanted[:75], wanted[74:99]]), scored_by="judge").value == 0.75


def test_a_copy_finds_its_original():
    training = rows(30, 0, unit=True)
    generated = torch.cat([training[[7]], rows(4, 1, unit=True)])
    indices, cosines = nearest_images(generated, training, k=2)
    assert indices[0, 0] == 7 and cosines[0, 0].item() == pytest.approx(1)
    wanted = (generated @ training.T).sort(dim=1, descending=True)
    assert torch.equal(indices, wanted.indices[:, :2])
    assert nearest_images(generated, training[:2], k=5)[0].shape == (5, 2)


def test_wrong_numbers_are_answered_in_one_line():
    texts, images, wanted = rows(3, 0, unit=True), rows(4, 1, unit=True), torch.tensor([0, 1, 2, 0])
    with pytest.raises(ValueError, match="there are 4 pictures and 3 prompts of theirs"):
        clip_score(images, texts, wanted[:3], scored_by="")
    with pytest.raises(ValueError, match="numbered 0 to 2; give indices of the 2 text_features"):
        prompt_accuracy(images, texts[:2], wanted, scored_by="")
    with pytest.raises(ValueError, match=r"NaN or infinity.*look at the scoring model"):
        clip_score(images / 0, texts, wanted, scored_by="")
    with pytest.raises(ValueError, match=r"NaN or infinity.*look at the scoring model"):
        kernel_distance(images, images / 0, scored_by="")
    with pytest.raises(ValueError, match=r"the distance is 'is'; choose one of .*'kid'.*, or fid"):
        kernel_distance(images, images, metric="is", scored_by="")
    with pytest.raises(ValueError, match="kid of 4 real and 2 generated pictures: it needs at least 3 of each; give more"):
        kernel_distance(images, images[:2], scored_by="")
    with pytest.raises(ValueError, match="k is 0; ask for at least 1 training picture"):
        nearest_images(images, images, k=0)
