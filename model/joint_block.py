"""SD3's joint block, for rows of one shape and for rows of any shapes packed end to end (SD3, arXiv 2403.03206, figure 2)."""

# B rows, N image tokens, M prompt tokens, D width; a packed batch is one row that holds the tokens of all, one after another

from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from diffusers.models.attention import JointTransformerBlock
from diffusers.models.attention_processor import Attention
from einops import rearrange
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention


class Layout(Protocol):
    """Where the rows of a batch lie: how a row's modulation reaches its tokens, and which tokens may see each other."""

    def over_image(self, modulation_BD: Tensor) -> Tensor: ...
    def over_prompt(self, modulation_BD: Tensor) -> Tensor: ...
    def attend_jointly(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor: ...
    def attend_in_image(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Batched:
    """Rows of one shape. mask (B, 1, 1, N + M): True where a token is real; None where all are. Never (N + M) x (N + M)."""

    mask: Tensor | None = None

    def over_image(self, modulation_BD: Tensor) -> Tensor:
        return modulation_BD[:, None]

    over_prompt = over_image

    def attend_jointly(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=self.mask)

    def attend_in_image(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value)


@dataclass(frozen=True)
class Packed:
    """One row of all tokens: every row's image tokens, then every row's prompt tokens. A token sees those of its own row.

    image_rows (N,) and prompt_rows (M,) say whose each token is. On a GPU attention is one call under a block mask; elsewhere, where
    FlexAttention has no backward pass, one call a row: `order` (N + M,) brings each row's image and prompt tokens together, `back` takes
    them apart again.
    """

    image_rows: Tensor
    prompt_rows: Tensor
    image_lengths: list[int]
    joint_lengths: list[int]
    order: Tensor
    back: Tensor
    joint: BlockMask | None
    image: BlockMask | None

    @staticmethod
    def of(image_lengths: list[int], prompt_lengths: list[int], device: torch.device) -> "Packed":
        """The layout of rows of so many image and prompt tokens."""
        rows = torch.arange(len(image_lengths), device=device)
        image_rows = rows.repeat_interleave(torch.tensor(image_lengths, device=device))
        prompt_rows = rows.repeat_interleave(torch.tensor(prompt_lengths, device=device))
        owners = torch.cat([image_rows, prompt_rows])
        order = torch.argsort(owners, stable=True)
        joint_lengths = [image + prompt for image, prompt in zip(image_lengths, prompt_lengths, strict=True)]
        joint, image = (_same_row(owners), _same_row(image_rows)) if device.type == "cuda" else (None, None)
        return Packed(image_rows, prompt_rows, image_lengths, joint_lengths, order, torch.argsort(order), joint, image)

    def over_image(self, modulation_BD: Tensor) -> Tensor:
        return F.embedding(self.image_rows, modulation_BD)[None]  # the backward pass of plain indexing is many times slower

    def over_prompt(self, modulation_BD: Tensor) -> Tensor:
        return F.embedding(self.prompt_rows, modulation_BD)[None]

    def attend_jointly(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if self.joint is None:
            query, key, value = (tokens.index_select(2, self.order) for tokens in (query, key, value))
            return _attend_by_row(query, key, value, self.joint_lengths).index_select(2, self.back)
        return _flex()(query, key, value, block_mask=self.joint)

    def attend_in_image(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if self.image is None:
            return _attend_by_row(query, key, value, self.image_lengths)  # a row's image tokens lie together
        return _flex()(query, key, value, block_mask=self.image)


def _same_row(owners: Tensor) -> BlockMask:
    def mask(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return owners[query] == owners[key]

    return create_block_mask(mask, None, None, len(owners), len(owners), device=str(owners.device))


def _attend_by_row(query: Tensor, key: Tensor, value: Tensor, lengths: list[int]) -> Tensor:
    rows = zip(*(tokens.split(lengths, dim=2) for tokens in (query, key, value)), strict=True)
    return torch.cat([F.scaled_dot_product_attention(*row) for row in rows], dim=2)


@cache
def _flex() -> Any:
    """Compiled, because plain flex_attention writes out all scores."""
    return torch.compile(flex_attention, dynamic=True)


class JointBlock(JointTransformerBlock):
    """diffusers' block, its weights and names; only the order of tokens is ours, told by a `Layout`."""

    def forward(self, image: Tensor, prompt: Tensor, temb_BD: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Image tokens (B, N, D) and prompt tokens (B, M, D), or (1, N, D) and (1, M, D) of a packed batch -> the same, one block on.

        temb_BD: time and pooled prompt of each row. After the last block the prompt is returned as it came.
        """
        modulation = self.norm1.linear(F.silu(temb_BD))
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp, *second = map(
            layout.over_image, modulation.chunk(9 if self.use_dual_attention else 6, 1)
        )
        normed = self.norm1.norm(image)
        seen = _modulate(normed, shift, scale)
        if self.context_pre_only:
            scale_c, shift_c = map(layout.over_prompt, self.norm1_context.linear(F.silu(temb_BD)).chunk(2, 1))
        else:
            shift_c, scale_c, gate_c, shift_mlp_c, scale_mlp_c, gate_mlp_c = map(
                layout.over_prompt, self.norm1_context.linear(F.silu(temb_BD)).chunk(6, 1)
            )
        read = _modulate(self.norm1_context.norm(prompt), shift_c, scale_c)

        from_both, from_both_prompt = _joint_attention(self.attn, seen, read, layout)
        image = image + gate * from_both
        if self.use_dual_attention:
            shift_2, scale_2, gate_2 = second
            image = image + gate_2 * _image_attention(self.attn2, _modulate(normed, shift_2, scale_2), layout)
        image = image + gate_mlp * self.ff(_modulate(self.norm2(image), shift_mlp, scale_mlp))
        if self.context_pre_only:
            return image, prompt
        prompt = prompt + gate_c * self.attn.to_add_out(from_both_prompt)
        return image, prompt + gate_mlp_c * self.ff_context(_modulate(self.norm2_context(prompt), shift_mlp_c, scale_mlp_c))


def _modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale) + shift


def _heads(attn: Attention, x: Tensor, norm: Any = None) -> Tensor:
    split = rearrange(x, "b l (h d) -> b h l d", h=attn.heads)
    return split if norm is None else norm(split)


def _joint_attention(attn: Attention, image: Tensor, prompt: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """Image and prompt tokens in one attention, each with its own projections."""
    query = torch.cat([_heads(attn, attn.to_q(image), attn.norm_q), _heads(attn, attn.add_q_proj(prompt), attn.norm_added_q)], dim=2)
    key = torch.cat([_heads(attn, attn.to_k(image), attn.norm_k), _heads(attn, attn.add_k_proj(prompt), attn.norm_added_k)], dim=2)
    value = torch.cat([_heads(attn, attn.to_v(image)), _heads(attn, attn.add_v_proj(prompt))], dim=2)
    both = rearrange(layout.attend_jointly(query, key, value), "b h l d -> b l (h d)")
    return attn.to_out[0](both[:, : image.shape[1]]), both[:, image.shape[1] :]


def _image_attention(attn: Attention, image: Tensor, layout: Layout) -> Tensor:
    """The second attention of dual blocks: image tokens alone."""
    query, key = _heads(attn, attn.to_q(image), attn.norm_q), _heads(attn, attn.to_k(image), attn.norm_k)
    return attn.to_out[0](rearrange(layout.attend_in_image(query, key, _heads(attn, attn.to_v(image))), "b h l d -> b l (h d)"))
