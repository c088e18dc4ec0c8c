"""DeepGen: the parts joined. prompt + references -> condition -> velocity."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, Qwen2_5_VLForConditionalGeneration

from model import vlm as qwen
from model.config import ModelConfig, ResolutionShift
from model.connector import StackedChannelBridging
from model.dit import DeepGenTransformer, build_dit
from model.flow import resolution_shift
from model.offload import bring, device_of
from model.prompts import SPECIAL_TOKENS, prompt_tokens
from model.vae import build_vae

# References of a batch: k tensors (B, C, H, W) where every row has as many of the same sizes, else a list with each row's own (C, H, W).
References = tuple[Tensor, ...] | list[list[Tensor]]


def rows_of(references: References, count: int) -> list[list[Tensor]]:
    """Each row's own references."""
    if isinstance(references, list):
        return references
    return [[batch[row] for batch in references] for row in range(count)]


def stacked(rows: list[list[Tensor]]) -> References:
    """The references of a batch as k tensors where every row has as many of the same sizes, else as they are."""
    shapes = {tuple(reference.shape for reference in row) for row in rows}
    return tuple(torch.stack(column) for column in zip(*rows, strict=True)) if len(shapes) == 1 else rows


@dataclass(frozen=True)
class Condition:
    """What the DiT is told: prompt_embeds (B, L, D), pooled_prompt_embeds (B, P), prompt_lengths (B,) of real tokens."""

    prompt_embeds: Tensor
    pooled_prompt_embeds: Tensor
    prompt_lengths: Tensor

    @property
    def mask(self) -> Tensor | None:
        """(B, L), True where a token is real; None where all are."""
        L = self.prompt_embeds.shape[1]
        mask = torch.arange(L, device=self.prompt_lengths.device) < self.prompt_lengths[:, None]
        return None if bool(mask.all()) else mask

    def __getitem__(self, rows: Tensor | slice) -> "Condition":
        return Condition(self.prompt_embeds[rows], self.pooled_prompt_embeds[rows], self.prompt_lengths[rows])

    @staticmethod
    def cat(conditions: Sequence["Condition"]) -> "Condition":
        """One batch of several, padded to the longest."""
        longest = max(c.prompt_embeds.shape[1] for c in conditions)
        padded = [nn.functional.pad(c.prompt_embeds, (0, 0, 0, longest - c.prompt_embeds.shape[1])) for c in conditions]
        return Condition(
            torch.cat(padded), torch.cat([c.pooled_prompt_embeds for c in conditions]), torch.cat([c.prompt_lengths for c in conditions])
        )


