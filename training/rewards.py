"""What an image is worth: values and which of them are valid. A missing score is masked, never zero."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from data.verifier import verify


@dataclass(frozen=True)
class Scores:
    """values (N, K) and valid (N, K): row i image i, column k the reward `names[k]`.

    applies (N, K) is False where a reward has no meaning for a prompt (no relation in "a red circle"); such a value is not missing.
    """

    names: tuple[str, ...]
    values: Tensor
    valid: Tensor
    applies: Tensor

    @property
    def coverage(self) -> float:
        """Share of the values that apply which are valid."""
        asked = int(self.applies.sum())
        return float((self.valid & self.applies).sum()) / asked if asked else 1.0


class Reward(Protocol):
    """Scores a batch of images (uint8 H, W, 3) made for these scenes."""

    names: tuple[str, ...]

    def __call__(self, images: Sequence[np.ndarray], scenes: Sequence[dict[str, Any]]) -> Scores: ...


class SceneParts:
    """Parts that the drawn world's verifier reads from an image: count, shape, color, binding, relation, position; word by its letters."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)

    def __call__(self, images: Sequence[np.ndarray], scenes: Sequence[dict[str, Any]]) -> Scores:
        values = torch.zeros(len(images), len(self.names))
        applies = torch.zeros(len(images), len(self.names), dtype=torch.bool)
        for i, (image, scene) in enumerate(zip(images, scenes, strict=True)):
            parts = verify(scene, image, "text_to_image").parts
            for k, name in enumerate(self.names):
                if name in parts:
                    values[i, k], applies[i, k] = parts[name], True
        return Scores(self.names, values, applies.clone(), applies)


def advantages(scores: Scores, weights: Tensor, group_size: int, noise_floor: float, clip: float, max_gain: float = 3.0) -> Tensor:
    """(N,) advantages of MR-GRPO: each reward normalised within its group, summed by weight, then normalised over the batch.

    Args:
        scores: N images, groups of `group_size` in a row.
        weights: (K,), or (groups, 1, K) where prompts weigh rewards differently.
        noise_floor: a group whose values of a reward spread less gives 0 for it: dividing by noise would make illusory advantages.
        max_gain: most that the batch normalisation may enlarge by, so that a batch with few live groups is not blown up.
    """
    valid = (scores.valid & scores.applies).view(-1, group_size, len(scores.names))
    values = scores.values.view_as(valid)
    counts = valid.sum(1, keepdim=True)
    mean = (values * valid).sum(1, keepdim=True) / counts.clamp_min(1)
    spread = torch.sqrt((((values - mean) * valid) ** 2).sum(1, keepdim=True) / (counts - 1).clamp_min(1))
    live = valid & (spread > noise_floor)
    normal = torch.where(live, (values - mean) / (spread + 1e-4), 0.0)
    total = (normal * weights).sum(-1).view(-1)
    gain = torch.clamp(1 / (total.std() + 1e-4), max=max_gain)
    return ((total - total.mean()) * gain).clamp(-clip, clip)
