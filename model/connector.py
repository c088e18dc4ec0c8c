"""Stacked Channel Bridging: hidden states of several VLM layers -> what the DiT is conditioned on (paper section 3.1)."""

# B batch, L sequence (prompt, image and think tokens), D width of the encoder, N stacked layers, V width of the VLM

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from einops import rearrange
from torch import Tensor, nn


class SelfAttention(nn.Module):
    """Bidirectional attention; padding is masked by `mask_BL` (True = a real token)."""

    def __init__(self, hidden_size: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(hidden_size, hidden_size)
        self.k_proj = nn.Linear(hidden_size, hidden_size)
        self.v_proj = nn.Linear(hidden_size, hidden_size)
        self.out_proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x_BLD: Tensor, mask_BL: Tensor | None) -> Tensor:
        q, k, v = (rearrange(proj(x_BLD), "b l (h d) -> b h l d", h=self.heads) for proj in (self.q_proj, self.k_proj, self.v_proj))
        mask = None if mask_BL is None else mask_BL[:, None, None, :]
        return self.out_proj(rearrange(F.scaled_dot_product_attention(q, k, v, attn_mask=mask), "b h l d -> b l (h d)"))


class MLP(nn.Module):
    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, intermediate_size)
        self.fc2 = nn.Linear(intermediate_size, hidden_size)

    def forward(self, x_BLD: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x_BLD), approximate="tanh"))


class EncoderLayer(nn.Module):
    """Pre-LN transformer layer, SigLIP's shape."""

    def __init__(self, hidden_size: int, intermediate_size: int, heads: int) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(hidden_size, eps=1e-6)
        self.self_attn = SelfAttention(hidden_size, heads)
        self.layer_norm2 = nn.LayerNorm(hidden_size, eps=1e-6)
        self.mlp = MLP(hidden_size, intermediate_size)

    def forward(self, x_BLD: Tensor, mask_BL: Tensor | None) -> Tensor:
        x_BLD = x_BLD + self.self_attn(self.layer_norm1(x_BLD), mask_BL)
        return x_BLD + self.mlp(self.layer_norm2(x_BLD))


class Encoder(nn.Module):
    """No position embedding and no final norm, as released."""

    def __init__(self, hidden_size: int, intermediate_size: int, layers: int, heads: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(hidden_size, intermediate_size, heads) for _ in range(layers))

    def forward(self, x_BLD: Tensor, mask_BL: Tensor | None) -> Tensor:
        for layer in self.layers:
            x_BLD = layer(x_BLD, mask_BL)
        return x_BLD


class StackedChannelBridging(ModelMixin, ConfigMixin):
    """Think tokens, and the way from stacked hidden states to `prompt_embeds` and `pooled_prompt_embeds`.

    Args:
        vlm_hidden_size: V.
        stacked_layers: indices into the VLM's hidden states, in the order of concatenation.
        num_think_tokens: learned vectors appended after the prompt; 0 for none.
        hidden_size, intermediate_size, layers, heads: the bidirectional encoder.
        joint_attention_dim, pooled_projection_dim: widths that the DiT expects.
        projector: the way in; `linear` as released, `mlp` the two layers of the paper's text.
        padding: `masked`, or `reference`: prompts were padded on the left and padding was read as prompt, as released. Weights trained with
            one are not for the other; the model reads it here.
    """

    @register_to_config
    def __init__(
        self,
        vlm_hidden_size: int,
        stacked_layers: tuple[int, ...],
        num_think_tokens: int,
        hidden_size: int,
        intermediate_size: int,
        layers: int,
        heads: int,
        joint_attention_dim: int,
        pooled_projection_dim: int,
        projector: str = "linear",
        padding: str = "masked",
    ) -> None:
        super().__init__()
        self.think_tokens = nn.Parameter(torch.randn(num_think_tokens, vlm_hidden_size) * vlm_hidden_size**-0.5)
        into = nn.Linear(len(stacked_layers) * vlm_hidden_size, hidden_size)
        self.projector_1 = into if projector == "linear" else nn.Sequential(into, nn.GELU("tanh"), nn.Linear(hidden_size, hidden_size))
        self.connector = Encoder(hidden_size, intermediate_size, layers, heads)
        self.projector_2 = nn.Linear(hidden_size, pooled_projection_dim)
        self.projector_3 = nn.Linear(hidden_size, joint_attention_dim)
        self._initialise()

    def _initialise(self) -> None:
        for name, linear in self.connector.named_modules():
            if isinstance(linear, nn.Linear):
                nn.init.xavier_uniform_(linear.weight)
                nn.init.normal_(linear.bias, std=1e-6) if ".mlp." in name else nn.init.zeros_(linear.bias)
        for head in (self.projector_2, self.projector_3):  # so that training starts from one condition for every prompt
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)

    def forward(self, stacked_hidden_states: Tensor, mask_BL: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(B, L, N*V) -> prompt_embeds (B, L, joint_attention_dim), pooled_prompt_embeds (B, pooled_projection_dim).

        mask_BL (B, L): True where a token is real. Padding is not attended, not averaged, and comes out as zeros.
        """
        x_BLD = self.connector(self.projector_1(stacked_hidden_states), mask_BL)
        if mask_BL is None:
            return self.projector_3(x_BLD), self.projector_2(x_BLD.mean(1))
        real = mask_BL[..., None].to(x_BLD.dtype)
        return self.projector_3(x_BLD) * real, self.projector_2((x_BLD * real).sum(1) / real.sum(1))
