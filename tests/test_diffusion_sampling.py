"""Samplers and guidance: against diffusers on whole trajectories, and on a Gaussian whose exact score is known."""

import pytest
import torch

from clipkit.diffusion.noise_schedule import Levels, Schedule, make_schedule
from clipkit.diffusion.process import TARGETS, estimate, posterior
from clipkit.diffusion.sampling import (
    SAMPLERS,
    ddim_step,
    dpmpp_2m_step,
    guide,
    guided,
    rescale_guidance,
    sample,
    seeded_noise,
)

# diffusers hands tensors to numpy in a way that numpy 2 warns of.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning")

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "timestep_spacing": "trailing"}
PREDICTION_TYPES = {"noise": "epsilon", "v": "v_prediction", "x0": "sample", "flow": "flow_prediction"}


def network(x_t, timestep):
    """Some smooth function of what a network sees."""
    return torch.sin(1.3 * x_t) + 0.3 * x_t.roll(1, dims=-1) * torch.cos(timestep.to(x_t.dtype) / 300)


def noise(count=1, seed=0, dtype=torch.float32):
    return torch.randn(count, 4, 5, 6, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def walk_with_diffusers(scheduler, num_steps, *, generator=None):
    scheduler.set_timesteps(num_steps)
    x_t = noise()
    for timestep in scheduler.timesteps:
        options = {} if generator is None else {"generator": generator}
        x_t = scheduler.step(network(x_t, timestep), timestep, x_t, return_dict=False, **options)[0]
    return x_t


def walk(sampler, prediction, num_steps, *, zero_snr, generator=None):
    schedule = make_schedule("scaled_linear", zero_terminal_snr=zero_snr).to(torch.device("cpu"))
    return sample(network, noise(), schedule, sampler=sampler, prediction=prediction, num_steps=num_steps,
                  generators=None if generator is None else [generator])


@pytest.mark.parametrize(("prediction", "zero_snr"), [("v", True), ("v", False), ("noise", False), ("x0", False)])
@pytest.mark.parametrize("num_steps", [1, 10, 25])
def test_trajectories_equal_those_of_diffusers(prediction, zero_snr, num_steps):
    from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler

    options = {**BETAS, "prediction_type": PREDICTION_TYPES[prediction], "rescale_betas_zero_snr": zero_snr}
    # Levels of diffusers are fp32 products; one step from pure noise by the noise divides by alpha = 0.07.
    close = {"rtol": 1e-3, "atol": 1e-3}
    ddim = walk_with_diffusers(DDIMScheduler(**options, clip_sample=False, set_alpha_to_one=True), num_steps)
    torch.testing.assert_close(walk("ddim", prediction, num_steps, zero_snr=zero_snr), ddim, **close)
    ddpm = walk_with_diffusers(DDPMScheduler(**options, clip_sample=False), num_steps,
                               generator=torch.Generator().manual_seed(5))
    found = walk("ddpm", prediction, num_steps, zero_snr=zero_snr, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(found, ddpm, **close)
    solver = walk_with_diffusers(DPMSolverMultistepScheduler(**options, algorithm_type="dpmsolver++"), num_steps)
    torch.testing.assert_close(walk("dpmpp_2m", prediction, num_steps, zero_snr=zero_snr), solver, **close)


def test_ddim_is_euler_on_the_probability_flow():
    from diffusers import EulerDiscreteScheduler

    scheduler = EulerDiscreteScheduler(**BETAS)
    scheduler.set_timesteps(20)
    schedule = make_schedule("scaled_linear", zero_terminal_snr=False).to(torch.device("cpu"))
    scaled = noise() / schedule.alpha[-1]  # x_t / alpha
    for timestep in scheduler.timesteps:
        output = network(scheduler.scale_model_input(scaled, timestep), timestep)
        scaled = scheduler.step(output, timestep, scaled, return_dict=False)[0]
    found = sample(network, noise(), schedule, sampler="euler", prediction="noise", num_steps=20)
    torch.testing.assert_close(found, scaled, rtol=1e-3, atol=1e-3)


def test_flow_matching_goes_as_in_diffusers():
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=[1 - step / 20 for step in range(20)])
    wanted = noise()
    for timestep in scheduler.timesteps:
        wanted = scheduler.step(network(wanted, timestep), timestep, wanted, return_dict=False)[0]
    schedule = make_schedule("flow").to(torch.device("cpu"))
    found = sample(network, noise(), schedule, sampler="euler", prediction="flow", num_steps=20)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_the_second_order_step_of_a_flow_is_that_of_diffusers():
    from diffusers import DPMSolverMultistepScheduler

    scheduler = DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")
    scheduler.set_timesteps(10)
    x_t = wanted = noise()
    before = None
    for step, timestep in enumerate(scheduler.timesteps):
        wanted = scheduler.step(network(wanted, timestep), timestep, wanted, return_dict=False)[0]
        levels, next_levels = (Levels(1 - sigma, sigma) for sigma in scheduler.sigmas[step:step + 2])
        now = estimate(network(x_t, timestep), x_t, levels, prediction="flow")
        x_t = dpmpp_2m_step(now, next_levels, before=None if step == 9 else before)
        before = now
        torch.testing.assert_close(x_t, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["scaled_linear", "flow"])
def test_ddim_with_eta_one_draws_from_the_posterior(name):
    schedule, fresh = make_schedule(name), noise(seed=1, dtype=torch.float64)
    for index, next_index in ((999, 949), (500, 300), (40, 0)):
        levels, next_levels = schedule.at(index), schedule.at(next_index)
        now = estimate(noise(seed=2, dtype=torch.float64), noise(dtype=torch.float64), levels, prediction="x0")
        mean, variance = posterior(now.x0, now.x_t, levels, next_levels)
        found = ddim_step(now, next_levels, eta=1.0, fresh_noise=fresh)
        torch.testing.assert_close(found, mean + variance.sqrt() * fresh, rtol=1e-9, atol=1e-9)


MEAN = torch.tensor([0.5, -1.0], dtype=torch.float64)
COVARIANCE = torch.tensor([[0.6, 0.35], [0.35, 0.4]], dtype=torch.float64)


def exact_denoiser(schedule: Schedule, prediction: str):
    """What a perfect network says where the two channels of a pixel are one draw of N(MEAN, COVARIANCE)."""
    def denoise(x_t, timestep):
        levels = schedule.at(int((schedule.timesteps == timestep).nonzero()))
        alpha, sigma = levels
        gain = alpha * COVARIANCE @ torch.linalg.inv(alpha**2 * COVARIANCE + sigma**2 * torch.eye(2, dtype=torch.float64))
        offset = MEAN - alpha * gain @ MEAN
        x0 = torch.einsum("dc,bchw->bdhw", gain, x_t) + offset[:, None, None]
        return TARGETS[prediction](x0, (x_t - alpha * x0) / sigma, levels)

    return denoise


CASES = [("scaled_linear", True, "v"), ("scaled_linear", False, "noise"), ("squared_cosine", True, "v"), ("flow", True, "flow")]


@pytest.mark.parametrize(("name", "zero_snr", "prediction"), CASES)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_gaussian_is_sampled_back_with_its_mean_and_covariance(sampler, name, zero_snr, prediction):
    schedule = make_schedule(name, zero_terminal_snr=zero_snr)
    denoiser, last = exact_denoiser(schedule, prediction), schedule.at(-1)
    # What the forward process ends in; standard normal only where it ends in pure noise.
    spread = torch.linalg.cholesky(last.alpha**2 * COVARIANCE + last.sigma**2 * torch.eye(2, dtype=torch.float64))

    def sampled(normal, generators=None):
        start = (last.alpha * MEAN)[:, None, None] + torch.einsum("dc,bchw->bdhw", spread, normal)
        return sample(denoiser, start, schedule, sampler=sampler, prediction=prediction, generators=generators,
                      num_steps=500 if sampler == "ddpm" else 250)

    if sampler == "ddpm":
        normal = torch.randn(1, 2, 100, 100, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        found = sampled(normal, [torch.Generator().manual_seed(1)]).reshape(2, -1)
        mean, covariance = found.mean(dim=1), found.cov()
    else:  # the map from noise to picture is affine, so its mean and covariance are known without draws
        corners = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)[:, :, None, None]
        found = sampled(corners)[:, :, 0, 0]
        mean, matrix = found[0], (found[1:] - found[0]).T
        covariance = matrix @ matrix.T
    # The last step leaves out the variance of its level; and first-order samplers shrink the spread by O(1 / steps).
    tolerance = 0.004 if sampler == "dpmpp_2m" else 0.03
    assert (mean - MEAN).abs().max() < tolerance and (covariance - COVARIANCE).abs().max() < tolerance


def test_one_step_from_pure_noise_gives_the_expected_picture():
    schedule = make_schedule("scaled_linear")
    for sampler in ("ddim", "dpmpp_2m"):
        found = sample(exact_denoiser(schedule, "v"), noise(dtype=torch.float64)[:, :2], schedule, sampler=sampler, num_steps=1)
        assert torch.allclose(found, MEAN[:, None, None].expand_as(found), atol=1e-3)


def test_guidance_of_one_is_none_and_more_goes_beyond():
    conditional, unconditional = noise(3, 1), noise(3, 2)
    assert torch.equal(guide(conditional, unconditional, 1.0), conditional)
    wanted = unconditional + 3.5 * (conditional - unconditional)
    torch.testing.assert_close(guide(conditional, unconditional, 3.5), wanted, rtol=1e-5, atol=1e-5)
    assert torch.equal(rescale_guidance(wanted, conditional, 0.0), wanted)
    spread = rescale_guidance(wanted, conditional, 1.0).std(dim=(1, 2, 3))
    torch.testing.assert_close(spread, conditional.std(dim=(1, 2, 3)))
    half = torch.stack([0.7 * row * of.std() / row.std() + 0.3 * row for row, of in zip(wanted, conditional, strict=True)])
    torch.testing.assert_close(rescale_guidance(wanted, conditional, 0.7), half)


def test_a_guided_network_sees_both_halves_as_one_batch():
    sizes = []

    def unet(x_t, timestep, context):
        sizes.append(len(x_t))
        return x_t * context.mean(dim=(1, 2))[:, None, None, None] + timestep

    x_t, timestep = noise(3), torch.tensor(7)
    context, empty = torch.randn(3, 6, 8, generator=torch.Generator().manual_seed(0)), torch.full((1, 6, 8), 0.5)
    alone, without = unet(x_t, timestep, context), unet(x_t, timestep, empty.expand_as(context))
    sizes.clear()
    assert torch.equal(guided(unet, context, empty, guidance_scale=1)(x_t, timestep), alone)
    found = guided(unet, context, empty, guidance_scale=3, guidance_rescale=0.7)(x_t, timestep)
    wanted = rescale_guidance(guide(alone, without, 3), alone, 0.7)
    torch.testing.assert_close(found, wanted)
    assert sizes == [3, 6]


def test_a_sample_does_not_depend_on_its_batch():
    def generators(rows):
        return [torch.Generator().manual_seed(100 + row) for row in rows]

    schedule, start = make_schedule("scaled_linear").to(torch.device("cpu")), seeded_noise(noise(4), generators(range(4)))
    whole = sample(network, start, schedule, sampler="ddpm", num_steps=5, generators=generators(range(4)))
    parts = [sample(network, start[rows], schedule, sampler="ddpm", num_steps=5, generators=generators(rows))
             for rows in ([0, 1, 2], [3])]
    assert torch.equal(whole, torch.cat(parts))


def test_wrong_samplers_and_missing_generators_are_answered_in_one_line():
    schedule = make_schedule("scaled_linear").to(torch.device("cpu"))
    with pytest.raises(ValueError, match=r"sampler is 'plms'; choose one of \['ddim', 'ddpm', 'dpmpp_2m', 'euler'\]"):
        sample(network, noise(), schedule, sampler="plms")
    with pytest.raises(ValueError, match="there are 0 generators for 1 samples; give one for each"):
        sample(network, noise(), schedule, sampler="ddpm")
    with pytest.raises(ValueError, match="prediction is 'flow' but the noise schedule is that of diffusion"):
        sample(network, noise(), schedule, prediction="flow")
