"""The diffusion transformer: SD3's MMDiT-X over [noisy target ; clean references] and the prompt (paper section 3.1, figure 3)."""

# B rows, C channels, H height, W width (of a latent), N image tokens, M prompt tokens, D width

from collections import defaultdict
from collections.abc import Sequence

import torch
from diffusers import SD3Transformer2DModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import get_2d_sincos_pos_embed_from_grid
from einops import rearrange
from torch import Tensor, nn

from model.config import DiTConfig
from model.joint_block import Batched, JointBlock, Layout, Packed

FEW_TOKENS = 1024  # a call on fewer image tokens costs a CPU more (overhead, one more gradient to add up) than packing does


class DeepGenTransformer(SD3Transformer2DModel):
    """SD3Transformer2DModel, with its weights and their names, that also reads reference latents and a prompt mask.

    Args beside diffusers' own:
        reference_offset: False gives target and references the same centred position grid (as released). True puts the grid of reference
            k beside the target's, k whole tables to the right, so that positions tell them apart (paper figure 3).
    """

    _no_split_modules = ["JointBlock"]
    _repeated_blocks = ["JointBlock"]

    @register_to_config
    def __init__(
        self,
        sample_size: int = 128,
        patch_size: int = 2,
        in_channels: int = 16,
        num_layers: int = 18,
        attention_head_dim: int = 64,
        num_attention_heads: int = 18,
        joint_attention_dim: int = 4096,
        caption_projection_dim: int = 1152,
        pooled_projection_dim: int = 2048,
        out_channels: int = 16,
        pos_embed_max_size: int = 96,
        dual_attention_layers: tuple[int, ...] = (),
        qk_norm: str | None = None,
        reference_offset: bool = False,
    ) -> None:
        super().__init__(
            sample_size=sample_size,
            patch_size=patch_size,
            in_channels=in_channels,
            num_layers=0,  # the blocks are ours
            attention_head_dim=attention_head_dim,
            num_attention_heads=num_attention_heads,
            joint_attention_dim=joint_attention_dim,
            caption_projection_dim=caption_projection_dim,
            pooled_projection_dim=pooled_projection_dim,
            out_channels=out_channels,
            pos_embed_max_size=pos_embed_max_size,
            dual_attention_layers=dual_attention_layers,
            qk_norm=qk_norm,
        )
        self.register_to_config(num_layers=num_layers)
        self.transformer_blocks = nn.ModuleList(
            JointBlock(
                dim=self.inner_dim,
                num_attention_heads=num_attention_heads,
                attention_head_dim=attention_head_dim,
                context_pre_only=i == num_layers - 1,
                qk_norm=qk_norm,
                use_dual_attention=i in dual_attention_layers,
            )
            for i in range(num_layers)
        )

    def forward(  # type: ignore[override]
        self,
        latents_BCHW: Tensor,
        prompt_embeds_BMD: Tensor,
        pooled_prompt_embeds_BD: Tensor,
        timesteps_B: Tensor,
        reference_latents: tuple[Tensor, ...] = (),
        prompt_mask_BM: Tensor | None = None,
    ) -> Tensor:
        """Velocity (B, C, H, W) of targets of one size.

        Args:
            timesteps_B: sigma x 1000.
            reference_latents: any number of (B, C, h, w), clean; each follows the target as tokens on its own centred position grid.
            prompt_mask_BM: True where a prompt token is real; None where all are.
        """
        H, W = latents_BCHW.shape[-2:]
        image = torch.cat([self.embed_patches(latents, k) for k, latents in enumerate((latents_BCHW, *reference_latents))], dim=1)
        prompt = self.context_embedder(prompt_embeds_BMD)
        temb = self.time_text_embed(timesteps_B, pooled_prompt_embeds_BD)
        mask = None
        if prompt_mask_BM is not None:
            image_mask = prompt_mask_BM.new_ones(image.shape[:2])
            mask = torch.cat([image_mask, prompt_mask_BM], dim=1)[:, None, None, :]
        layout = Batched(mask)

        image = self.run_blocks(image, prompt, temb, layout)
        return self.unpatchify(self.read_out(image, temb, layout), H, W)

    def forward_ragged(
        self,
        latents: Sequence[Tensor],
        prompt_embeds_BMD: Tensor,
        pooled_prompt_embeds_BD: Tensor,
        timesteps_B: Tensor,
        reference_latents: Sequence[Sequence[Tensor]],
        prompt_lengths: Sequence[int],
        packed: bool | None = None,
    ) -> list[Tensor]:
        """Velocities (C, H, W) of targets of any sizes with any references.

        Rows of the same image shapes and prompt length run as one batch. Where that leaves several groups, all rows run packed end to end
        on a GPU, and on a CPU where the groups are small; no mask of N x N is ever made.

        Args:
            latents: B targets (C, H, W). reference_latents: B lists of (C, h, w), empty where a row has none.
            prompt_lengths: real tokens of each row of prompt_embeds_BMD.
            packed: None chooses.
        """
        groups = defaultdict(list)
        for row, (target, references) in enumerate(zip(latents, reference_latents, strict=True)):
            groups[tuple(t.shape[-2:] for t in (target, *references)), prompt_lengths[row]].append(row)
        if packed is None:
            tokens = sum(t.shape[-2] * t.shape[-1] for row, target in enumerate(latents) for t in (target, *reference_latents[row]))
            small = tokens // self.config.patch_size**2 < FEW_TOKENS * len(groups)
            packed = len(groups) > 1 and (prompt_embeds_BMD.is_cuda or small)
        if packed:
            return self._forward_packed(latents, prompt_embeds_BMD, pooled_prompt_embeds_BD, timesteps_B, reference_latents, prompt_lengths)
        velocities: dict[int, Tensor] = {}
        for (shapes, length), rows in groups.items():
            velocity = self(
                torch.stack([latents[row] for row in rows]),
                prompt_embeds_BMD[rows, :length],
                pooled_prompt_embeds_BD[rows],
                timesteps_B[rows],
                tuple(torch.stack([reference_latents[row][k] for row in rows]) for k in range(len(shapes) - 1)),
            )
            velocities.update(zip(rows, velocity, strict=True))
        return [velocities[row] for row in range(len(latents))]

    def _forward_packed(
        self,
        latents: Sequence[Tensor],
        prompt_embeds_BMD: Tensor,
        pooled_prompt_embeds_BD: Tensor,
        timesteps_B: Tensor,
        reference_latents: Sequence[Sequence[Tensor]],
        prompt_lengths: Sequence[int],
    ) -> list[Tensor]:
        embedded = [
            torch.cat([self.embed_patches(t[None], k) for k, t in enumerate((target, *references))], dim=1)
            for target, references in zip(latents, reference_latents, strict=True)
        ]
        lengths = [tokens.shape[1] for tokens in embedded]
        prompt = torch.cat([prompt_embeds_BMD[row : row + 1, :length] for row, length in enumerate(prompt_lengths)], dim=1)
        temb = self.time_text_embed(timesteps_B, pooled_prompt_embeds_BD)
        layout = Packed.of(lengths, list(prompt_lengths), prompt.device)
        image = self.run_blocks(torch.cat(embedded, dim=1), self.context_embedder(prompt), temb, layout)
        rows = self.read_out(image, temb, layout).split(lengths, dim=1)
        return [self.unpatchify(row, *target.shape[-2:])[0] for row, target in zip(rows, latents, strict=True)]

    def embed_patches(self, latents_BCHW: Tensor, k: int) -> Tensor:
        """(B, N, D) tokens of the target (k = 0) or of reference k, with their positions."""
        if k == 0 or not self.config.reference_offset:
            return self.pos_embed(latents_BCHW)
        patches = rearrange(self.pos_embed.proj(latents_BCHW), "b d h w -> b (h w) d")
        return (patches + self._beside_target(latents_BCHW.shape[-2], latents_BCHW.shape[-1], k).to(patches.device)).to(patches.dtype)

    def _beside_target(self, height: int, width: int, k: int) -> Tensor:
        """(1, N, D): the centred crop of a position table that begins where the k-th table right of the target's would."""
        size, p = self.config.pos_embed_max_size, self.config.patch_size
        rows = torch.arange(height // p, dtype=torch.float64) + (size - height // p) // 2
        columns = torch.arange(width // p, dtype=torch.float64) + (size - width // p) // 2 + k * size
        grid = torch.stack(torch.meshgrid(columns, rows, indexing="xy")) * (self.pos_embed.base_size / size)
        return get_2d_sincos_pos_embed_from_grid(self.inner_dim, grid[:, None], output_type="pt").float()[None]

    def run_blocks(self, image: Tensor, prompt: Tensor, temb_BD: Tensor, layout: Layout) -> Tensor:
        """Image tokens after every block."""
        for block in self.transformer_blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                image, prompt = self._gradient_checkpointing_func(block, image, prompt, temb_BD, layout)
            else:
                image, prompt = block(image, prompt, temb_BD, layout)
        return image

    def read_out(self, image: Tensor, temb_BD: Tensor, layout: Layout) -> Tensor:
        """Image tokens -> patches of velocity (B, N, patch_size^2 C)."""
        scale, shift = layout.over_image(self.norm_out.linear(nn.functional.silu(temb_BD).to(image.dtype))).chunk(2, -1)
        return self.proj_out(self.norm_out.norm(image) * (1 + scale) + shift)

    def unpatchify(self, patches_BNP: Tensor, height: int, width: int) -> Tensor:
        """(B, C, H, W) of the target, whose patches come first."""
        p = self.config.patch_size
        target = patches_BNP[:, : (height // p) * (width // p)]
        return rearrange(target, "b (h w) (p q c) -> b c (h p) (w q)", h=height // p, w=width // p, p=p, q=p)


def build_dit(config: DiTConfig, latent_channels: int) -> DeepGenTransformer:
    """A DiT of the configured shape with fresh weights."""
    return DeepGenTransformer(
        sample_size=config.sample_size,
        patch_size=config.patch_size,
        in_channels=latent_channels,
        out_channels=latent_channels,
        num_layers=config.layers,
        num_attention_heads=config.heads,
        attention_head_dim=config.head_dim,
        joint_attention_dim=config.joint_attention_dim,
        caption_projection_dim=config.heads * config.head_dim,
        pooled_projection_dim=config.pooled_projection_dim,
        pos_embed_max_size=config.pos_embed_max_size,
        dual_attention_layers=tuple(range(config.dual_attention_layers)),
        qk_norm="rms_norm",
        reference_offset=config.reference_offset,
    )
