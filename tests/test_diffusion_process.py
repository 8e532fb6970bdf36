"""Noise levels, targets, estimates and posterior, against diffusers, the papers in float64, and draws."""

import math

import numpy as np
import pytest
import torch

from clipkit.diffusion.noise_schedule import (
    SCHEDULES,
    Levels,
    make_schedule,
    rescale_to_zero_terminal_snr,
    scaled_linear,
    squared_cosine,
    trailing_indices,
)
from clipkit.diffusion.process import (
    TARGETS,
    WEIGHTS,
    check_prediction,
    estimate,
    min_snr_weight,
    posterior,
    prediction_loss,
    q_sample,
)

T = 1000
FITTING = [("scaled_linear", True, "v"), ("scaled_linear", False, "v"), ("scaled_linear", False, "noise"),
           ("squared_cosine", True, "v"), ("scaled_linear", True, "x0"), ("flow", True, "flow"), ("flow", True, "x0")]


def ddpm_scheduler(**options):
    from diffusers import DDPMScheduler

    return DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, **options)


def pictures(seed=0, count=3, dtype=torch.float64):
    return torch.randn(count, 4, 5, 6, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("zero_snr", [False, True])
def test_levels_equal_those_of_diffusers(zero_snr):
    wanted = ddpm_scheduler(rescale_betas_zero_snr=zero_snr).alphas_cumprod.double()
    found = make_schedule("scaled_linear", zero_terminal_snr=zero_snr).alpha.square()
    assert (found - wanted).abs().max() < 2e-6  # diffusers multiplies 1000 factors in fp32


def test_the_cosine_equals_that_of_diffusers():
    from diffusers import DDPMScheduler

    wanted = DDPMScheduler(beta_schedule="squaredcos_cap_v2").alphas_cumprod.double()
    assert (squared_cosine(T) - wanted).abs().max() < 2e-6


def test_levels_are_what_the_papers_write():
    roots = np.linspace(math.sqrt(0.00085), math.sqrt(0.012), T)
    product, wanted = 1.0, []
    for root in roots:
        product *= 1 - root**2
        wanted.append(product)
    assert np.allclose(scaled_linear(T).numpy(), wanted, rtol=1e-12)
    assert math.sqrt(wanted[-1]) == pytest.approx(0.068, abs=5e-4)  # what leaks at the end without rescaling
    rescaled = rescale_to_zero_terminal_snr(scaled_linear(T))
    assert rescaled[-1] == 0 and rescaled[0].item() == pytest.approx(wanted[0], rel=1e-12)
    assert (rescaled.diff() < 0).all()


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_loses_signal_and_ends_in_pure_noise(name):
    schedule = make_schedule(name)
    assert (schedule.alpha.diff() < 0).all() and (schedule.sigma.diff() >= 0).all() and (schedule.sigma > 0).all()
    assert schedule.alpha[-1] == 0 and schedule.sigma[-1] == 1
    on_device = schedule.to(torch.device("cpu"))
    assert on_device.alpha.dtype == torch.float32 and on_device.timesteps.dtype == torch.int64


def test_a_straight_path_is_told_its_noise_in_thousandths():
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler()
    schedule = make_schedule("flow")
    assert torch.allclose(schedule.timesteps.flip(0).float(), scheduler.timesteps)
    assert torch.allclose(schedule.sigma.flip(0).float(), scheduler.sigmas[:T])
    x0, noise, index = pictures(0, dtype=torch.float32), pictures(1, dtype=torch.float32), torch.tensor([0, 500, 999])
    wanted = scheduler.scale_noise(x0, scheduler.timesteps.flip(0)[index], noise)
    assert torch.allclose(q_sample(x0, noise, schedule.to(torch.device("cpu")).at(index)), wanted, atol=1e-6)


def test_trailing_timesteps_equal_those_of_diffusers():
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(timestep_spacing="trailing")
    for num_steps in [*range(1, 61), 100, 250, 999, 1000]:
        scheduler.set_timesteps(num_steps)
        assert trailing_indices(num_steps, T).tolist() == scheduler.timesteps.tolist()[:num_steps], num_steps
    assert trailing_indices(20, T)[0] == T - 1


@pytest.mark.parametrize("zero_snr", [False, True])
def test_noisy_pictures_and_velocities_equal_those_of_diffusers(zero_snr):
    scheduler = ddpm_scheduler(rescale_betas_zero_snr=zero_snr)
    index = torch.tensor([0, 400, 999])
    levels = make_schedule("scaled_linear", zero_terminal_snr=zero_snr).at(index)
    x0, noise = pictures(0), pictures(1)
    # 1 - alphas_cumprod in fp32 leaves 4 digits of the least noise.
    assert torch.allclose(q_sample(x0, noise, levels), scheduler.add_noise(x0, noise, index), atol=1e-4)
    assert torch.allclose(TARGETS["v"](x0, noise, levels), scheduler.get_velocity(x0, noise, index), atol=1e-4)


@pytest.mark.parametrize(("name", "zero_snr", "prediction"), FITTING)
def test_what_a_perfect_network_says_is_read_back_as_picture_and_noise(name, zero_snr, prediction):
    schedule = make_schedule(name, zero_terminal_snr=zero_snr)
    check_prediction(prediction, schedule)
    x0, noise = pictures(0), pictures(1)
    for index in (0, 1, 500, 998, 999):
        levels = schedule.at(torch.tensor([index] * len(x0)))
        x_t = q_sample(x0, noise, levels)
        found = estimate(TARGETS[prediction](x0, noise, levels), x_t, levels, prediction=prediction)
        assert torch.allclose(found.x0, x0, atol=1e-9) and torch.allclose(found.noise, noise, atol=1e-9)


@pytest.mark.parametrize("name", SCHEDULES)
def test_drawn_noisy_pictures_have_the_mean_and_variance_of_their_level(name):
    schedule = make_schedule(name)
    x0 = torch.tensor([-1.0, 0.3, 2.0], dtype=torch.float64).expand(1, 20_000, 3)[..., None]  # (1, draws, 3, 1)
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for index in (0, 300, 999):
        alpha, sigma = schedule.at(index)
        x_t = q_sample(x0, noise, Levels(alpha, sigma))
        tolerance = 5 * sigma.item() / math.sqrt(20_000)  # 5 standard errors
        assert (x_t.mean(dim=1) - alpha * x0[:, 0]).abs().max() < tolerance
        assert (x_t.std(dim=1) - sigma).abs().max() < tolerance


def test_the_noise_may_be_added_one_step_at_a_time():
    betas = 1 - torch.cat([scaled_linear(T)[:1], scaled_linear(T)[1:] / scaled_linear(T)[:-1]])
    generator = torch.Generator().manual_seed(0)
    x = torch.full((20_000,), 2.0, dtype=torch.float64)
    for beta in betas[:300]:
        x = (1 - beta).sqrt() * x + beta.sqrt() * torch.randn(len(x), generator=generator, dtype=torch.float64)
    levels = make_schedule("scaled_linear", zero_terminal_snr=False).at(299)
    assert x.mean().item() == pytest.approx(2 * levels.alpha.item(), abs=0.03)  # 4 standard errors
    assert x.std().item() == pytest.approx(levels.sigma.item(), abs=0.03)  # 4 standard errors


@pytest.mark.parametrize("zero_snr", [False, True])
def test_the_posterior_is_that_of_the_paper(zero_snr):
    schedule = make_schedule("scaled_linear", zero_terminal_snr=zero_snr)
    bar = schedule.alpha.square()
    x0, x_t = pictures(0), pictures(1)
    for t in (1, 500, 998, 999):
        alpha, beta = bar[t] / bar[t - 1], 1 - bar[t] / bar[t - 1]
        mean = bar[t - 1].sqrt() * beta / (1 - bar[t]) * x0 + alpha.sqrt() * (1 - bar[t - 1]) / (1 - bar[t]) * x_t
        found = posterior(x0, x_t, schedule.at(t), schedule.at(t - 1))
        assert torch.allclose(found.mean, mean, rtol=1e-9)
        assert found.variance.item() == pytest.approx(((1 - bar[t - 1]) / (1 - bar[t]) * beta).item(), rel=1e-9)


def test_the_posterior_of_a_straight_path_is_that_of_bayes():
    levels, next_levels = make_schedule("flow").at(699), make_schedule("flow").at(299)
    x0, x_t = torch.tensor(0.7).double(), torch.tensor(-0.4).double()
    # x_s ~ N(alpha_s x0, sigma_s^2) and x_t ~ N(r x_s, sigma_t^2 - r^2 sigma_s^2), r = alpha_t / alpha_s: precisions add up.
    ratio = levels.alpha / next_levels.alpha
    added = levels.sigma**2 - ratio**2 * next_levels.sigma**2
    precision = 1 / next_levels.sigma**2 + ratio**2 / added
    mean = (next_levels.alpha * x0 / next_levels.sigma**2 + ratio * x_t / added) / precision
    found = posterior(x0, x_t, levels, next_levels)
    assert found.mean.item() == pytest.approx(mean.item(), rel=1e-12)
    assert found.variance.item() == pytest.approx(1 / precision.item(), rel=1e-12)


@pytest.mark.parametrize(("name", "zero_snr", "prediction"), FITTING)
@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_are_finite_and_positive_at_every_level(name, zero_snr, prediction, weight, dtype):
    schedule = make_schedule(name, zero_terminal_snr=zero_snr).to(torch.device("cpu"), dtype)
    weights = WEIGHTS[weight](schedule.at(torch.arange(T)), prediction)
    assert weights.isfinite().all() and (weights > 0).all()


def test_min_snr_weights_are_those_of_the_paper():
    bar = ddpm_scheduler().alphas_cumprod.double()
    snr = bar / (1 - bar)
    levels = make_schedule("scaled_linear", zero_terminal_snr=False).at(torch.arange(T))
    wanted = {"noise": snr.clamp(max=5) / snr, "v": snr.clamp(max=5) / (snr + 1), "x0": snr.clamp(max=5)}
    for prediction, values in wanted.items():
        found = min_snr_weight(levels, prediction, floor=0).flatten()
        assert torch.allclose(found, values, rtol=1e-3), prediction  # the reference's levels are fp32


def test_every_prediction_weighs_one_error_of_the_picture_alike():
    for name, prediction in (("scaled_linear", "v"), ("scaled_linear", "noise"), ("flow", "flow")):
        levels = make_schedule(name, zero_terminal_snr=False).at(torch.tensor([200, 600, 900]))
        x_t, output = pictures(0), pictures(1)
        error = pictures(2)
        moved = estimate(output + error, x_t, levels, prediction=prediction).x0 - estimate(
            output, x_t, levels, prediction=prediction).x0
        found = (min_snr_weight(levels, prediction, floor=0) * error.square()).sum()
        assert found.item() == pytest.approx((min_snr_weight(levels, "x0", floor=0) * moved.square()).sum().item())


def test_the_loss_is_the_weighted_mean_in_fp32():
    output, target, weight = pictures(0).bfloat16(), pictures(1), torch.tensor([1.0, 0.5, 2.0])[:, None, None, None]
    wanted = np.mean([weight[row].item() * ((output[row].double() - target[row]) ** 2).mean().item() for row in range(3)])
    found = prediction_loss(output, target, weight)
    assert found.dtype == torch.float32 and found.item() == pytest.approx(wanted, rel=1e-5)


def test_wrong_settings_are_answered_in_one_line():
    diffusion, straight = make_schedule("scaled_linear"), make_schedule("flow")
    with pytest.raises(ValueError, match=r"noise schedule is 'linear'; choose one of .*'scaled_linear'"):
        make_schedule("linear")
    with pytest.raises(ValueError, match="num_timesteps is 1; a schedule needs at least 2"):
        make_schedule("flow", num_timesteps=1)
    for num_steps in (0, 1001):
        with pytest.raises(ValueError, match=f"sampling steps is {num_steps}; give 1 to 1000"):
            trailing_indices(num_steps, T)
    with pytest.raises(ValueError, match=r"prediction is 'epsilon'; choose one of .*'noise'"):
        check_prediction("epsilon", diffusion)
    with pytest.raises(ValueError, match=r"ends in pure noise.*choose the prediction 'v', or zero_terminal_snr=false"):
        check_prediction("noise", diffusion)
    with pytest.raises(ValueError, match="'flow' but the noise schedule is that of diffusion"):
        check_prediction("flow", diffusion)
    with pytest.raises(ValueError, match="'v' but the noise schedule is the straight path"):
        check_prediction("v", straight)
    with pytest.raises(ValueError, match="'noise' but the schedule ends in pure noise"):
        check_prediction("noise", straight)
