"""Generators named by purpose. From torch's global generator, seeded by stage, come only fresh weights and dropout inside LoRA."""

import random
from typing import Any

import numpy as np
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


def global_generators() -> dict[str, Tensor]:
    """The state of this process's global generators as tensors: torch, the CUDA device's, numpy, python."""
    _, words, *rest = tuple[Any, ...](np.random.get_state(legacy=True))
    version, python_words, deviate = random.getstate()
    states = {
        "torch": torch.get_rng_state(),
        "numpy": torch.from_numpy(words.astype(np.int64)),
        "numpy_rest": torch.tensor(rest, dtype=torch.float64),  # position, whether a normal deviate waits, and that deviate
        "python": torch.tensor([version, *python_words], dtype=torch.int64),
        "python_deviate": torch.tensor([] if deviate is None else [deviate], dtype=torch.float64),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def restore_global_generators(states: dict[str, Tensor]) -> None:
    """The inverse of `global_generators`; a CUDA state is left out where there is no device."""
    torch.set_rng_state(states["torch"])
    position, waits, deviate = states["numpy_rest"].tolist()
    np.random.set_state(("MT19937", states["numpy"].numpy().astype(np.uint32), int(position), int(waits), deviate))
    version, *words = states["python"].tolist()
    random.setstate((version, tuple(words), *(states["python_deviate"].tolist() or [None])))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def seed_global_generators(*purpose: str | int) -> None:
    """Seed this process's global generators by name."""
    seed = seed_from(*purpose)
    torch.manual_seed(seed)  # CUDA's too
    np.random.seed(seed % 2**32)
    random.seed(seed)