class DeepGen(nn.Module):
    """The model that trains. The autoencoder stays outside of its forward pass."""

    def __init__(
        self,
        vlm: Qwen2_5_VLForConditionalGeneration,
        connector: StackedChannelBridging,
        dit: DeepGenTransformer,
        vae: Any,
        tokenizer: PreTrainedTokenizerBase,
        timestep_shift: float,
        max_prompt_tokens: int,
        resolution_shift: ResolutionShift | None = None,
    ) -> None:
        super().__init__()
        self.vlm, self.connector, self.dit = vlm, connector, dit
        self.vae: Any = vae  # AutoencoderKL or LinearAutoencoder
        self.tokenizer, self.max_prompt_tokens = tokenizer, max_prompt_tokens
        self.timestep_shift, self.resolution_shift = timestep_shift, resolution_shift
        self.train_vlm = False

    @property
    def device(self) -> torch.device:
        return device_of(self.connector)

    def shift_for(self, size: Sequence[int]) -> float:
        """Shift of the sigmas for a latent of `size` (H, W): the static one, or that of its number of tokens."""
        if self.resolution_shift is None:
            return self.timestep_shift
        return resolution_shift(size[0] * size[1] // self.dit.config.patch_size**2, **self.resolution_shift.model_dump())

    def encode_condition(self, prompts: Sequence[str], reference_images: References = (), reference_tokens: References = ()) -> Condition:
        """Prompts and reference images in [-1, 1] -> Condition. reference_tokens, if given, are (tokens, V) of each image, as the vision
        tower makes them: it is not run, and of the images only their sizes matter.

        With padding `masked` a row's condition depends on that row alone: padding is masked in VLM, connector, mean and DiT.
        With `reference` padding stands on the left and is read as if it were prompt, as the published weights were trained.
        """
        by_row = rows_of(reference_images, len(prompts))
        tokens = [
            prompt_tokens(
                self.tokenizer, prompt, [qwen.image_token_count(self.vlm, *image.shape[-2:]) for image in images], self.max_prompt_tokens
            )
            for prompt, images in zip(prompts, by_row, strict=True)
        ]
        seen = [image for row in rows_of(reference_tokens, len(prompts)) for image in row]
        return self.encode_tokens(tokens, by_row, torch.cat(seen) if seen else None)

    def encode_tokens(
        self, tokens: list[list[int]], reference_images: Sequence[Sequence[Tensor]], image_embeds: Tensor | None = None
    ) -> Condition:
        """Token ids of each row's chat turn, and its images (3, H, W), or these as (all image tokens, V) too -> Condition."""
        bring(self.vlm)
        think_tokens, config = self.connector.think_tokens.to(self.vlm.device), self.connector.config
        released = config.padding == "reference"
        pad = self.tokenizer.pad_token_id
        batch = qwen.prepare_prompts(self.vlm, tokens, reference_images, len(think_tokens), pad, released, image_embeds)
        states, mask = qwen.stacked_hidden_states(self.vlm, batch, think_tokens, tuple(config.stacked_layers), self.train_vlm)
        if released:
            mask = torch.ones_like(mask)
        prompt_embeds, pooled = self.connector(states.to(self.connector.dtype), None if released else mask)
        return Condition(prompt_embeds, pooled, mask.sum(1))

    def predict_velocity(self, latents: Tensor, sigmas: Tensor, condition: Condition, reference_latents: References = ()) -> Tensor:
        """Velocity (B, C, H, W) at latents (B, C, H, W) and sigmas (B,) in [0, 1], of targets of one size with any references."""
        if isinstance(reference_latents, tuple):
            return self.dit(
                latents, condition.prompt_embeds, condition.pooled_prompt_embeds, sigmas * 1000, reference_latents, condition.mask
            )
        return torch.stack(self.predict_velocities(list(latents), sigmas, condition, reference_latents))

    def predict_velocities(
        self, latents: Sequence[Tensor], sigmas: Tensor, condition: Condition, reference_latents: Sequence[Sequence[Tensor]]
    ) -> list[Tensor]:
        """Velocities (C, H, W) of targets of any sizes with any references."""
        bring(self.dit)
        lengths = condition.prompt_lengths.tolist()
        return self.dit.forward_ragged(
            latents, condition.prompt_embeds, condition.pooled_prompt_embeds, sigmas * 1000, reference_latents, lengths
        )

    def forward(
        self,
        latents: Tensor,
        sigmas: Tensor,
        reference_latents: References = (),
        prompts: Sequence[str] | None = None,
        reference_images: References = (),
        condition: Condition | None = None,
        reference_tokens: References = (),
    ) -> Tensor:
        """Velocity, from prompts or from a condition computed before. Training calls this, so that wrappers see every gradient.

        The two steps are called by the class: a model in shards has, for those who call them from outside, methods that gather first.
        """
        if condition is None:
            assert prompts is not None, "forward needs prompts or a condition"
            condition = DeepGen.encode_condition(self, prompts, reference_images, reference_tokens)
        return DeepGen.predict_velocity(self, latents, sigmas, condition, reference_latents)


def build_deepgen(config: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> DeepGen:
    """Every part with fresh weights; seed torch before calling."""
    token_ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    return DeepGen(
        vlm=qwen.build_vlm(config.vlm, token_ids),
        connector=build_connector(config),
        dit=build_dit(config.dit, config.vae.latent_channels),
        vae=build_vae(config.vae),
        tokenizer=tokenizer,
        timestep_shift=config.timestep_shift,
        max_prompt_tokens=config.vlm.max_prompt_tokens,
        resolution_shift=config.resolution_shift,
    )


def build_connector(config: ModelConfig) -> StackedChannelBridging:
    return StackedChannelBridging(
        vlm_hidden_size=config.vlm.hidden_size,
        stacked_layers=config.vlm.stacked_layers,
        num_think_tokens=config.connector.num_think_tokens,
        hidden_size=config.connector.hidden_size,
        intermediate_size=config.connector.intermediate_size,
        layers=config.connector.layers,
        heads=config.connector.heads,
        joint_attention_dim=config.dit.joint_attention_dim,
        pooled_projection_dim=config.dit.pooled_projection_dim,
        projector=config.connector.projector,
        padding=config.connector.padding,
    )
