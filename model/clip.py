"""A small CLIP: how well a picture fits words, as one number. Loaded with `CLIPModel.from_pretrained(folder, dtype=torch.float32)`."""

# B pictures, P prompts, E width of the space that both are embedded in

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerBase

MAX_TOKENS = 24


def build_clip(width: int, layers: int, image_size: int, tokenizer: PreTrainedTokenizerBase) -> CLIPModel:
    """Both towers of one width and depth, on patches of 16 pixels; seed torch before calling."""
    tower = {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 16,
        "projection_dim": width,
    }
    end = tokenizer.pad_token_id  # Qwen's <|im_end|> won't do: its id here is 2, which CLIPModel takes for "at the highest id"
    text = tower | {"vocab_size": len(tokenizer), "max_position_embeddings": MAX_TOKENS}
    text |= {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=tower | {"image_size": image_size, "patch_size": 16}, projection_dim=width))


def embed_prompts(clip: CLIPModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> Tensor:
    """Words -> (P, E) of length 1.

    Raises:
        ValueError: a prompt of more tokens than CLIP has places.
    """
    rows = [[*tokenizer.encode(prompt, add_special_tokens=False), tokenizer.pad_token_id] for prompt in prompts]
    longest = max(len(row) for row in rows)
    places = clip.config.text_config.max_position_embeddings
    if longest > places:
        prompt = max(prompts, key=len)
        raise ValueError(f"a prompt of {longest - 1} tokens; this CLIP reads at most {places - 1}. Shorten {prompt[:80]!r}.")
    ids = torch.full((len(rows), longest), tokenizer.pad_token_id)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
    return F.normalize(clip.get_text_features(ids.to(clip.device)).pooler_output, dim=-1)


def embed_pictures(clip: CLIPModel, pixels: Tensor) -> Tensor:
    """(B, 3, H, W) in [-1, 1] -> (B, E) of length 1."""
    return F.normalize(clip.get_image_features(pixels.to(clip.dtype)).pooler_output, dim=-1)
