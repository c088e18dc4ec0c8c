"""Qwen2.5-VL as the reader of prompts and references: hidden states of chosen layers, think tokens appended (paper section 3.1)."""

# B batch, P prompt length (padded right), T think tokens, L = P + T, V width of the VLM

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from transformers import DynamicCache, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from model.config import VLMConfig

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class PromptBatch:
    """Token ids padded to one length: on the right, where causality hides padding from every real token, or on the left, as released.

    ids and real (B, P), lengths (B,), position_ids (3, B, L) for M-RoPE, the think tokens' included; image_embeds (all image tokens, V).
    """

    ids: Tensor
    real: Tensor
    lengths: Tensor
    position_ids: Tensor
    image_embeds: Tensor | None
    left: bool


def build_vlm(config: VLMConfig, token_ids: dict[str, int]) -> Qwen2_5_VLForConditionalGeneration:
    """A VLM of the configured shape with fresh weights.

    Args:
        token_ids: ids of the control tokens by their text, from the tokenizer.
    """
    vision = config.vision
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config={
                "vocab_size": config.vocab_size,
                "hidden_size": config.hidden_size,
                "intermediate_size": config.intermediate_size,
                "num_hidden_layers": config.layers,
                "num_attention_heads": config.heads,
                "num_key_value_heads": config.kv_heads,
                "rms_norm_eps": config.rms_norm_eps,
                "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta, "mrope_section": list(config.mrope_section)},
                "bos_token_id": token_ids["<|endoftext|>"],
                "eos_token_id": token_ids["<|im_end|>"],
                "pad_token_id": token_ids["<|endoftext|>"],
            },
            vision_config={
                "depth": vision.depth,
                "hidden_size": vision.hidden_size,
                "intermediate_size": vision.intermediate_size,
                "num_heads": vision.heads,
                "patch_size": vision.patch_size,
                "spatial_merge_size": vision.spatial_merge_size,
                "window_size": vision.window_size,
                "fullatt_block_indexes": list(vision.full_attention_blocks),
                "out_hidden_size": config.hidden_size,
            },
            image_token_id=token_ids["<|image_pad|>"],
            video_token_id=token_ids["<|video_pad|>"],
            vision_start_token_id=token_ids["<|vision_start|>"],
            vision_end_token_id=token_ids["<|vision_end|>"],
            tie_word_embeddings=False,
        )
    )


def image_grid(vlm: Qwen2_5_VLForConditionalGeneration, height: int, width: int) -> tuple[int, int]:
    """Rows and columns of vision patches of an image of that many pixels, which is first scaled by 28/32."""
    patch = vlm.config.vision_config.patch_size
    return height * 28 // 32 // patch, width * 28 // 32 // patch


def image_token_count(vlm: Qwen2_5_VLForConditionalGeneration, height: int, width: int) -> int:
    rows, columns = image_grid(vlm, height, width)
    return rows * columns // vlm.config.vision_config.spatial_merge_size**2


@torch.no_grad()
def encode_references(vlm: Qwen2_5_VLForConditionalGeneration, images: Sequence[Tensor]) -> list[Tensor]:
    """Reference images (3, H, W) in [-1, 1], of any sizes -> (tokens, V) of each. The vision tower never trains: no gradient."""
    grids = [image_grid(vlm, *pixels.shape[-2:]) for pixels in images]
    by_size: dict[tuple[int, int], list[int]] = defaultdict(list)
    for i, pixels in enumerate(images):
        by_size[pixels.shape[-2], pixels.shape[-1]].append(i)
    patches: dict[int, Tensor] = {}
    for same in by_size.values():
        patches.update(zip(same, _vision_patches(vlm, torch.stack([images[i] for i in same])), strict=True))
    counts = [image_token_count(vlm, *pixels.shape[-2:]) for pixels in images]
    flat = torch.cat([patches[i] for i in range(len(images))]).to(vlm.dtype)
    tokens = vlm.model.visual(flat, grid_thw=torch.tensor([[1, *grid] for grid in grids], device=flat.device)).pooler_output
    tokens = torch.cat(list(tokens)) if isinstance(tokens, (tuple, list)) else tokens
    return list(tokens.split(counts))


