"""What the stochastic steps do to data whose velocity is known in closed form, and what their log-probabilities are of."""

import math

import pytest
import torch
from torch import Tensor

from model.flow import sampling_sigmas
from training.sde import Step, log_prob, sde_step

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


def walk(sampler: str, eta: float, steps: int, seed: int = 0) -> float:
    """Standard deviation of the data drawn in `steps` steps, the last of them without noise."""
    draw = torch.Generator().manual_seed(seed)
    sigmas = sampling_sigmas(steps, SHIFT)
    x = torch.randn(DRAWS, 1, 1, 1, generator=draw)
    for index in range(steps):
        velocity = gaussian_velocity(x, sigmas[index])
        if index + 1 < steps:
            step = sde_step(sampler, x, velocity, sigmas, index, eta)
            x = step.mean + step.std * torch.randn(x.shape, generator=draw)
        else:
            x = x + (sigmas[index + 1] - sigmas[index]) * velocity
    return float(x.std())


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


def test_the_flow_sde_comes_to_the_datas_marginal_as_steps_get_smaller():
    errors = [abs(walk("flow_sde", 0.7, steps) - DEVIATION) for steps in (25, 50, 100, 200)]
    assert all(after < 0.65 * before for before, after in zip(errors, errors[1:], strict=False)), errors
    assert errors[-1] < 0.01


def test_cps_contracts_the_data_and_more_steps_do_not_mend_it():
    """A fact about the sampler, so that nobody trusts its marginal: with eta 1 the data come out a third too narrow."""
    assert 0.15 < walk("cps_sde", 1.0, 50) < 0.22
    assert 0.15 < walk("cps_sde", 1.0, 200) < 0.23


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
