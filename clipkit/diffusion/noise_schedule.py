"""Noise levels: how much signal and how much noise there is at each timestep. What is done with them: process.py.

All processes here are x_t = alpha_t * x_0 + sigma_t * noise. They differ in the two numbers alone: in diffusion
alpha^2 + sigma^2 = 1, so that the variance stays; in flow matching alpha + sigma = 1, so that the path is straight.
"""

import math
from collections.abc import Callable
from typing import NamedTuple, Self

import numpy as np
import torch
from torch import Tensor


class Levels(NamedTuple):
    """Signal and noise of x_t: scalars, or (B, 1, 1, 1) where each sample has its own."""

    alpha: Tensor
    sigma: Tensor

    @property
    def snr(self) -> Tensor:
        """Signal-to-noise ratio, a ratio of variances."""
        return (self.alpha / self.sigma).square()


class Schedule(NamedTuple):
    """The T levels that a network is trained at, from little noise to the most. A draw in training is an index into them."""

    timesteps: Tensor  # (T,) int64, what the network is told
    alpha: Tensor  # (T,)
    sigma: Tensor  # (T,) > 0

    def at(self, index: Tensor | int) -> Levels:
        """Look up levels: scalars for one index, (B, 1, 1, 1) for indices (B,)."""
        alpha, sigma = self.alpha[index], self.sigma[index]
        return Levels(alpha, sigma) if alpha.ndim == 0 else Levels(alpha[:, None, None, None], sigma[:, None, None, None])

    def to(self, device: torch.device, dtype: torch.dtype = torch.float32) -> Self:
        """Bring it to where and what the pictures are."""
        return self._replace(timesteps=self.timesteps.to(device), alpha=self.alpha.to(device, dtype),
                             sigma=self.sigma.to(device, dtype))


def scaled_linear(num_timesteps: int, *, beta_start: float = 0.00085, beta_end: float = 0.012) -> Tensor:
    """Return alphas_cumprod (T,), float64, of betas whose roots are evenly spaced.

    Source: Rombach et al. 2022 (arXiv:2112.10752); the two betas are Stable Diffusion's.
    """
    betas = torch.linspace(beta_start**0.5, beta_end**0.5, num_timesteps, dtype=torch.float64).square()  # (T,)
    return (1 - betas).cumprod(dim=0)


def squared_cosine(num_timesteps: int) -> Tensor:
    """Return alphas_cumprod (T,), float64, that fall like a squared cosine; no step takes more than 0.999 of the signal.

    Source: Nichol and Dhariwal 2021, equation 17 (arXiv:2102.09672).
    """
    time = torch.linspace(0, 1, num_timesteps + 1, dtype=torch.float64)  # (T + 1,)
    signal = ((time + 0.008) / 1.008 * math.pi / 2).cos().square()  # (T + 1,)
    betas = (1 - signal[1:] / signal[:-1]).clamp(max=0.999)  # (T,)
    return (1 - betas).cumprod(dim=0)


def rescale_to_zero_terminal_snr(alphas_cumprod: Tensor) -> Tensor:
    """Shift and stretch the roots of alphas_cumprod (T,) so that the first stays and the last is exactly 0.

    Without it, a trace of the picture's mean is left at the last timestep; the network learns to read it there instead of
    the text, and does not find it in the pure noise that sampling starts from.

    Source: Lin et al. 2023, algorithm 1 (arXiv:2305.08891).
    """
    root = alphas_cumprod.sqrt()
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])).square()


def variance_preserving(alphas_cumprod: Tensor) -> Schedule:
    """Make the schedule of a diffusion process: alpha^2 = alphas_cumprod (T,), sigma^2 = 1 - alphas_cumprod."""
    return Schedule(torch.arange(len(alphas_cumprod)), alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt())


def straight_path(num_timesteps: int) -> Schedule:
    """Make the schedule of flow matching: sigma = t / T at the timesteps 1 .. T, alpha = 1 - sigma. float64.

    Source: Liu et al. 2022 (arXiv:2209.03003); Lipman et al. 2022 (arXiv:2210.02747), with time running from picture to noise.
    """
    timesteps = torch.arange(1, num_timesteps + 1)  # (T,)
    sigma = timesteps.double() / num_timesteps
    return Schedule(timesteps, 1 - sigma, sigma)


SCHEDULES: dict[str, Callable[[int, bool], Schedule]] = {
    "scaled_linear": lambda num_timesteps, zero_snr: _diffusion(scaled_linear(num_timesteps), zero_snr),
    "squared_cosine": lambda num_timesteps, zero_snr: _diffusion(squared_cosine(num_timesteps), zero_snr),
    "flow": lambda num_timesteps, zero_snr: straight_path(num_timesteps),  # ends in pure noise by itself
}


def make_schedule(name: str, *, num_timesteps: int = 1000, zero_terminal_snr: bool = True) -> Schedule:
    """Make a schedule by name, in float64 on the CPU; `.to(device)` makes it that of a training run.

    Args:
      name: one of SCHEDULES.
      num_timesteps: T, at least 2.
      zero_terminal_snr: end in pure noise. "flow" always does.

    Raises:
      ValueError: the name is unknown or there are fewer than 2 timesteps.
    """
    if name not in SCHEDULES:
        raise ValueError(f"the noise schedule is {name!r}; choose one of {sorted(SCHEDULES)}")
    if num_timesteps < 2:
        raise ValueError(f"num_timesteps is {num_timesteps}; a schedule needs at least 2, and 1000 is usual")
    return SCHEDULES[name](num_timesteps, zero_terminal_snr)


def trailing_indices(num_steps: int, num_timesteps: int) -> Tensor:
    """Choose the levels that sampling visits: evenly spaced, from the very last one down. (num_steps,) int64.

    Counted from the end, the first step is that from pure noise; counted from the start ("leading"), it would be left out.

    Raises:
      ValueError: num_steps is not in 1 .. num_timesteps.

    Source: Lin et al. 2023, table 2 (arXiv:2305.08891).
    """
    if not 1 <= num_steps <= num_timesteps:
        raise ValueError(f"the number of sampling steps is {num_steps}; give 1 to {num_timesteps}, the timesteps trained at")
    ends = np.arange(num_timesteps, 0, -num_timesteps / num_steps)[:num_steps]  # numpy's, as in diffusers: halves round alike
    return torch.from_numpy(ends.round().astype(np.int64)) - 1


def _diffusion(alphas_cumprod: Tensor, zero_terminal_snr: bool) -> Schedule:
    return variance_preserving(rescale_to_zero_terminal_snr(alphas_cumprod) if zero_terminal_snr else alphas_cumprod)
