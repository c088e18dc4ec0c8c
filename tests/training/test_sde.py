"""What the stochastic steps do to data whose velocity is known in closed form, and what their log-probabilities are of."""

import math

import pytest
import torch
from torch import Tensor

from model.flow import sampling_sigmas
from training.losses import kernel_kl, velocity_kl
from training.sde import Step, cps_step, log_prob, sde_step

SHIFT = 3.0
MEAN, DEVIATION = 0.5, 0.3  # of Gaussian data
DRAWS = 100_000


def point_velocity(x: Tensor, sigma: Tensor, point: float = MEAN) -> Tensor:
    """Noise minus data, where all data are one point."""
    return (x - (1 - sigma) * point) / sigma - point


def gaussian_velocity(x: Tensor, sigma: Tensor) -> Tensor:
    """Expected noise minus expected data, given x, where data are normal."""
    centred = x - (1 - sigma) * MEAN
    variance = (1 - sigma) ** 2 * DEVIATION**2 + sigma**2
    return sigma / variance * centred - (MEAN + (1 - sigma) * DEVIATION**2 / variance * centred)


def walk(sampler: str, eta: float, steps: int) -> float:
    """Standard deviation of the data drawn in `steps` steps, the last of them without noise.

    Each step is affine in x for Gaussian data, x' = slope x + offset + std noise, so that nothing need be drawn.
    """
    sigmas = sampling_sigmas(steps, SHIFT).double()
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64).view(2, 1, 1, 1)
    variance = 1.0
    for index in range(steps):
        velocity = gaussian_velocity(ends, sigmas[index])
        if index + 1 < steps:
            step = sde_step(sampler, ends, velocity, sigmas, index, eta)
        else:
            step = Step(ends + (sigmas[index + 1] - sigmas[index]) * velocity, torch.zeros(()))
        slope = float(step.mean[1] - step.mean[0])
        variance = slope**2 * variance + float(step.std) ** 2
    return math.sqrt(variance)


@pytest.mark.parametrize("sampler", ["cps_sde", "flow_sde"])
@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_without_noise_a_step_is_eulers(sampler: str, dtype: torch.dtype, most: float):
    draw = torch.Generator().manual_seed(0)
    x, velocity = torch.randn(2, 2, 4, 8, 8, generator=draw, dtype=dtype)
    sigmas = sampling_sigmas(10, SHIFT).to(dtype)
    for index in range(10):
        step = sde_step(sampler, x, velocity, sigmas, index, 0.0)
        assert step.mean.dtype == dtype and float(step.std) == 0
        assert float((step.mean - (x + (sigmas[index + 1] - sigmas[index]) * velocity)).abs().max()) < most


def test_eta_is_the_angle_by_which_cps_turns_old_noise_into_new():
    x = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    after = torch.tensor(0.6, dtype=torch.float64)
    shares = [float(cps_step(x, x, torch.tensor(0.8), after, eta).std / after) for eta in (1 / 3, 0.5, 1.0)]
    assert shares == pytest.approx([0.5, math.sqrt(0.5), 1.0])


@pytest.mark.parametrize("eta", [0.3, 0.7, 1.0])
@pytest.mark.parametrize("steps", [4, 10, 50])
def test_cps_keeps_the_noise_coefficient_on_a_point(eta: float, steps: int):
    draw = torch.Generator().manual_seed(1)
    sigmas = sampling_sigmas(steps, SHIFT)
    x = torch.randn(DRAWS, 1, 1, 1, generator=draw)
    for index in range(steps - 1):
        step = sde_step("cps_sde", x, point_velocity(x, sigmas[index]), sigmas, index, eta)
        x = step.mean + step.std * torch.randn(x.shape, generator=draw)
        ratio = float(x.std() / sigmas[index + 1])
        assert abs(ratio - 1) < 4 / math.sqrt(2 * DRAWS), f"step {index}: {ratio}"
        assert abs(float(x.mean()) - (1 - float(sigmas[index + 1])) * MEAN) < 4 * float(sigmas[index + 1]) / math.sqrt(DRAWS)


@pytest.mark.parametrize("eta", [0.3, 0.7, 1.0])
def test_the_flow_sde_comes_to_the_datas_deviation_no_slower_than_one_over_the_steps(eta: float):
    errors = {steps: abs(walk("flow_sde", eta, steps) - DEVIATION) for steps in (50, 200, 1000)}
    assert errors[1000] < 0.001
    assert max(steps * error for steps, error in errors.items()) < 1.15 * 50 * errors[50], errors


def test_cps_contracts_the_data_and_more_steps_do_not_mend_it():
    """A fact about the sampler, so that nobody trusts its marginal: with eta 1 the data come out a third too narrow."""
    assert walk("cps_sde", 1.0, 50) == pytest.approx(0.1915, abs=5e-4)
    assert walk("cps_sde", 1.0, 200) < walk("cps_sde", 1.0, 1000) < 0.22


