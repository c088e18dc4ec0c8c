"""The rollout of MR-GRPO: images of each prompt by a partly stochastic sampler, and how they came about (paper section 3.3)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from data.loader import Batch
from model.deepgen import Condition, DeepGen
from model.flow import sampling_sigmas
from model.generate import encode_references, latent_shape
from model.sampler import guided
from model.vae import decode_latents, to_uint8
from training.batching import stack_pixels
from training.conditions import Conditions
from training.config import MRGRPOConfig
from training.randomness import generator
from training.rewards.scores import Group
from training.sde import log_prob, sde_step


@dataclass(frozen=True)
class Told:
    """What the DiT is told of N images: their prompts' conditions, the other branch's under guidance, the references' latents."""

    condition: Condition
    unconditional: Condition | None
    references: tuple[Tensor, ...]

    def __getitem__(self, rows: slice | Tensor) -> "Told":
        other = None if self.unconditional is None else self.unconditional[rows]
        return Told(self.condition[rows], other, tuple(latents[rows] for latents in self.references))


@dataclass(frozen=True)
class Rollout:
    """Images of a few prompts, N in all, groups in a row, and what the update needs of how they were made.

    steps: indices of the S trained steps of the sampler. latents[s], next_latents[s] (N, C, H, W) and log_probs[s] (N,) float32 belong to
    step steps[s].
    """

    groups: tuple[Group, ...]
    told: Told
    steps: tuple[int, ...]
    latents: tuple[Tensor, ...]
    next_latents: tuple[Tensor, ...]
    log_probs: tuple[Tensor, ...]

    def __len__(self) -> int:
        return len(self.log_probs[0])

    def only(self, groups: Sequence[int]) -> "Rollout":
        """Of these groups alone."""
        G = len(self) // len(self.groups)
        rows = torch.tensor([group * G + image for group in groups for image in range(G)], device=self.latents[0].device)

        def taken(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return tuple(tensor[rows] for tensor in tensors)

        kept = tuple(self.groups[group] for group in groups)
        return Rollout(kept, self.told[rows], self.steps, taken(self.latents), taken(self.next_latents), taken(self.log_probs))


def trained_steps(config: MRGRPOConfig, update: int) -> tuple[int, ...]:
    """Indices of the sampler's steps that add noise and train in `update`: chosen before the rollout, so that no others are kept.

    The last step is never one: it must be deterministic.
    """
    free = config.rollout_steps - 1
    draw = generator("window", config.seed, update)
    if config.window == "spread":
        return tuple(sorted(torch.randperm(free, generator=draw)[: config.stochastic_steps].tolist()))
    first = 0
    if config.window == "neighbours":
        first = int(torch.randint(free - config.stochastic_steps + 1, (), generator=draw))
    return tuple(range(first, first + config.stochastic_steps))


def velocity_of(wrapped: nn.Module, model: DeepGen, latents: Tensor, sigma: Tensor, told: Told, guidance: float) -> Tensor:
    """Velocity (N, C, H, W) at one sigma, through the module that trains; the unconditional branch has no gradient."""
    sigmas = sigma.expand(len(latents))
    velocity: Tensor = wrapped(latents, sigmas, told.references, condition=told.condition)
    if told.unconditional is None:
        return velocity
    with torch.no_grad():
        other = wrapped(latents, sigmas, told.references, condition=told.unconditional)
    return guided(velocity, other, guidance)


@torch.no_grad()
def roll_out(
    wrapped: nn.Module,
    model: DeepGen,
    conditions: Conditions,
    batch: Batch,
    rows: Sequence[int],
    config: MRGRPOConfig,
    steps: tuple[int, ...],
) -> Rollout:
    """A group of images for each of the prompts in `rows` of the batch.

    Every draw has a generator named by the prompt's place in the stage's stream and the image's in its group, so that neither ranks nor the
    layout of batches change it.
    """
    G = config.group_size
    told = tell(model, conditions, batch, rows, config)
    names = [(batch.positions[row], image) for row in rows for image in range(G)]
    draws = [generator("rollout", config.seed, *name) for name in names]
    shape = latent_shape(model, batch.target_images.shape[1:3])

    def noise() -> Tensor:
        return torch.stack([torch.randn(shape, generator=draw) for draw in draws]).to(model.device)

    latents = noise()
    if config.same_noise:
        latents = latents[::G].repeat_interleave(G, 0)
    sigmas = sampling_sigmas(config.rollout_steps, model.shift_for(shape[1:])).to(model.device)
    kept: list[tuple[Tensor, Tensor, Tensor]] = []
    for index in range(config.rollout_steps):
        velocity = velocity_of(wrapped, model, latents, sigmas[index], told, config.guidance)
        if index in steps:
            gaussian = sde_step(config.sampler, latents, velocity, sigmas, index, config.eta)
            following = gaussian.mean + gaussian.std * noise()
            kept.append((latents, following, log_prob(config.sampler, gaussian, following)))
            latents = following
        else:
            latents = latents + (sigmas[index + 1] - sigmas[index]) * velocity.float()
    images = to_uint8(decode_latents(model.vae, latents)).cpu().numpy()
    groups = tuple(
        Group(
            f"{batch.positions[row]}:{batch.keys[row]}",
            batch.task,
            batch.prompts[row],
            tuple(images[i * G : (i + 1) * G]),
            batch.scenes[row],
            tuple(array[row] for array in batch.reference_images),
            batch.parts[row],
        )
        for i, row in enumerate(rows)
    )
    befores, afters, log_probs = zip(*kept, strict=True)
    return Rollout(groups, told, steps, befores, afters, log_probs)


def tell(model: DeepGen, conditions: Conditions, batch: Batch, rows: Sequence[int], config: MRGRPOConfig) -> Told:
    """Of the images of `rows`: each prompt's condition and references once, shared by its group."""
    pixels = tuple(stack_pixels([array[row] for row in rows], model.device) for array in batch.reference_images)
    unconditional = conditions.of(batch, rows, prompt="") if config.guidance != 1.0 else None
    references = encode_references(model, pixels)
    assert isinstance(references, tuple)
    once = Told(conditions.of(batch, rows), unconditional, references)
    return once[torch.arange(len(rows), device=model.device).repeat_interleave(config.group_size)]
