"""Rectified flow: the path from data to noise, its slope, and where on it to train (paper section 3.2; SD3, arXiv 2403.03206)."""

# B batch, C channels, H height, W width (of the latent); sigma 0 is data, 1 is noise

import math

import torch
from torch import Tensor


def interpolate(latents_BCHW: Tensor, noise_BCHW: Tensor, sigmas_B: Tensor) -> Tensor:
    """Point on the straight path from data (sigma 0) to noise (sigma 1)."""
    sigma = sigmas_B.view(-1, 1, 1, 1)
    return (1 - sigma) * latents_BCHW + sigma * noise_BCHW


def velocity_target(latents_BCHW: Tensor, noise_BCHW: Tensor) -> Tensor:
    """d(path)/d(sigma); constant, because the path is straight."""
    return noise_BCHW - latents_BCHW


def shift_sigmas(sigmas: Tensor, shift: float) -> Tensor:
    """Static shift towards noise: s sigma / (1 + (s - 1) sigma). Keeps 0 and 1 in place."""
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def resolution_shift(tokens: int, base_tokens: int, max_tokens: int, base_shift: float, max_shift: float) -> float:
    """Shift that grows with the image: exp(mu), mu a line through (base_tokens, base_shift) and (max_tokens, max_shift).

    More tokens average more noise away, so that more of it is needed to hide an image (SD3, section 5.3.2; the line is diffusers').
    """
    slope = (max_shift - base_shift) / (max_tokens - base_tokens)
    return math.exp(base_shift + slope * (tokens - base_tokens))


def sigmas_at(quantiles_B: Tensor, sampling: str, shift: float) -> Tensor:
    """Sigmas at which to train, from uniform quantiles in (0, 1).

    Args:
        sampling: "uniform", or "logit_normal" (mean 0, std 1), which trains the middle of the path more.
    """
    if sampling == "logit_normal":
        inside = quantiles_B.clamp(1e-4, 1 - 1e-4)
        quantiles_B = torch.sigmoid(torch.special.ndtri(inside))
    return shift_sigmas(quantiles_B, shift)


def sampling_sigmas(steps: int, shift: float) -> Tensor:
    """(steps + 1,) float32 from 1 down to 0: where the sampler evaluates, and its end."""
    return shift_sigmas(torch.linspace(1, 0, steps + 1), shift)
