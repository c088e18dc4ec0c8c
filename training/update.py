"""The update of MR-GRPO: gradients of the clipped ratio, the KL to the reference and the auxiliary loss (paper section 3.3)."""

import copy
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from model.deepgen import DeepGen
from model.flow import sampling_sigmas
from training.config import MRGRPOConfig
from training.loop import accumulate
from training.losses import clipped_ratio_loss, kernel_kl, velocity_kl
from training.rollout import Rollout, velocity_of
from training.sde import log_prob, sde_step

Backward = Callable[[], Tensor]  # leaves the gradients of a loss in the parameters; returns the loss


class OffPolicy(Exception):
    """Log-probabilities recomputed with unchanged weights differ from the rollout's: the ratio would not be 1."""


def frozen_twin(model: DeepGen) -> DeepGen:
    """The same model with a DiT of its own, which does not train: the reference."""
    twin = copy.copy(model)
    twin._modules = dict(model._modules)
    twin.dit = copy.deepcopy(model.dit).requires_grad_(False)
    return twin


def update(
    accelerator: Accelerator,
    wrapped: nn.Module,
    model: DeepGen,
    reference: DeepGen | None,
    rollouts: Sequence[Rollout],
    advantage: Tensor,
    trained: Sequence[nn.Parameter],
    config: MRGRPOConfig,
    auxiliary: Backward | None,
) -> dict[str, float]:
    """Leave the gradients of one update in `trained`: accumulated over images and steps, equal to the whole batch at once.

    Args:
        reference: the frozen model, where a KL to it is asked for.
        rollouts: this rank's, of as many images in all on each rank.
        advantage: (N,) of their images, in order.
        auxiliary: gradients of the auxiliary loss.

    Raises:
        OffPolicy: a ratio is not 1 although no step has been taken since the rollout.
    """
    row = policy_gradients(accelerator, wrapped, model, reference, rollouts, advantage, config)
    error = row["ratio_error"]
    if not error <= config.clip_range / 10:  # NaN is no 1 either
        worst = max((name for name in row if name.startswith("ratio_error_step_")), key=lambda name: row[name])
        raise OffPolicy(
            f"mr_grpo: |ratio - 1| is {error:.2e} before any step, most at {worst.removeprefix('ratio_error_')}; allowed: a tenth of "
            f"mr_grpo.clip_range, {config.clip_range / 10:.2e}. Set launch.precision: fp32, rollout_prompts x group_size to "
            "micro_batch_size, so that both passes have one shape, or a wider clip range."
        )
    policy_norm = norm_of(trained)
    row |= {"policy_grad_norm": policy_norm}
    if auxiliary is None:
        if config.control:
            taken_off(trained)
        return row
    policy = taken_off(trained)
    loss = float(auxiliary())
    auxiliary_norm = norm_of(trained)
    assert config.auxiliary is not None
    ours, theirs = shares(config.auxiliary.weight, config.auxiliary.share, policy_norm, auxiliary_norm)
    combine(trained, policy, 0.0 if config.control else ours, theirs)
    row |= {"auxiliary_loss": loss, "auxiliary_grad_norm": auxiliary_norm, "auxiliary_factor": theirs}
    row["loss"] = ours * row["loss"] + theirs * loss
    return row


def shares(weight: float | None, share: float | None, policy_norm: float, auxiliary_norm: float) -> tuple[float, float]:
    """Factors of the policy's gradient and of the auxiliary loss's: 1 - lambda and lambda, or 1 and what gives the stated share."""
    if weight is not None:
        return 1 - weight, weight
    assert share is not None
    return 1.0, share * policy_norm / auxiliary_norm if auxiliary_norm > 0 else 0.0


def taken_off(trained: Sequence[nn.Parameter]) -> list[Tensor | None]:
    """The gradients, which are no longer in the parameters."""
    gradients = [parameter.grad for parameter in trained]
    for parameter in trained:
        parameter.grad = None
    return gradients


