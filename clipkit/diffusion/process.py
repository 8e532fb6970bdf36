"""The forward and the reverse process: from a picture to noise, what a network learns to say on the way, and one step back.

Everything is written in the two numbers of a level, x_t = alpha * x_0 + sigma * noise (noise_schedule.py), and so holds for
diffusion and for flow matching alike. Whole trajectories: sampling.py.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from clipkit.diffusion.noise_schedule import Levels, Schedule


class Estimate(NamedTuple):
    """What a network makes of a noisy picture. The four hold together: x_t = alpha * x0 + sigma * noise."""

    x0: Tensor  # (B, C, h, w), the expected picture
    noise: Tensor  # (B, C, h, w), the expected noise
    x_t: Tensor  # (B, C, h, w), what it was made of
    levels: Levels  # of x_t


class Gaussian(NamedTuple):
    """A normal distribution with the same variance in every direction."""

    mean: Tensor  # (B, C, h, w)
    variance: Tensor  # scalar or (B, 1, 1, 1)


def q_sample(x0: Tensor, noise: Tensor, levels: Levels) -> Tensor:
    """Mix pictures with noise: a draw of q(x_t | x_0).

    Args:
      x0: (B, C, h, w).
      noise: (B, C, h, w), standard normal.
      levels: of each sample.

    Source: Ho et al. 2020, equation 4 (arXiv:2006.11239).
    """
    return levels.alpha * x0 + levels.sigma * noise


def noise_target(x0: Tensor, noise: Tensor, levels: Levels) -> Tensor:
    """Ho et al. 2020, equation 14 (arXiv:2006.11239)."""
    return noise


def x0_target(x0: Tensor, noise: Tensor, levels: Levels) -> Tensor:
    """The picture itself."""
    return x0


def v_target(x0: Tensor, noise: Tensor, levels: Levels) -> Tensor:
    """How x_t moves as its angle arctan(sigma / alpha) grows; Salimans and Ho 2022, appendix D (arXiv:2202.00512)."""
    return levels.alpha * noise - levels.sigma * x0


def flow_target(x0: Tensor, noise: Tensor, levels: Levels) -> Tensor:
    """How x_t moves as sigma grows on the straight path; Liu et al. 2022, equation 1 (arXiv:2209.03003)."""
    return noise - x0


TARGETS: dict[str, Callable[[Tensor, Tensor, Levels], Tensor]] = {
    "noise": noise_target, "v": v_target, "flow": flow_target, "x0": x0_target}


def estimate(output: Tensor, x_t: Tensor, levels: Levels, *, prediction: str) -> Estimate:
    """Read what a network said as a picture and a noise: the targets solved for both.

    Args:
      output: (B, C, h, w), what the network gives for x_t.
      x_t: (B, C, h, w).
      levels: of x_t.
      prediction: what it was trained to give, one of TARGETS; the schedule must be one that it fits (`check_prediction`).
    """
    alpha, sigma = levels
    output = output.to(x_t.dtype)
    if prediction == "noise":
        x0, noise = (x_t - sigma * output) / alpha, output
    elif prediction == "x0":
        x0, noise = output, (x_t - alpha * output) / sigma
    elif prediction == "v":
        x0, noise = alpha * x_t - sigma * output, sigma * x_t + alpha * output
    else:
        assert prediction == "flow", prediction
        x0, noise = x_t - sigma * output, x_t + alpha * output
    return Estimate(x0, noise, x_t, levels)


def check_prediction(prediction: str, schedule: Schedule) -> None:
    """Raise ValueError unless the schedule allows what a network is to predict to be read back at every level."""
    if prediction not in TARGETS:
        raise ValueError(f"the prediction is {prediction!r}; choose one of {sorted(TARGETS)}")
    alpha, sigma = schedule.alpha.cpu().double(), schedule.sigma.cpu().double()
    preserving = torch.allclose(alpha**2 + sigma**2, torch.ones_like(alpha), rtol=0, atol=1e-5)
    if prediction == "flow" and preserving:
        raise ValueError("the prediction is 'flow' but the noise schedule is that of diffusion; choose the schedule 'flow', or "
                         "the prediction 'v'")
    if prediction == "v" and not preserving:
        raise ValueError("the prediction is 'v' but the noise schedule is the straight path; choose the prediction 'flow', or "
                         "the schedule 'scaled_linear'")
    if prediction == "noise" and alpha.min() == 0:
        raise ValueError("the prediction is 'noise' but the schedule ends in pure noise, of which the noise says nothing about "
                         "the picture; choose the prediction 'v', or zero_terminal_snr=false")


def posterior(x0: Tensor, x_t: Tensor, levels: Levels, next_levels: Levels) -> Gaussian:
    """Go back to a lower noise level, knowing the picture: q(x_s | x_t, x_0), s < t.

    Args:
      x0: (B, C, h, w).
      x_t: (B, C, h, w).
      levels: of x_t.
      next_levels: of x_s, with less noise.

    Source: Ho et al. 2020, equations 6 and 7 (arXiv:2006.11239), where s = t - 1; for any s Kingma et al. 2021, appendix A
      (arXiv:2107.00630).
    """
    alpha, sigma = levels
    alpha_s, sigma_s = next_levels
    kept = alpha / alpha_s  # of the signal, from s to t
    added = sigma**2 - kept**2 * sigma_s**2  # variance of the noise added from s to t
    mean = (kept * sigma_s**2 * x_t + alpha_s * added * x0) / sigma**2
    return Gaussian(mean, sigma_s**2 * added / sigma**2)


def uniform_weight(levels: Levels, prediction: str) -> Tensor:
    """1 at every level."""
    return torch.ones_like(levels.sigma)


def min_snr_weight(levels: Levels, prediction: str, *, gamma: float = 5.0, floor: float = 0.05) -> Tensor:
    """Weigh the error of the expected picture by its signal-to-noise ratio, at most gamma.

    Args:
      levels: scalars or (B, 1, 1, 1).
      prediction: one of TARGETS; its squared error is turned into that of the picture by the square of d x0 / d output.
      gamma: 5 in the paper.
      floor: least ratio that is reckoned with. Where a schedule ends in pure noise the ratio is 0, and the step that decides
        what the picture is to show would never be trained.

    Returns:
      The weight of the prediction's squared error, finite at every level of every schedule that the prediction fits.

    Source: Hang et al. 2023, section 3.4 (arXiv:2303.09556).
    """
    if prediction == "noise":  # d x0 / d output = -sigma / alpha, and its square cancels the ratio
        return (gamma / levels.snr).clamp(max=1)
    slope_squared = levels.sigma**2 if prediction in ("v", "flow") else 1.0
    return levels.snr.clamp(min=floor, max=gamma) * slope_squared


WEIGHTS: dict[str, Callable[[Levels, str], Tensor]] = {"uniform": uniform_weight, "min_snr": min_snr_weight}


def prediction_loss(output: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Mean of the weighted squared error over samples and their values, in fp32.

    Args:
      output: (B, C, h, w), what the network gives; any float type.
      target: (B, C, h, w), one of TARGETS.
      weight: scalar or (B, 1, 1, 1), one of WEIGHTS.
    """
    return (weight * (output.float() - target.float()).square()).mean()
