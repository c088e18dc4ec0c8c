"""Generators named by purpose. From torch's global generator, seeded by stage, come only fresh weights and dropout inside LoRA."""

import torch
from torch import Tensor

from runtime.keys import seed_from

GOLDEN = 0.6180339887498949


def generator(*purpose: str | int) -> torch.Generator:
    """A CPU generator for one purpose, e.g. `generator("noise", seed, "sft", sample)`."""
    return torch.Generator().manual_seed(seed_from(*purpose))


def sample_noise(like: Tensor, seed: int, stage: str, positions: list[int], purpose: str = "noise") -> Tensor:
    """Noise of the shape of `like` (B, ...): row i belongs to the sample at global position `positions[i]`, on whatever rank."""
    rows = [torch.randn(like.shape[1:], generator=generator(purpose, seed, stage, position)) for position in positions]
    return torch.stack(rows).to(like)


def quantiles(seed: int, stage: str, positions: list[int]) -> Tensor:
    """(B,) float32 in (0, 1): a golden-ratio sequence over sample positions, so that neighbours cover the interval evenly."""
    offset = torch.rand((), generator=generator("quantiles", seed, stage), dtype=torch.float64)
    return ((offset + torch.tensor(positions, dtype=torch.float64) * GOLDEN) % 1.0).float()


def coin_flips(probability: float, purpose: str, seed: int, stage: str, positions: list[int]) -> list[bool]:
    """One flip a sample, by its global position."""
    if probability == 0.0:
        return [False] * len(positions)
    return [bool(torch.rand((), generator=generator(purpose, seed, stage, position)) < probability) for position in positions]
