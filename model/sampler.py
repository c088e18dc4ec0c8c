"""From noise to latents along the predicted velocity, with guidance, each image from its own seed."""

from collections.abc import Callable, Sequence

import torch
from diffusers import DPMSolverMultistepScheduler
from torch import Tensor

from model.flow import sampling_sigmas


def initial_noise(shape: Sequence[int], seeds: Sequence[int]) -> Tensor:
    """(len(seeds), *shape) float32 on the CPU: image i depends on seed i alone, whatever the batch."""
    return torch.stack([torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def guided(conditional: Tensor, unconditional: Tensor, guidance: float) -> Tensor:
    """Classifier-free guidance: 1 gives the conditional velocity."""
    return unconditional + guidance * (conditional - unconditional)


Velocity = Callable[[Tensor, Tensor], Tensor]
OnStep = Callable[[int, Tensor], None]


def sample_euler(velocity: Velocity, noise: Tensor, steps: int, shift: float, on_step: OnStep | None = None) -> Tensor:
    """Euler steps from sigma 1 to 0. Exact where the velocity is constant along the path.

    Args:
        velocity: (latents (B, C, H, W), sigmas (B,)) -> velocity (B, C, H, W).
        on_step: called with (step, latents) after each step.
    """
    sigmas = sampling_sigmas(steps, shift).to(noise.device)
    latents = noise
    for step in range(steps):
        slope = velocity(latents, sigmas[step].expand(len(latents)))
        latents = latents + (sigmas[step + 1] - sigmas[step]) * slope
        if on_step is not None:
            on_step(step, latents)
    return latents


def sample_dpm(velocity: Velocity, noise: Tensor, steps: int, shift: float, on_step: OnStep | None = None) -> Tensor:
    """DPM-Solver++ of second order (arXiv 2211.01095; diffusers' scheduler) on the same sigmas as Euler: one evaluation a step."""
    sigmas = sampling_sigmas(steps, shift)
    solver = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, solver_order=2, lower_order_final=True)
    solver.set_timesteps(steps)
    solver.sigmas, solver.timesteps = sigmas, sigmas[:-1] * 1000  # its own end at 0.999, where Euler's begin at 1
    latents = noise
    for step in range(steps):
        slope = velocity(latents, sigmas[step].to(noise.device).expand(len(latents)))
        latents = solver.step(slope, solver.timesteps[step], latents, return_dict=False)[0]
        if on_step is not None:
            on_step(step, latents)
    return latents


SOLVERS = {"euler": sample_euler, "dpm++": sample_dpm}
