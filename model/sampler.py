"""From noise to latents along the predicted velocity, with guidance, each image from its own seed."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from model.flow import sampling_sigmas


def initial_noise(shape: Sequence[int], seeds: Sequence[int]) -> Tensor:
    """(len(seeds), *shape) float32 on the CPU: image i depends on seed i alone, whatever the batch."""
    return torch.stack([torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def guided(conditional: Tensor, unconditional: Tensor, guidance: float) -> Tensor:
    """Classifier-free guidance: 1 gives the conditional velocity."""
    return unconditional + guidance * (conditional - unconditional)


def sample_euler(
    velocity: Callable[[Tensor, Tensor], Tensor],
    noise: Tensor,
    steps: int,
    shift: float,
    on_step: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
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
