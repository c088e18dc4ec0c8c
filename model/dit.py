"""The diffusion transformer: SD3's MMDiT-X over [noisy target ; clean references] and the prompt (paper section 3.1, figure 3)."""

# B batch, C channels, H height, W width (of a latent), L prompt length, D width

import functools
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import SD3Transformer2DModel
from diffusers.models.attention_processor import Attention
from einops import rearrange
from torch import Tensor

from model.config import DiTConfig


class MaskedJointAttention:
    """Joint attention over image and prompt tokens in which padding of the prompt is not attended.

    diffusers' own processor ignores `attention_mask`; with it, an image would depend on its batch mates' prompt lengths.
    """

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        def heads(x: Tensor) -> Tensor:
            return rearrange(x, "b l (h d) -> b h l d", h=attn.heads)

        def normed(norm: Any, x: Tensor) -> Tensor:
            return x if norm is None else norm(x)

        query = normed(attn.norm_q, heads(attn.to_q(hidden_states)))
        key = normed(attn.norm_k, heads(attn.to_k(hidden_states)))
        value = heads(attn.to_v(hidden_states))
        if encoder_hidden_states is None:  # the second attention of dual blocks sees image tokens only
            return attn.to_out[0](rearrange(F.scaled_dot_product_attention(query, key, value), "b h l d -> b l (h d)"))

        query = torch.cat([query, normed(attn.norm_added_q, heads(attn.add_q_proj(encoder_hidden_states)))], dim=2)
        key = torch.cat([key, normed(attn.norm_added_k, heads(attn.add_k_proj(encoder_hidden_states)))], dim=2)
        value = torch.cat([value, heads(attn.add_v_proj(encoder_hidden_states))], dim=2)
        joint = rearrange(F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask), "b h l d -> b l (h d)")
        image, prompt = joint.split([hidden_states.shape[1], encoder_hidden_states.shape[1]], dim=1)
        return attn.to_out[0](image), prompt if attn.context_pre_only else attn.to_add_out(prompt)


class DeepGenTransformer(SD3Transformer2DModel):
    """SD3Transformer2DModel, with its blocks and weight names, that also reads reference latents and a prompt mask."""

    @functools.wraps(SD3Transformer2DModel.__init__)  # type: ignore[misc]  # diffusers reads config keys from this signature
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.set_attn_processor(MaskedJointAttention())

    def forward(  # type: ignore[override]
        self,
        latents_BCHW: Tensor,
        prompt_embeds_BLD: Tensor,
        pooled_prompt_embeds_BD: Tensor,
        timesteps_B: Tensor,
        reference_latents: tuple[Tensor, ...] = (),
        prompt_mask_BL: Tensor | None = None,
    ) -> Tensor:
        """Velocity (B, C, H, W) of the target.

        Args:
            timesteps_B: sigma x 1000.
            reference_latents: any number of (B, C, h, w), clean; each is placed on its own centred position grid after the target.
            prompt_mask_BL: True where a prompt token is real; None where all are.
        """
        B, _, H, W = latents_BCHW.shape
        image = torch.cat([self.pos_embed(latents) for latents in (latents_BCHW, *reference_latents)], dim=1)
        prompt = self.context_embedder(prompt_embeds_BLD)
        temb = self.time_text_embed(timesteps_B, pooled_prompt_embeds_BD)
        attention = {}
        if prompt_mask_BL is not None:
            image_mask = prompt_mask_BL.new_ones(B, image.shape[1])
            attention = {"attention_mask": torch.cat([image_mask, prompt_mask_BL], dim=1)[:, None, None, :]}

        for block in self.transformer_blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                prompt, image = self._gradient_checkpointing_func(block, image, prompt, temb, attention)
            else:
                prompt, image = block(image, prompt, temb, attention)

        p = self.config.patch_size
        target = image[:, : (H // p) * (W // p)]
        patches = self.proj_out(self.norm_out(target, temb))
        return rearrange(patches, "b (h w) (p q c) -> b c (h p) (w q)", h=H // p, w=W // p, p=p, q=p)


def build_dit(config: DiTConfig, latent_channels: int) -> DeepGenTransformer:
    """A DiT of the configured shape with fresh weights."""
    width = config.heads * config.head_dim
    return DeepGenTransformer(
        sample_size=config.sample_size,
        patch_size=config.patch_size,
        in_channels=latent_channels,
        out_channels=latent_channels,
        num_layers=config.layers,
        num_attention_heads=config.heads,
        attention_head_dim=config.head_dim,
        joint_attention_dim=config.joint_attention_dim,
        caption_projection_dim=width,
        pooled_projection_dim=config.pooled_projection_dim,
        pos_embed_max_size=config.pos_embed_max_size,
        dual_attention_layers=tuple(range(config.dual_attention_layers)),
        qk_norm="rms_norm",
    )
