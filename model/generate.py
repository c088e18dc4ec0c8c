"""Prompts to images: one function for evaluation, the pipeline and the command line, so that all give the same image for a seed."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from model.deepgen import Condition, DeepGen
from model.sampler import guided, initial_noise, sample_euler
from model.vae import decode_latents, encode_images


@torch.no_grad()
def generate(
    model: DeepGen,
    prompts: Sequence[str],
    seeds: Sequence[int],
    size: tuple[int, int],
    reference_images: tuple[Tensor, ...] = (),
    steps: int = 50,
    guidance: float = 4.0,
    on_step: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Images (B, 3, H, W) in about [-1, 1].

    Args:
        seeds: one an image; image i depends on its own prompt, references and seed alone.
        size: (H, W) in pixels.
        reference_images: k tensors (B, 3, h, w) in [-1, 1]; empty generates from text.
        guidance: classifier-free guidance; 1 runs the conditional branch alone.
    """
    condition = model.encode_condition(prompts, reference_images)
    reference_latents = tuple(encode_images(model.vae, pixels) for pixels in reference_images)
    noise = initial_noise(latent_shape(model, size), seeds).to(model.device, model.dit.dtype)
    if guidance == 1.0:

        def velocity(latents: Tensor, sigmas: Tensor) -> Tensor:
            return model.predict_velocity(latents, sigmas, condition, reference_latents)

    else:
        both = Condition.cat([condition, model.encode_condition([""] * len(prompts), reference_images)])
        twice = tuple(torch.cat([latents, latents]) for latents in reference_latents)

        def velocity(latents: Tensor, sigmas: Tensor) -> Tensor:
            slopes = model.predict_velocity(torch.cat([latents, latents]), torch.cat([sigmas, sigmas]), both, twice)
            conditional, unconditional = slopes.chunk(2)
            return guided(conditional, unconditional, guidance)

    latents = sample_euler(velocity, noise, steps, model.timestep_shift, on_step)
    return decode_latents(model.vae, latents)


def latent_shape(model: DeepGen, size: tuple[int, int]) -> tuple[int, int, int]:
    """(C, H, W) of the latent of an image of `size` pixels."""
    config = model.vae.config
    factor = config.downscale if "downscale" in config else 2 ** (len(config.block_out_channels) - 1)
    return config.latent_channels, size[0] // factor, size[1] // factor