def combine(trained: Sequence[nn.Parameter], policy: Sequence[Tensor | None], ours: float, theirs: float) -> None:
    """Each gradient: `ours` of the policy's, and `theirs` of what lies in the parameter."""
    for parameter, gradient in zip(trained, policy, strict=True):
        own = parameter.grad
        parts = [factor * part for factor, part in ((ours, gradient), (theirs, own)) if part is not None]
        parameter.grad = sum(parts[1:], parts[0]) if parts else None


def norm_of(trained: Sequence[nn.Parameter]) -> float:
    """Of the gradient over all parameters."""
    gradients = [parameter.grad for parameter in trained if parameter.grad is not None]
    return float(torch.nn.utils.get_total_norm(gradients)) if gradients else 0.0


def policy_gradients(
    accelerator: Accelerator,
    wrapped: nn.Module,
    model: DeepGen,
    reference: DeepGen | None,
    rollouts: Sequence[Rollout],
    advantage: Tensor,
    config: MRGRPOConfig,
) -> dict[str, float]:
    """Gradients of policy loss and KL, each image and step with the same weight; their means over this rank."""
    terms = len(advantage) * config.stochastic_steps
    advantage = advantage.to(model.device)
    sums = {"policy_loss": 0.0, "kl": 0.0, "clip_share": 0.0}
    errors: dict[int, float] = {}
    pieces = list(micro_batches(rollouts, config.micro_batch_size))
    for number, (rollout, first, step, rows) in enumerate(pieces):
        index = rollout.steps[step]
        latents = rollout.latents[step][rows]
        sigmas = sampling_sigmas(config.rollout_steps, model.shift_for(latents.shape[-2:])).to(model.device)
        told = rollout.told[rows]
        with torch.enable_grad(), accumulate(accelerator, wrapped, last=number == len(pieces) - 1):
            velocity = velocity_of(wrapped, model, latents, sigmas[index], told, config.guidance)
            gaussian = sde_step(config.sampler, latents, velocity, sigmas, index, config.eta)
            new = log_prob(config.sampler, gaussian, rollout.next_latents[step][rows])
            old = rollout.log_probs[step][rows]
            policy = clipped_ratio_loss(new, old, advantage[first + rows.start : first + rows.stop], config.clip_range)
            loss = policy.sum() / terms
            if reference is not None:
                with torch.no_grad(), accelerator.autocast():
                    still = velocity_of(reference, model, latents, sigmas[index], told, config.guidance)
                if config.kl == "kernel":
                    kl = kernel_kl(gaussian.mean, sde_step(config.sampler, latents, still, sigmas, index, config.eta).mean, gaussian.std)
                else:
                    kl = velocity_kl(velocity, still, gaussian.std)
                loss = loss + config.kl_weight * kl.sum() / terms
                sums["kl"] += kl.detach().sum().item() / terms
            accelerator.backward(loss)
        apart = (torch.exp(new.detach() - old) - 1).abs()
        sums["policy_loss"] += policy.detach().sum().item() / terms
        sums["clip_share"] += (apart > config.clip_range).float().sum().item() / terms
        errors[index] = greater(errors.get(index, 0.0), float(apart.max()))
    worst = 0.0
    for error in errors.values():
        worst = greater(worst, error)
    row = sums | {"loss": sums["policy_loss"] + config.kl_weight * sums["kl"], "ratio_error": worst}
    return row | {f"ratio_error_step_{index}": error for index, error in sorted(errors.items())}


def greater(a: float, b: float) -> float:
    """The larger; NaN if either is."""
    return math.nan if math.isnan(a) or math.isnan(b) else max(a, b)


def micro_batches(rollouts: Sequence[Rollout], size: int) -> Iterator[tuple[Rollout, int, int, slice]]:
    """Rollout, where its images begin among all, the place of a trained step, and the rows of it that fit one pass."""
    first = 0
    for rollout in rollouts:
        for step in range(len(rollout.steps)):
            for start in range(0, len(rollout), size):
                yield rollout, first, step, slice(start, min(start + size, len(rollout)))
        first += len(rollout)
