"""From noise to a picture: single steps, guidance by a text, and the walk through the levels."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from clipkit.diffusion.noise_schedule import Levels, Schedule, trailing_indices
from clipkit.diffusion.process import Estimate, check_prediction, estimate, posterior

Network = Callable[[Tensor, Tensor, Tensor], Tensor]  # x_t (B, C, h, w), timestep, encoder_hidden_states (B, L, D) -> output
Denoiser = Callable[[Tensor, Tensor], Tensor]  # x_t (B, C, h, w), timestep (scalar) -> output (B, C, h, w)
LEAST_ALPHA = 2**-12  # diffusers gives DPM-Solver's logarithm this in the place of 0, and pictures are to be the same


def ddim_step(now: Estimate, next_levels: Levels, *, eta: float = 0.0, fresh_noise: Tensor | None = None) -> Tensor:
    """Keep the expected picture, and put the expected noise back at a lower level. Returns x_s (B, C, h, w).

    With eta 0 it is also Euler's method on the probability flow: in x / alpha over sigma / alpha for diffusion, in x over
    sigma for flow matching, where it reads x_s = x_t + (sigma_s - sigma_t) * flow.

    Args:
      now: what the network makes of x_t.
      next_levels: of x_s, with less noise than x_t.
      eta: share of the posterior's standard deviation that is drawn anew; 1 is a draw of the posterior.
      fresh_noise: (B, C, h, w), standard normal; needed where eta > 0.

    Source: Song et al. 2021, equations 12 and 16 (arXiv:2010.02502).
    """
    alpha_s, sigma_s = next_levels
    if eta == 0:
        return alpha_s * now.x0 + sigma_s * now.noise
    assert fresh_noise is not None
    std = eta * posterior(now.x0, now.x_t, now.levels, next_levels).variance.sqrt()
    return alpha_s * now.x0 + (sigma_s**2 - std**2).clamp(min=0).sqrt() * now.noise + std * fresh_noise


def ddpm_step(now: Estimate, next_levels: Levels, *, fresh_noise: Tensor) -> Tensor:
    """Draw x_s (B, C, h, w) from the posterior of the expected picture (Ho et al. 2020, algorithm 2, arXiv:2006.11239)."""
    mean, variance = posterior(now.x0, now.x_t, now.levels, next_levels)
    return mean + variance.sqrt() * fresh_noise


def dpmpp_2m_step(now: Estimate, next_levels: Levels, *, before: Estimate | None) -> Tensor:
    """Solve the probability flow over a step in which the expected picture changes linearly in log(alpha / sigma).

    Args:
      now: what the network makes of x_t.
      next_levels: of x_s, with less noise than x_t.
      before: the estimate one step earlier, from which the change is told; None = no change, which is `ddim_step`. The last
        step, to a clean picture, must be one without: it goes to infinity in the logarithm.

    Returns:
      x_s (B, C, h, w).

    Source: Lu et al. 2022, algorithm 2 (arXiv:2211.01095).
    """
    alpha_s, sigma_s = next_levels
    step = _log_ratio(next_levels) - _log_ratio(now.levels)
    x0 = now.x0
    if before is not None:
        step_before = _log_ratio(now.levels) - _log_ratio(before.levels)
        x0 = x0 + step / (2 * step_before) * (now.x0 - before.x0)
    return sigma_s / now.levels.sigma * now.x_t - alpha_s * torch.expm1(-step) * x0


def guided(network: Network, context: Tensor, empty_context: Tensor, *, guidance_scale: float,
           guidance_rescale: float = 0.0) -> Denoiser:
    """Make a denoiser that follows its texts more closely than the network does by itself.

    Both halves, with text and without, go through the network as one batch of twice the size; at guidance_scale 1 the half
    without text is left out.

    Args:
      network: as a U-Net is called.
      context: (B, L, D), encoder_hidden_states of the texts.
      empty_context: (1, L, D) or (B, L, D), of the empty text.
      guidance_scale: 1 = the network alone; more goes further away from what it gives without a text.
      guidance_rescale: 0 to 1, see `rescale_guidance`.
    """
    if guidance_scale == 1:
        return lambda x_t, timestep: network(x_t, timestep, context)
    both = torch.cat([empty_context.expand_as(context), context])  # (2B, L, D)

    def denoise(x_t: Tensor, timestep: Tensor) -> Tensor:
        unconditional, conditional = network(torch.cat([x_t, x_t]), timestep, both).chunk(2)  # (B, C, h, w) each
        output = guide(conditional, unconditional, guidance_scale)
        return rescale_guidance(output, conditional, guidance_rescale) if guidance_rescale else output

    return denoise


def guide(conditional: Tensor, unconditional: Tensor, guidance_scale: float) -> Tensor:
    """Go from the prediction without text through that with text and beyond; 1 is the latter, bit for bit.

    Source: Ho and Salimans 2022 (arXiv:2207.12598); their w is guidance_scale - 1.
    """
    return torch.lerp(unconditional, conditional, guidance_scale)


def rescale_guidance(output: Tensor, conditional: Tensor, guidance_rescale: float) -> Tensor:
    """Bring a guided prediction (B, C, h, w) back to the spread of that with text: 1 wholly, 0 not at all.

    Source: Lin et al. 2023, section 3.4 (arXiv:2305.08891).
    """
    ratio = conditional.std(dim=(1, 2, 3), keepdim=True) / output.std(dim=(1, 2, 3), keepdim=True)  # (B, 1, 1, 1)
    return output * torch.lerp(torch.ones_like(ratio), ratio, guidance_rescale)


SAMPLERS: dict[str, Callable[[Estimate, Levels, Estimate | None, Callable[[], Tensor]], Tensor]] = {
    "ddim": lambda now, next_levels, before, draw: ddim_step(now, next_levels),
    "euler": lambda now, next_levels, before, draw: ddim_step(now, next_levels),
    "ddpm": lambda now, next_levels, before, draw: ddpm_step(now, next_levels, fresh_noise=draw()),
    "dpmpp_2m": lambda now, next_levels, before, draw: dpmpp_2m_step(now, next_levels, before=before),
}


@torch.no_grad()
def sample(denoiser: Denoiser, noise: Tensor, schedule: Schedule, *, sampler: str = "ddim", prediction: str = "v",
           num_steps: int = 50, generators: Sequence[torch.Generator] | None = None) -> Tensor:
    """Walk from pure noise to clean pictures, over trailing timesteps.

    Args:
      denoiser: says of x_t what it was trained to predict.
      noise: (B, C, h, w), standard normal.
      schedule: that of the training, on the device of the noise.
      sampler: one of SAMPLERS.
      prediction: one of process.TARGETS.
      num_steps: evaluations of the denoiser.
      generators: B, one a sample, for the noise that "ddpm" draws on the way.

    Returns:
      (B, C, h, w).

    Raises:
      ValueError: the sampler is unknown, the prediction doesn't fit the schedule, or num_steps is not in 1 .. T.
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"the sampler is {sampler!r}; choose one of {sorted(SAMPLERS)}")
    check_prediction(prediction, schedule)
    if sampler == "dpmpp_2m":
        schedule = schedule._replace(alpha=schedule.alpha.clamp(min=LEAST_ALPHA))
    indices = trailing_indices(num_steps, len(schedule.timesteps)).tolist()
    levels = [*map(schedule.at, indices), Levels(torch.ones_like(schedule.alpha[0]), torch.zeros_like(schedule.sigma[0]))]
    x_t, before = noise, None
    for step, index in enumerate(indices):
        now = estimate(denoiser(x_t, schedule.timesteps[index]), x_t, levels[step], prediction=prediction)
        is_last = step == num_steps - 1
        x_t = SAMPLERS[sampler](now, levels[step + 1], None if is_last else before, lambda: seeded_noise(noise, generators))
        before = now
    return x_t


def seeded_noise(like: Tensor, generators: Sequence[torch.Generator] | None) -> Tensor:
    """Draw standard normal noise, each sample from its own generator: it does not depend on who shares the batch.

    Args:
      like: (B, C, h, w), of which shape, type and device are taken.
      generators: B, on the CPU, so that every device gives the same picture.

    Raises:
      ValueError: there is not one generator for each sample.
    """
    if generators is None or len(generators) != len(like):
        raise ValueError(f"there are {len(generators or ())} generators for {len(like)} samples; give one for each")
    rows = [torch.randn(like.shape[1:], generator=generator, dtype=like.dtype) for generator in generators]  # (C, h, w) each
    return torch.stack(rows).to(like.device)


def _log_ratio(levels: Levels) -> Tensor:
    return torch.log(levels.alpha / levels.sigma)
