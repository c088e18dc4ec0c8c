"""Prompts to images: one function for evaluation, the pipeline and the command line, so that all give the same image for a seed."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from model.deepgen import DeepGen, References
from model.sampler import SOLVERS, guided, initial_noise
from model.vae import decode_latents, encode_images


@torch.no_grad()
def generate(
    model: DeepGen,
    prompts: Sequence[str],
    seeds: Sequence[int],
    size: tuple[int, int],
    reference_images: References = (),
    steps: int = 50,
    guidance: float = 4.0,
    on_step: Callable[[int, Tensor], None] | None = None,
    solver: str = "euler",
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    negative_prompt: str = "",
) -> Tensor:
    """Images (B, 3, H, W) in about [-1, 1].

    Args:
        seeds: one an image; image i depends on its own prompt, references and seed alone.
        size: (H, W) in pixels.
        reference_images: in [-1, 1]; empty generates from text.
        guidance: classifier-free guidance; 1 runs the conditional branch alone.
        solver: `euler`, or `dpm++`, which needs fewer steps.
        guidance_interval: sigmas between which guidance acts; outside, the conditional branch runs alone (arXiv 2404.07724).
        negative_prompt: what the other branch reads.
    """
    noise = initial_noise(latent_shape(model, size), seeds).to(model.device, model.dit.dtype)
    references = encode_references(model, reference_images)
    two_branches = guidance != 1.0
    # Both branches are read in one batch: with the released padding a condition depends on its batch.
    negative = [negative_prompt] * len(prompts) if two_branches else []
    both = model.encode_condition([*prompts, *negative], repeat(reference_images, 1 + two_branches))
    alone = both[slice(0, len(prompts))]
    low, high = guidance_interval

    def velocity(latents: Tensor, sigmas: Tensor) -> Tensor:
        if not (two_branches and low <= float(sigmas[0]) <= high):
            return model.predict_velocity(latents, sigmas, alone, references)
        slopes = model.predict_velocity(torch.cat([latents, latents]), torch.cat([sigmas, sigmas]), both, repeat(references, 2))
        conditional, unconditional = slopes.chunk(2)
        return guided(conditional, unconditional, guidance)

    shift = model.shift_for(noise.shape[-2:])
    return decode_latents(model.vae, SOLVERS[solver](velocity, noise, steps, shift, on_step))


def encode_references(model: DeepGen, images: References) -> References:
    """Latents of reference images, in the same form."""
    if isinstance(images, tuple):
        return tuple(encode_images(model.vae, pixels) for pixels in images)
    return [[encode_images(model.vae, image[None])[0] for image in row] for row in images]


def repeat(references: References, times: int) -> References:
    """The references of `times` copies of a batch, one after another."""
    return tuple(torch.cat([batch] * times) for batch in references) if isinstance(references, tuple) else references * times


def latent_shape(model: DeepGen, size: Sequence[int]) -> tuple[int, int, int]:
    """(C, H, W) of the latent of an image of `size` pixels."""
    config = model.vae.config
    factor = config.downscale if "downscale" in config else 2 ** (len(config.block_out_channels) - 1)
    return config.latent_channels, size[0] // factor, size[1] // factor
