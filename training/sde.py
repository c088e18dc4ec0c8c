"""Stochastic steps of the rollout and their log-probabilities, in float32 or better.

MR-GRPO, paper section 3.3; Flow-GRPO; CPS, arXiv 2509.05952.

sigma > next_sigma are neighbours of the sampler's grid; dt = next_sigma - sigma < 0; D is the number of elements of a latent.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Step:
    """Gaussian of the next latents: mean (B, C, H, W) and standard deviation, a scalar."""

    mean: Tensor
    std: Tensor


def precise(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def root(tensor: Tensor) -> Tensor:
    """The square root, by way of float64: the last bit of MKL's in float32 is another on another kind of CPU."""
    return tensor.double().sqrt().to(tensor.dtype)


def flow_sde_step(latents: Tensor, velocity: Tensor, sigma: Tensor, next_sigma: Tensor, eta: float, largest_sigma: Tensor) -> Step:
    """Euler-Maruyama step of the SDE with the flow's marginals; noise scale g = eta sqrt(sigma / (1 - sigma)).

    Args:
        largest_sigma: stands in for sigma = 1, where g is infinite (the second sigma of the grid).
    """
    x, v = precise(latents), precise(velocity)
    dt = next_sigma - sigma
    g = eta * root(sigma / (1 - torch.where(sigma == 1, largest_sigma, sigma)))
    drift = x * (1 + g**2 * dt / (2 * sigma)) + v * (1 + g**2 * (1 - sigma) / (2 * sigma)) * dt
    return Step(drift, g * root(-dt))


def cps_step(latents: Tensor, velocity: Tensor, sigma: Tensor, next_sigma: Tensor, eta: float) -> Step:
    """Coefficient-preserving step: the noise coefficient after it is next_sigma exactly; eta in [0, 1], 0 is the Euler step."""
    x, v = precise(latents), precise(velocity)
    data, noise = x - sigma * v, x + (1 - sigma) * v
    std = next_sigma * math.sin(eta * math.pi / 2)
    return Step((1 - next_sigma) * data + root((next_sigma**2 - std**2).clamp_min(0)) * noise, std)


def sde_step(sampler: str, latents: Tensor, velocity: Tensor, sigmas: Tensor, index: int, eta: float) -> Step:
    """Step `index` of the grid `sigmas` (N + 1,), by sampler name."""
    if sampler == "cps_sde":
        return cps_step(latents, velocity, sigmas[index], sigmas[index + 1], eta)
    return flow_sde_step(latents, velocity, sigmas[index], sigmas[index + 1], eta, sigmas[1])


def log_prob(sampler: str, step: Step, next_latents: Tensor) -> Tensor:
    """(B,) mean over the D elements. CPS uses the squared error without variance, as released; Flow-SDE the Gaussian density."""
    error = (precise(next_latents) - step.mean) ** 2
    if sampler == "cps_sde":
        return -error.flatten(1).mean(1)
    density = -error / (2 * step.std**2) - torch.log(step.std) - 0.5 * math.log(2 * math.pi)
    return density.flatten(1).mean(1)