def test_the_cps_score_is_the_squared_error_and_its_mean_is_the_variance():
    step = Step(torch.zeros(1, 1, 1, 1), 0.4)
    drawn = 0.4 * torch.randn(DRAWS, 1, 1, 1, generator=torch.Generator().manual_seed(3))
    values = log_prob("cps_sde", step, drawn)
    assert abs(float(values.mean()) + 0.4**2) < 4 * 0.4**2 * math.sqrt(2 / DRAWS)


@pytest.mark.parametrize("sampler", ["cps_sde", "flow_sde"])
def test_the_score_has_no_mean_and_is_the_slope_of_the_log_probability(sampler: str):
    draw = torch.Generator().manual_seed(4)
    x = torch.randn(DRAWS, 1, 1, 1, generator=draw)
    sigmas = sampling_sigmas(10, SHIFT)
    pull = torch.zeros((), requires_grad=True)

    def value(pull: Tensor) -> tuple[Tensor, Step]:
        step = sde_step(sampler, x, gaussian_velocity(x, sigmas[3]) + pull, sigmas, 3, 0.7)
        return log_prob(sampler, step, drawn), step

    with torch.no_grad():
        drawn = torch.zeros(1)
        _, step = value(pull)
        drawn = step.mean + step.std * torch.randn(x.shape, generator=draw)
    values, _ = value(pull)
    (slope,) = torch.autograd.grad(values.mean(), pull)
    with torch.no_grad():
        h = 1e-2
        higher, lower = (value(torch.tensor(side))[0].double() for side in (h, -h))
        each = (higher - lower) / (2 * h)  # exact: the log-probability is a parabola in the velocity
    assert abs(float(each.mean() - slope)) < 1e-4 * max(1.0, float(each.std()))
    assert abs(float(slope)) < 4 * float(each.std()) / math.sqrt(DRAWS)


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_the_flow_sdes_log_probability_is_the_normal_densitys_mean_over_elements(eta: float):
    draw = torch.Generator().manual_seed(5)
    x, velocity, drawn = torch.randn(3, 2, 4, 8, 8, generator=draw, dtype=torch.float64)
    step = sde_step("flow_sde", x, velocity, sampling_sigmas(10, SHIFT).double(), 4, eta)
    expected = torch.distributions.Normal(step.mean, step.std).log_prob(drawn).flatten(1).mean(1)
    torch.testing.assert_close(log_prob("flow_sde", step, drawn), expected, rtol=1e-12, atol=1e-12)


def test_the_exact_kl_is_that_of_two_gaussians_and_what_their_draws_say():
    draw = torch.Generator().manual_seed(6)
    mean, other = torch.randn(2, 3, 4, 2, 2, generator=draw)
    std = torch.tensor(0.7)
    found = kernel_kl(mean, other, std)
    ours, reference = torch.distributions.Normal(mean, std), torch.distributions.Normal(other, std)
    torch.testing.assert_close(found, torch.distributions.kl_divergence(ours, reference).flatten(1).mean(1))

    drawn = mean + std * torch.randn(20_000, *mean.shape, generator=draw)
    each = (ours.log_prob(drawn) - reference.log_prob(drawn)).flatten(2).mean(2)  # (draws, B)
    error = each.std(0) / math.sqrt(len(each))
    assert ((each.mean(0) - found).abs() < 4 * error).all(), (each.mean(0), found)


def test_the_kl_of_a_policy_from_itself_is_0_and_pulls_nowhere():
    for kl in (kernel_kl, velocity_kl):
        same = torch.randn(2, 4, 2, 2, generator=torch.Generator().manual_seed(7), requires_grad=True)
        loss = kl(same, same.detach(), 0.7).sum()
        loss.backward()
        assert loss.item() == 0 and same.grad.abs().max().item() == 0


@pytest.mark.parametrize(("sigma", "after"), [(0.9, 0.8), (0.5, 0.3), (0.3, 0.05)])
def test_cps_at_eta_1_has_the_velocity_kl_times_the_squared_pull_of_the_velocity_on_the_mean(sigma: float, after: float):
    draw = torch.Generator().manual_seed(8)
    x, v, w = torch.randn(3, 2, 4, 8, 8, generator=draw, dtype=torch.float64)
    first, last = (torch.tensor(value, dtype=torch.float64) for value in (sigma, after))
    step, other = (cps_step(x, velocity, first, last, 1.0) for velocity in (v, w))
    pull = ((1 - after) * sigma) ** 2
    exact = kernel_kl(step.mean, other.mean, step.std)
    torch.testing.assert_close(exact.double(), pull * (v - w).pow(2).flatten(1).mean(1) / (2 * after**2), rtol=1e-4, atol=0)
    torch.testing.assert_close(exact.double(), pull * velocity_kl(v, w, step.std).double(), rtol=1e-4, atol=0)
