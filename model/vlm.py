"""Qwen2.5-VL as the reader of prompts and references: hidden states of chosen layers, think tokens appended (paper section 3.1)."""

# B batch, P prompt length (padded right), T think tokens, L = P + T, V width of the VLM

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
    """Token ids padded on the right, so that under a causal mask no real token ever sees padding.

    ids (B, P), lengths (B,), position_ids (3, B, L) for M-RoPE, the think tokens' included; image_embeds (total image tokens, V) or None.
    """

    ids: Tensor
    lengths: Tensor
    position_ids: Tensor
    image_embeds: Tensor | None


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
def encode_references(vlm: Qwen2_5_VLForConditionalGeneration, pixels: Tensor) -> Tensor:
    """Reference images (B, 3, H, W) in [-1, 1] -> (B, tokens, V). The vision tower never trains, so there is no gradient."""
    config = vlm.config.vision_config
    rows, columns = image_grid(vlm, *pixels.shape[-2:])
    patch, merge = config.patch_size, config.spatial_merge_size
    scaled = F.interpolate(pixels, size=(rows * patch, columns * patch), mode="bilinear", align_corners=False)
    mean, std = (scaled.new_tensor(value).view(1, 3, 1, 1) for value in (CLIP_MEAN, CLIP_STD))
    normal = ((scaled + 1) / 2 - mean) / std
    frames = normal[:, None].expand(-1, config.temporal_patch_size, -1, -1, -1)
    patches = rearrange(frames, "b t c (h n p) (w m q) -> (b h w n m) (c t p q)", p=patch, q=patch, n=merge, m=merge)
    grid = torch.tensor([[1, rows, columns]] * len(pixels), device=pixels.device)
    tokens = vlm.model.visual(patches.to(vlm.dtype), grid_thw=grid).pooler_output
    tokens = torch.cat(list(tokens)) if isinstance(tokens, (tuple, list)) else tokens
    return tokens.view(len(pixels), -1, tokens.shape[-1])


def prepare_prompts(
    vlm: Qwen2_5_VLForConditionalGeneration, rows: list[list[int]], references: tuple[Tensor, ...], think_tokens: int
) -> PromptBatch:
    """Pad token rows to one length and give every position, think tokens included, its place in M-RoPE.

    Args:
        rows: token ids a sample.
        references: k tensors (B, 3, H, W): every row of a batch has the same number of references, of the same sizes.
    """
    device = vlm.device
    lengths = torch.tensor([len(row) for row in rows], device=device)
    ids = torch.full((len(rows), int(lengths.max())), vlm.config.text_config.pad_token_id, device=device)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row, device=device)
    image_embeds = None
    if references:
        image_embeds = torch.cat([encode_references(vlm, pixels) for pixels in references], dim=1).flatten(0, 1)
    return PromptBatch(ids, lengths, _position_ids(vlm, ids, lengths, references, think_tokens), image_embeds)


def _position_ids(
    vlm: Qwen2_5_VLForConditionalGeneration, ids_BP: Tensor, lengths_B: Tensor, references: tuple[Tensor, ...], think_tokens: int
) -> Tensor:
    """(3, B, P + T): temporal, row and column positions; think tokens continue as text after each row's own prompt."""
    B, P = ids_BP.shape
    steps = torch.arange(P + think_tokens, device=ids_BP.device)
    if not references:
        return steps.expand(3, B, -1)
    grids = torch.tensor([[1, *image_grid(vlm, *pixels.shape[-2:])] for pixels in references] * B, device=ids_BP.device)
    real = steps[:P] < lengths_B[:, None]
    kinds = (ids_BP == vlm.config.image_token_id).int()
    prompt, _ = vlm.model.get_rope_index(ids_BP, mm_token_type_ids=kinds, image_grid_thw=grids, attention_mask=real.long())
    nexts = prompt.masked_fill(~real, -1).amax(dim=(0, 2)) + 1
    positions = torch.zeros(3, B, P + think_tokens, dtype=prompt.dtype, device=ids_BP.device)
    positions[..., :P] = prompt
    after = steps[None, :] - lengths_B[:, None]
    return torch.where(after >= 0, nexts[:, None] + after, positions)


def embed_prompts(vlm: Qwen2_5_VLForConditionalGeneration, batch: PromptBatch) -> Tensor:
    """(B, P, V): token embeddings with the vision tower's output in the places of the image tokens."""
    embeds = vlm.get_input_embeddings()(batch.ids)
    if batch.image_embeds is None:
        return embeds
    places = (batch.ids == vlm.config.image_token_id)[..., None]
    return embeds.masked_scatter(places, batch.image_embeds.to(embeds.dtype))


def append_think_tokens(prompt_BPV: Tensor, think_BTV: Tensor, lengths_B: Tensor) -> Tensor:
    """(B, P + T, V): each row's think tokens stand right after its own last token; what follows is padding."""
    B, T = think_BTV.shape[:2]
    places = lengths_B[:, None] + torch.arange(T, device=lengths_B.device)
    joined = F.pad(prompt_BPV, (0, 0, 0, T))
    return joined.index_put((torch.arange(B, device=lengths_B.device)[:, None], places), think_BTV.to(joined.dtype))


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
    mask = torch.arange(P + T, device=batch.ids.device) < (batch.lengths + T)[:, None]
    language_model = vlm.model.language_model
    if train_vlm or T == 0:
        with torch.set_grad_enabled(train_vlm and torch.is_grad_enabled()):
            embeds = append_think_tokens(embed_prompts(vlm, batch), think, batch.lengths)
            states = language_model(
                inputs_embeds=embeds, position_ids=batch.position_ids, output_hidden_states=True, use_cache=False
            ).hidden_states
        return torch.cat([states[layer] for layer in layers], dim=-1), mask

    cache = DynamicCache(config=vlm.config.text_config)
    with torch.no_grad():
        prompt = language_model(
            inputs_embeds=embed_prompts(vlm, batch),
            position_ids=batch.position_ids[..., :P],
            output_hidden_states=True,
            past_key_values=cache,
            use_cache=True,
        ).hidden_states
    places = batch.lengths[:, None] + torch.arange(T, device=batch.ids.device)
    visible = torch.cat(
        [
            (torch.arange(P, device=mask.device) < batch.lengths[:, None])[:, None, :].expand(-1, T, -1),
            torch.ones(T, T, dtype=torch.bool, device=mask.device).tril().expand(B, -1, -1),
        ],
        dim=2,
    )
    after = language_model(
        inputs_embeds=think,
        position_ids=batch.position_ids.gather(2, places.expand(3, -1, -1)),
        attention_mask={"full_attention": visible[:, None]},
        output_hidden_states=True,
        past_key_values=cache,
        use_cache=True,
    ).hidden_states
    stacked = [append_think_tokens(prompt[layer], after[layer], batch.lengths) for layer in layers]
    return torch.cat(stacked, dim=-1), mask
