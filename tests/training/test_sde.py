"""What the stochastic steps do to data whose velocity is known in closed form, and what their log-probabilities are of."""

import math

import pytest
import torch
from torch import Tensor

from model.flow import sampling_sigmas
from training.losses import kernel_kl, velocity_kl
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


@pytest.mark.parametrize(("dtype", "near"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("sampler", ["cps_sde", "flow_sde"])
def test_without_noise_a_whole_walk_is_that_of_euler(sampler: str, dtype: torch.dtype, near: float, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Tensor, "float", lambda tensor: tensor)  # the steps compute in float32 whatever they are given
    sigmas = sampling_sigmas(10, SHIFT).to(dtype)
    ours = theirs = torch.randn(64, 1, 1, 1, dtype=dtype, generator=torch.Generator().manual_seed(0))
    for index in range(10):
        step = sde_step(sampler, ours, gaussian_velocity(ours, sigmas[index]), sigmas, index, 0.0)
        assert float(torch.as_tensor(step.std)) == 0.0
        ours = step.mean
        theirs = theirs + (sigmas[index + 1] - sigmas[index]) * gaussian_velocity(theirs, sigmas[index])
    assert (ours - theirs).abs().max() < near


@pytest.mark.parametrize("sampler", ["cps_sde", "flow_sde"])
def test_the_kernels_kl_is_the_exact_one_of_two_steps(sampler: str):
    x, v, w = torch.randn(3, 4, 2, 3, 3, generator=torch.Generator().manual_seed(1))
    sigmas = sampling_sigmas(8, SHIFT)
    ours, theirs = (sde_step(sampler, x, velocity, sigmas, 3, 0.7) for velocity in (v, w))
    pair = [torch.distributions.Normal(step.mean, step.std) for step in (ours, theirs)]
    exact = torch.distributions.kl_divergence(*pair).flatten(1).mean(1)
    found = kernel_kl(ours.mean, theirs.mean, ours.std)
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-6)
    draws = pair[0].sample((20_000,))
    apart = (pair[0].log_prob(draws) - pair[1].log_prob(draws)).flatten(2).mean(2)
    assert ((apart.mean(0) - found).abs() < 5 * apart.std(0) / 20_000**0.5).all()


def test_with_all_noise_new_the_two_forms_of_the_kl_differ_by_how_much_of_the_data_a_step_shows():
    """CPS at eta 1: the mean moves by (1 - s') s of what the velocity does, which the reference's form leaves out."""
    x, v, w = torch.randn(3, 4, 2, 3, 3, generator=torch.Generator().manual_seed(2))
    sigmas = sampling_sigmas(8, SHIFT)
    for index in range(7):
        sigma, following = sigmas[index], sigmas[index + 1]
        ours, theirs = (sde_step("cps_sde", x, velocity, sigmas, index, 1.0) for velocity in (v, w))
        ratio = kernel_kl(ours.mean, theirs.mean, ours.std) / velocity_kl(v, w, ours.std)
        torch.testing.assert_close(ratio, ((1 - following) * sigma).pow(2).expand(4), rtol=1e-3, atol=1e-6)
