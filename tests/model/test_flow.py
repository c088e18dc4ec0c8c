"""Closed forms of the path, the sampler and guidance."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from model.flow import interpolate, resolution_shift, sampling_sigmas, shift_sigmas, sigmas_at, velocity_target
from model.sampler import SOLVERS, guided, initial_noise, sample_euler


def test_velocity_is_the_slope_of_the_path():
    latents, noise = torch.randn(2, 4, 16, 8, 8, dtype=torch.float64)
    near, far = torch.full((4,), 0.3, dtype=torch.float64), torch.full((4,), 0.7, dtype=torch.float64)
    slope = (interpolate(latents, noise, far) - interpolate(latents, noise, near)) / 0.4
    torch.testing.assert_close(slope, velocity_target(latents, noise), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shift", [1.0, 2.0, 3.0])
def test_the_shift_keeps_both_ends_and_the_order(shift: float):
    shifted = shift_sigmas(torch.linspace(0, 1, 11), shift)
    assert shifted[0] == 0 and shifted[-1] == 1
    assert (shifted.diff() > 0).all()


def test_the_sampler_is_exact_where_the_velocity_is_constant():
    noise, data = torch.randn(2, 3, 4, 8, 8)
    for steps in (1, 3, 7):
        made = sample_euler(lambda x, s: noise - data, noise, steps, shift=3.0)
        torch.testing.assert_close(made, data, rtol=1e-5, atol=1e-5)


def test_the_sampler_takes_the_steps_of_the_diffusers_scheduler():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=torch.linspace(1, 0, 9)[:-1].tolist())
    theirs = ours = torch.randn(1, 4, 8, 8)
    for step in scheduler.timesteps:
        theirs = scheduler.step(torch.sin(theirs), step, theirs).prev_sample
    ours = sample_euler(lambda x, s: torch.sin(x), ours, 8, shift=3.0)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_logit_normal_timesteps_have_the_quantiles_of_the_logistic_normal():
    sigmas = sigmas_at(torch.tensor([0.1587, 0.5, 0.8413]), "logit_normal", shift=1.0)
    torch.testing.assert_close(torch.logit(sigmas), torch.tensor([-1.0, 0.0, 1.0]), rtol=1e-3, atol=1e-3)


def test_guidance_one_is_the_conditional_branch():
    conditional, unconditional = torch.randn(2, 3, 4)
    torch.testing.assert_close(guided(conditional, unconditional, 1.0), conditional)


def test_noise_of_image_i_does_not_depend_on_its_batch():
    together = initial_noise((4, 8, 8), [5, 6, 7])
    torch.testing.assert_close(together[1:2], initial_noise((4, 8, 8), [6]), rtol=0, atol=0)


def test_sampling_starts_at_noise_and_ends_at_data():
    sigmas = sampling_sigmas(12, 2.0)
    assert len(sigmas) == 13 and sigmas[0] == 1 and sigmas[-1] == 0


@pytest.mark.parametrize("solver", sorted(SOLVERS))
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_every_solver_is_exact_on_the_field_that_points_at_one_image(solver: str, steps: int):
    noise, data = torch.randn(2, 3, 4, 8, 8)

    def velocity(latents: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor:
        return (latents - data) / sigmas.view(-1, 1, 1, 1)

    torch.testing.assert_close(SOLVERS[solver](velocity, noise, steps, 3.0, None), data, rtol=1e-4, atol=1e-4)


def test_the_second_order_solver_comes_closer_than_euler_in_as_many_steps():
    """x' = x - 1 over sigma from 1 to 0 ends at 1 + (x1 - 1) / e."""
    noise = torch.linspace(-2, 2, 64).view(1, 1, 8, 8)
    exact = 1 + (noise - 1) * torch.exp(torch.tensor(-1.0))
    errors = {name: (solver(lambda x, s: x - 1, noise, 8, 1.0, None) - exact).abs().max() for name, solver in SOLVERS.items()}
    assert errors["dpm++"] < 0.5 * errors["euler"]


def test_the_resolution_shift_is_a_line_in_the_logarithm():
    shifts = [resolution_shift(tokens, 256, 4096, 0.5, 1.15) for tokens in (256, 2176, 4096)]
    assert torch.tensor(shifts).log().tolist() == pytest.approx([0.5, 0.825, 1.15])
