"""How well an autoencoder gives pictures back, picture by picture: PSNR and SSIM."""

import torch
import torch.nn.functional as F
from torch import Tensor

WINDOW_SIZE, WINDOW_SIGMA = 11, 1.5  # pixels; Wang et al. 2004, section III C
LUMINANCE_TERM, CONTRAST_TERM = 0.01**2, 0.03**2  # for values in [0, 1]


def psnr(images: Tensor, reconstruction: Tensor) -> Tensor:
    """Measure the peak signal-to-noise ratio of each picture.

    Args:
      images: (B, 3, H, W) in [-1, 1].
      reconstruction: (B, 3, H, W); what lies beyond [-1, 1] is cut, as in a file.

    Returns:
      (B,) dB, infinite for equal pictures.
    """
    error = (_to_unit(images) - _to_unit(reconstruction)).square().mean(dim=(1, 2, 3))  # (B,)
    return -10 * error.log10()


def ssim(images: Tensor, reconstruction: Tensor) -> Tensor:
    """Measure the structural similarity of each picture: mean over channels and over the places of an 11-pixel window.

    Args:
      images: (B, 3, H, W) in [-1, 1], at least 11 pixels a side.
      reconstruction: (B, 3, H, W); what lies beyond [-1, 1] is cut, as in a file.

    Returns:
      (B,), 1 for equal pictures.

    Raises:
      ValueError: the pictures are smaller than the window.

    Source: Wang et al. 2004, equation 13 (IEEE Transactions on Image Processing 13).
    """
    if min(images.shape[-2:]) < WINDOW_SIZE:
        raise ValueError(f"SSIM of pictures of {images.shape[-1]} x {images.shape[-2]} px: its window needs at least "
                         f"{WINDOW_SIZE} px a side; leave it out, or give larger pictures")
    x, y = _to_unit(images), _to_unit(reconstruction)
    mean_x, mean_y = _blur(x), _blur(y)  # (B, 3, H - 10, W - 10) each
    variance_x, variance_y = _blur(x * x) - mean_x**2, _blur(y * y) - mean_y**2
    covariance = _blur(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + LUMINANCE_TERM) / (mean_x**2 + mean_y**2 + LUMINANCE_TERM)
    structure = (2 * covariance + CONTRAST_TERM) / (variance_x + variance_y + CONTRAST_TERM)
    return (luminance * structure).mean(dim=(1, 2, 3))


def _to_unit(images: Tensor) -> Tensor:
    return (images.float().clamp(-1, 1) + 1) / 2


def _blur(images: Tensor) -> Tensor:
    """Weigh each window by a Gaussian, where it lies wholly inside: (B, 3, H, W) -> (B, 3, H - 10, W - 10)."""
    offsets = torch.arange(WINDOW_SIZE, device=images.device, dtype=images.dtype) - WINDOW_SIZE // 2
    window = torch.exp(-offsets.square() / (2 * WINDOW_SIGMA**2))
    window = (window / window.sum()).expand(images.shape[1], 1, 1, -1)  # (3, 1, 1, 11)
    rows = F.conv2d(images, window, groups=images.shape[1])
    return F.conv2d(rows, window.transpose(2, 3), groups=images.shape[1])