def _vision_patches(vlm: Qwen2_5_VLForConditionalGeneration, pixels: Tensor) -> Tensor:
    """(B, 3, H, W) in [-1, 1] -> (B, patches, features): scaled by 28/32, normalised as CLIP does, one frame repeated."""
    config = vlm.config.vision_config
    rows, columns = image_grid(vlm, *pixels.shape[-2:])
    patch, merge = config.patch_size, config.spatial_merge_size
    scaled = F.interpolate(pixels, size=(rows * patch, columns * patch), mode="bilinear", align_corners=False)
    mean, std = (scaled.new_tensor(value).view(1, 3, 1, 1) for value in (CLIP_MEAN, CLIP_STD))
    normal = ((scaled + 1) / 2 - mean) / std
    frames = normal[:, None].expand(-1, config.temporal_patch_size, -1, -1, -1)
    return rearrange(frames, "b t c (h n p) (w m q) -> b (h w n m) (c t p q)", p=patch, q=patch, n=merge, m=merge)


def prepare_prompts(
    vlm: Qwen2_5_VLForConditionalGeneration,
    rows: list[list[int]],
    references: Sequence[Sequence[Tensor]],
    think_tokens: int,
    pad_id: int,
    left: bool = False,
    image_embeds: Tensor | None = None,
) -> PromptBatch:
    """Pad token rows to one length and give every position, think tokens included, its place in M-RoPE.

    Args:
        rows: token ids a sample.
        references: the images (3, H, W) of each row, any number, of any sizes.
        left: pad on the left, as released.
        pad_id: the token that fills; it is seen only by what the released padding lets leak.
        image_embeds: (all image tokens, V) if `encode_references` was called before; None calls it.
    """
    device = vlm.device
    lengths = torch.tensor([len(row) for row in rows], device=device)
    longest = int(lengths.max())
    ids = torch.full((len(rows), longest), pad_id, device=device)
    places = torch.arange(longest, device=device)
    real = places >= (longest - lengths)[:, None] if left else places < lengths[:, None]
    ids[real] = torch.tensor([token for row in rows for token in row], device=device)
    images = [image for row in references for image in row]
    if images and image_embeds is None:
        image_embeds = torch.cat(encode_references(vlm, images))
    given, wanted = (0 if image_embeds is None else len(image_embeds)), sum(image_token_count(vlm, *image.shape[-2:]) for image in images)
    assert given == wanted, f"{given} image tokens for {len(images)} references of {wanted}"
    return PromptBatch(ids, real, lengths, _position_ids(vlm, ids, real, images, think_tokens, left), image_embeds, left)


def _position_ids(
    vlm: Qwen2_5_VLForConditionalGeneration, ids_BP: Tensor, real_BP: Tensor, images: Sequence[Tensor], think_tokens: int, left: bool
) -> Tensor:
    """(3, B, P + T): temporal, row and column positions; think tokens continue as text after each row's own prompt."""
    B, P = ids_BP.shape
    steps = torch.arange(P + think_tokens, device=ids_BP.device)
    lengths_B = real_BP.sum(1)
    if images:
        grids = torch.tensor([[1, *image_grid(vlm, *pixels.shape[-2:])] for pixels in images], device=ids_BP.device)
        kinds = (ids_BP == vlm.config.image_token_id).int()
        prompt, _ = vlm.model.get_rope_index(ids_BP, mm_token_type_ids=kinds, image_grid_thw=grids, attention_mask=real_BP.long())
    elif left:
        prompt = (real_BP.long().cumsum(1) - 1).masked_fill(~real_BP, 1).expand(3, B, P)
    else:
        return steps.expand(3, B, -1)
    nexts = prompt.masked_fill(~real_BP, -1).amax(dim=(0, 2)) + 1
    positions = F.pad(prompt, (0, think_tokens))
    after = steps[None, :] - (P if left else lengths_B[:, None])
    return torch.where(after >= 0, nexts[:, None] + after, positions)


def embed_prompts(vlm: Qwen2_5_VLForConditionalGeneration, batch: PromptBatch) -> Tensor:
    """(B, P, V): token embeddings with the vision tower's output in the places of the image tokens."""
    embeds = vlm.get_input_embeddings()(batch.ids)
    if batch.image_embeds is None:
        return embeds
    places = (batch.ids == vlm.config.image_token_id)[..., None]
    return embeds.masked_scatter(places, batch.image_embeds.to(embeds.dtype))


