"""What is minimised: pure functions of tensors."""

import torch
from torch import Tensor


def flow_matching_loss(velocity: Tensor, target: Tensor) -> Tensor:
    """(B,) mean squared error of each sample, in float32 (paper section 3.2; weight 1 at every sigma)."""
    return (velocity.float() - target.float()).pow(2).flatten(1).mean(1)


def clipped_ratio_loss(log_prob: Tensor, old_log_prob: Tensor, advantages: Tensor, clip_range: float) -> Tensor:
    """(B,) PPO's pessimistic surrogate, negated so that lower is better: max(-A r, -A clip(r, 1 - c, 1 + c))."""
    ratio = torch.exp(log_prob - old_log_prob)
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip_range, 1 + clip_range))


def velocity_kl(velocity: Tensor, reference_velocity: Tensor, std: Tensor | float) -> Tensor:
    """(B,) squared velocity difference over twice the step's variance (MR-GRPO's "v-based" KL to the frozen reference)."""
    return (velocity.float() - reference_velocity.float()).pow(2).flatten(1).mean(1) / (2 * std**2 + 1e-7)


def kernel_kl(mean: Tensor, reference_mean: Tensor, std: Tensor | float) -> Tensor:
    """(B,) exact KL divergence of two Gaussian steps of one deviation, over the number of elements."""
    return ((mean.float() - reference_mean.float()) ** 2 / (2 * std**2)).flatten(1).mean(1)
