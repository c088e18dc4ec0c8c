"""Pixels to latents and back. The autoencoder never trains in DeepGen's stages."""

from typing import TypeAlias

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from torch import Tensor, nn

from model.config import VAEConfig
from model.offload import bring


class LinearAutoencoder(ModelMixin, ConfigMixin):
    """A fixed linear map on square patches, with AutoencoderKL's interface: the tiny recipe's stand-in.

    `basis` (latent_channels, 3 * downscale^2) has orthonormal rows; `scale` (latent_channels,) makes latents about unit variance.
    Both are set from a principal component analysis of drawn images (`fit`), and never by gradient.
    """

    @register_to_config
    def __init__(self, latent_channels: int, downscale: int, scaling_factor: float = 1.0, shift_factor: float = 0.0) -> None:
        super().__init__()
        width = 3 * downscale**2
        self.mean = nn.Parameter(torch.zeros(width), requires_grad=False)
        self.basis = nn.Parameter(torch.eye(latent_channels, width), requires_grad=False)
        self.scale = nn.Parameter(torch.ones(latent_channels), requires_grad=False)

    @torch.no_grad()
    def fit(self, images: Tensor, whitening: float) -> None:
        """Set the map from images (N, 3, H, W) in [-1, 1].

        Args:
            whitening: 0 keeps the components' own variances, 1 makes them all equal; between, partly. Overall variance is 1.
        """
        patches = F.pixel_unshuffle(images, self.config.downscale).permute(0, 2, 3, 1).flatten(0, 2)
        self.mean.copy_(patches.mean(0))
        values, vectors = torch.linalg.eigh(torch.cov((patches - self.mean).T))
        keep = values.argsort(descending=True)[: self.config.latent_channels]
        spread = values[keep].clamp_min(1e-12).sqrt()
        scale = spread**whitening
        self.basis.copy_(vectors[:, keep].T)
        self.scale.copy_(scale * (spread / scale).pow(2).mean().sqrt())

    def encode(self, x: Tensor) -> AutoencoderKLOutput:
        """(B, 3, H, W) in [-1, 1] -> a distribution without spread over (B, latent_channels, H / downscale, W / downscale)."""
        patches = F.pixel_unshuffle(x, self.config.downscale).permute(0, 2, 3, 1)
        latents = (((patches - self.mean) @ self.basis.T) / self.scale).permute(0, 3, 1, 2).contiguous()
        moments = torch.cat([latents, torch.full_like(latents, -30.0)], dim=1)  # log-variance at its floor
        return AutoencoderKLOutput(latent_dist=DiagonalGaussianDistribution(moments, deterministic=True))

    def decode(self, z: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        patches = (z.permute(0, 2, 3, 1) * self.scale) @ self.basis + self.mean
        pixels = F.pixel_shuffle(patches.permute(0, 3, 1, 2), self.config.downscale)
        return DecoderOutput(sample=pixels) if return_dict else (pixels,)


AnyAutoencoder: TypeAlias = AutoencoderKL | LinearAutoencoder


def build_vae(config: VAEConfig) -> AnyAutoencoder:
    """An autoencoder of the configured shape with fresh weights."""
    if config.kind == "linear":
        return LinearAutoencoder(config.latent_channels, config.downscale, config.scaling_factor, config.shift_factor)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(config.block_out_channels),
        up_block_types=("UpDecoderBlock2D",) * len(config.block_out_channels),
        block_out_channels=config.block_out_channels,
        layers_per_block=2,
        latent_channels=config.latent_channels,
        norm_num_groups=config.norm_num_groups,
        scaling_factor=config.scaling_factor,
        shift_factor=config.shift_factor,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def to_pixels(images_BHWC: Tensor) -> Tensor:
    """uint8 (B, H, W, 3) -> float32 (B, 3, H, W) in [-1, 1]."""
    return images_BHWC.permute(0, 3, 1, 2).float() / 127.5 - 1


def to_uint8(pixels_BCHW: Tensor) -> Tensor:
    """(B, 3, H, W) in about [-1, 1] -> uint8 (B, H, W, 3)."""
    return ((pixels_BCHW.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)


def posterior_of(vae: AnyAutoencoder, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """(B, 3, H, W) in [-1, 1] -> mean and standard deviation of the latents (B, C, h, w), neither shifted nor scaled."""
    bring(vae)
    posterior = vae.encode(pixels).latent_dist
    return posterior.mean, posterior.std


def scale_latents(vae: AnyAutoencoder, latents: Tensor) -> Tensor:
    """Shifted and scaled, as the transformer reads them."""
    return (latents - vae.config.shift_factor) * vae.config.scaling_factor


def encode_images(vae: AnyAutoencoder, pixels: Tensor) -> Tensor:
    """(B, 3, H, W) in [-1, 1] -> the posterior's mean (B, C, h, w), shifted and scaled."""
    return scale_latents(vae, posterior_of(vae, pixels)[0])


def decode_latents(vae: AnyAutoencoder, latents: Tensor) -> Tensor:
    """Latents -> (B, 3, H, W) in about [-1, 1]."""
    bring(vae)
    return vae.decode(latents / vae.config.scaling_factor + vae.config.shift_factor, return_dict=False)[0]