def append_think_tokens(prompt_BPV: Tensor, think_BTV: Tensor, batch: PromptBatch) -> Tensor:
    """(B, P + T, V): each row's think tokens stand right after its own last token; what follows is padding."""
    if batch.left:
        return torch.cat([prompt_BPV, think_BTV.to(prompt_BPV.dtype)], dim=1)
    B, T = think_BTV.shape[:2]
    places = batch.lengths[:, None] + torch.arange(T, device=prompt_BPV.device)
    joined = F.pad(prompt_BPV, (0, 0, 0, T))
    return joined.index_put((torch.arange(B, device=prompt_BPV.device)[:, None], places), think_BTV.to(joined.dtype))


def stacked_hidden_states(
    vlm: Qwen2_5_VLForConditionalGeneration, batch: PromptBatch, think_tokens: Tensor, layers: tuple[int, ...], train_vlm: bool
) -> tuple[Tensor, Tensor]:
    """Hidden states of the chosen layers over prompt and think tokens, concatenated on channels in the given order.

    Where the VLM is frozen the prompt's part runs without gradient and the think tokens read it from a cache:
    the same values for less than half of the work.

    Args:
        think_tokens: (T, V); T may be 0.
        train_vlm: keep the graph through the language model (LoRA).

    Returns:
        (B, L, len(layers) * V), and the mask (B, L) of real positions.
    """
    B, P = batch.ids.shape
    T = len(think_tokens)
    think = think_tokens.to(vlm.dtype).expand(B, -1, -1)
    steps = torch.arange(P + T, device=batch.ids.device)
    mask = steps >= (P - batch.lengths)[:, None] if batch.left else steps < (batch.lengths + T)[:, None]
    if train_vlm or T == 0 or batch.left:
        with torch.set_grad_enabled((train_vlm or T > 0) and torch.is_grad_enabled()):
            states = vlm.model.language_model(
                inputs_embeds=append_think_tokens(embed_prompts(vlm, batch), think, batch),
                position_ids=batch.position_ids,
                attention_mask={"full_attention": _leaking_mask(mask, vlm.dtype)} if batch.left else None,
                output_hidden_states=True,
                use_cache=False,
            ).hidden_states
        return torch.cat([states[layer] for layer in layers], dim=-1), mask
    states = _prompt_then_think(vlm, batch, think)
    return torch.cat([states(layer) for layer in layers], dim=-1), mask


def _leaking_mask(real_BL: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, 1, L, L) to add to scores, as the reference does: what is masked gets the lowest finite number, so that padding, which may see
    nothing, sees everything alike. A boolean mask would give zeros there, and the published connector reads these positions."""
    earlier = torch.ones(real_BL.shape[1], real_BL.shape[1], dtype=torch.bool, device=real_BL.device).tril()
    hidden = ~(earlier & real_BL[:, None, :])[:, None]
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill(hidden, torch.finfo(dtype).min)


def _prompt_then_think(vlm: Qwen2_5_VLForConditionalGeneration, batch: PromptBatch, think_BTV: Tensor) -> Callable[[int], Tensor]:
    """Hidden states (B, P + T, V) by layer: the prompt's without gradient, the think tokens' from the prompt's cache."""
    P, T = batch.ids.shape[1], think_BTV.shape[1]
    cache = DynamicCache(config=vlm.config.text_config)
    with torch.no_grad():
        prompt = vlm.model.language_model(
            inputs_embeds=embed_prompts(vlm, batch),
            position_ids=batch.position_ids[..., :P],
            output_hidden_states=True,
            past_key_values=cache,
            use_cache=True,
        ).hidden_states
    places = batch.lengths[:, None] + torch.arange(T, device=batch.ids.device)
    earlier = torch.ones(T, T, dtype=torch.bool, device=batch.ids.device).tril().expand(len(batch.ids), -1, -1)
    visible = torch.cat([batch.real[:, None, :].expand(-1, T, -1), earlier], dim=2)
    after = vlm.model.language_model(
        inputs_embeds=think_BTV,
        position_ids=batch.position_ids.gather(2, places.expand(3, -1, -1)),
        attention_mask={"full_attention": visible[:, None]},
        output_hidden_states=True,
        past_key_values=cache,
        use_cache=True,
    ).hidden_states
    return lambda layer: append_think_tokens(prompt[layer], after[layer], batch)
