"""DeepGen: the parts joined. prompt + references -> condition -> velocity."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, Qwen2_5_VLForConditionalGeneration

from model import vlm as qwen
from model.config import ModelConfig
from model.connector import StackedChannelBridging
from model.dit import DeepGenTransformer, build_dit
from model.prompts import SPECIAL_TOKENS, prompt_tokens
from model.vae import build_vae


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
    ) -> None:
        super().__init__()
        self.vlm, self.connector, self.dit = vlm, connector, dit
        self.vae: Any = vae  # AutoencoderKL or LinearAutoencoder
        self.tokenizer, self.timestep_shift, self.max_prompt_tokens = tokenizer, timestep_shift, max_prompt_tokens
        self.train_vlm = False

    @property
    def device(self) -> torch.device:
        return self.connector.think_tokens.device

    def encode_condition(self, prompts: Sequence[str], reference_images: tuple[Tensor, ...] = ()) -> Condition:
        """Prompts, and k references (B, 3, H, W) in [-1, 1] shared in number and size by the batch -> Condition.

        A row's condition depends on that row alone: padding is masked in the VLM, the connector, the mean and the DiT.
        """
        counts = [qwen.image_token_count(self.vlm, *pixels.shape[-2:]) for pixels in reference_images]
        rows = [prompt_tokens(self.tokenizer, prompt, counts, self.max_prompt_tokens) for prompt in prompts]
        think_tokens = self.connector.think_tokens
        batch = qwen.prepare_prompts(self.vlm, rows, reference_images, len(think_tokens))
        layers = tuple(self.connector.config.stacked_layers)
        states, mask = qwen.stacked_hidden_states(self.vlm, batch, think_tokens, layers, self.train_vlm)
        prompt_embeds, pooled = self.connector(states.to(self.connector.dtype), mask)
        return Condition(prompt_embeds, pooled, mask.sum(1))

    def predict_velocity(self, latents: Tensor, sigmas: Tensor, condition: Condition, reference_latents: tuple[Tensor, ...] = ()) -> Tensor:
        """Velocity (B, C, H, W) at latents (B, C, H, W) and sigmas (B,) in [0, 1]."""
        return self.dit(latents, condition.prompt_embeds, condition.pooled_prompt_embeds, sigmas * 1000, reference_latents, condition.mask)

    def forward(
        self,
        latents: Tensor,
        sigmas: Tensor,
        reference_latents: tuple[Tensor, ...] = (),
        prompts: Sequence[str] | None = None,
        reference_images: tuple[Tensor, ...] = (),
        condition: Condition | None = None,
    ) -> Tensor:
        """Velocity, from prompts or from a condition computed before. Training calls this, so that wrappers see every gradient."""
        if condition is None:
            assert prompts is not None, "forward needs prompts or a condition"
            condition = self.encode_condition(prompts, reference_images)
        return self.predict_velocity(latents, sigmas, condition, reference_latents)


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
    )
