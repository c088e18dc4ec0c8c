"""Advantages of MR-GRPO (paper section 3.3): each reward normalised within its group, summed by weight, normalised over the batch."""

import torch
from torch import Tensor

from training.rewards.scores import Scores
from training.sde import root

EPSILON = 1e-4


def advantages(
    scores: Scores,
    weights: Tensor,
    group_size: int,
    noise_floor: Tensor | float,
    clip: float,
    max_gain: float = 3.0,
    norm: str = "per_reward",
) -> Tensor:
    """(N,) advantages; 0 for an image without a valid score, and in a group that no reward tells apart.

    Args:
        scores: N images, groups of `group_size` in a row, of all ranks: the batch normalisation is over the whole batch.
        weights: (K,), or (groups, 1, K) where prompts weigh rewards differently.
        noise_floor: one, or (K,): a group whose values of a reward spread less gives 0 for it, as dividing by noise would make illusory
            advantages.
        max_gain: most that the batch normalisation may enlarge by, so that a batch with few live groups is not blown up.
        norm: "per_reward"; or "summed", plain GRPO: the weighted sum normalised within its group, and no batch normalisation.
    """
    asked = scores.applies.view(-1, group_size, len(scores.names)) & (weights > 0)
    valid = asked & scores.valid.view_as(asked)
    values = scores.values.view_as(asked)
    if norm == "summed":
        whole = valid.any(-1, keepdim=True) & (valid == asked).all(-1, keepdim=True)  # a sum that lacks a term is no sum
        sums = (torch.where(valid, values, 0.0) * weights).sum(-1, keepdim=True)
        floor = (noise_floor * weights).sum(-1, keepdim=True) / weights.sum(-1, keepdim=True)
        return torch.where(alive(sums, whole, floor), standardised(sums, whole), 0.0).clamp(-clip, clip).view(-1)
    live = alive(values, valid, noise_floor)
    total = (torch.where(live, standardised(values, valid), 0.0) * weights).sum(-1)
    # What is missing leaves its weight to the rest.
    total = total * (asked * weights).sum(-1) / (valid * weights).sum(-1).clamp_min(EPSILON)
    gain = torch.clamp(1 / (total.std() + EPSILON), max=max_gain)
    return torch.where(live.any(-1), (total - total.mean()) * gain, 0.0).clamp(-clip, clip).view(-1)


def spread_of(values: Tensor, valid: Tensor) -> Tensor:
    """(groups, 1, K) standard deviation of the valid values (groups, G, K) in each group; 0 where there are fewer than two."""
    counts = valid.sum(1, keepdim=True)
    deviations = torch.where(valid, values - mean_of(values, valid), 0.0)
    return root((deviations**2).sum(1, keepdim=True) / (counts - 1).clamp_min(1))


def mean_of(values: Tensor, valid: Tensor) -> Tensor:
    """(groups, 1, K) mean of the valid values (groups, G, K) in each group."""
    return torch.where(valid, values, 0.0).sum(1, keepdim=True) / valid.sum(1, keepdim=True).clamp_min(1)


def alive(values: Tensor, valid: Tensor, noise_floor: Tensor | float) -> Tensor:
    """(groups, G, K): valid values of a reward that spreads by more than its floor in its group."""
    return valid & (spread_of(values, valid) > noise_floor)


def standardised(values: Tensor, valid: Tensor) -> Tensor:
    """(groups, G, K): less the group's mean, over its spread."""
    return (values - mean_of(values, valid)) / (spread_of(values, valid) + EPSILON)
