"""Advantages of MR-GRPO (paper section 3.3): each reward normalised within its group, summed by weight, normalised over the batch."""

import torch
from torch import Tensor

from training.rewards.scores import Scores

EPSILON = 1e-4


def advantages(
    scores: Scores,
    weights: Tensor,
    group_size: int,
    noise_floor: Tensor | float,
    clip: float,
    max_gain: float = 3.0,
) -> Tensor:
    """(N,) advantages of MR-GRPO.

    Args:
        scores: N images, groups of `group_size` in a row, of all ranks: the batch normalisation is over the whole batch.
        weights: (K,), or (groups, 1, K) where prompts weigh rewards differently.
        noise_floor: one, or (K,): a group whose values of a reward spread less gives 0 for it, as dividing by noise would make illusory
            advantages.
        max_gain: most that the batch normalisation may enlarge by, so that a batch with few live groups is not blown up.
    """
    valid = (scores.valid & scores.applies).view(-1, group_size, len(scores.names))
    values = scores.values.view_as(valid)
    normal = normalised(values, valid, noise_floor)
    total = (normal * weights).sum(-1).view(-1)
    gain = torch.clamp(1 / (total.std() + EPSILON), max=max_gain)
    return ((total - total.mean()) * gain).clamp(-clip, clip)


def normalised(values: Tensor, valid: Tensor, noise_floor: Tensor | float) -> Tensor:
    """(groups, G, K) values less their group's mean, over its spread; 0 where masked, and where the spread is below the floor."""
    counts = valid.sum(1, keepdim=True)
    mean = (values * valid).sum(1, keepdim=True) / counts.clamp_min(1)
    spread = torch.sqrt((((values - mean) * valid) ** 2).sum(1, keepdim=True) / (counts - 1).clamp_min(1))
    live = valid & (spread > noise_floor)
    return torch.where(live, (values - mean) / (spread + EPSILON), 0.0)
