"""The plain text encoder from which the stand-in DiT learns: it stands where SD3's own text encoders stood."""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from model.config import ModelConfig
from model.deepgen import Condition
from model.prompts import SPECIAL_TOKENS

TEXT_ENCODER = "text_encoder.safetensors"
MAX_WORDS = 24
END = SPECIAL_TOKENS[2]  # <|im_end|>


class PlainTextEncoder(nn.Module):
    """Words to a condition for the DiT. Thrown away after the DiT has learned."""

    def __init__(self, vocab_size: int, joint_attention_dim: int, pooled_projection_dim: int, layers: int = 2) -> None:
        super().__init__()
        self.words = nn.Embedding(vocab_size, joint_attention_dim)
        self.positions = nn.Parameter(torch.randn(MAX_WORDS, joint_attention_dim) * 0.1)
        self.places = nn.Parameter(torch.zeros(MAX_WORDS, joint_attention_dim))  # of a letter in its word
        layer = nn.TransformerEncoderLayer(joint_attention_dim, 4, joint_attention_dim * 4, 0.0, F.gelu, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(joint_attention_dim)
        self.pool = nn.Linear(joint_attention_dim, pooled_projection_dim)
        nn.init.normal_(self.words.weight, std=0.5)

    def forward(self, ids_BL: Tensor, places_BL: Tensor, lengths_B: Tensor) -> Condition:
        mask = torch.arange(ids_BL.shape[1]) < lengths_B[:, None]
        x = self.words(ids_BL) + self.positions[: ids_BL.shape[1]] + F.embedding(places_BL, self.places)
        x = self.norm(self.encoder(x, src_key_padding_mask=~mask))
        real = mask[..., None].to(x.dtype)
        return Condition(x * real, self.pool((x * real).sum(1) / real.sum(1)), lengths_B)


def word_ids(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
    """Ids (B, L) of each prompt's words and an end mark, places (B, L) of letters in their word, 0 first, and lengths (B,).

    "" is the end mark alone. Spelling needs the place, and a word may stand anywhere in a prompt.

    Raises:
        ValueError: a prompt of more than MAX_WORDS - 1 words.
    """
    end = tokenizer.convert_tokens_to_ids(END)
    encoded = tokenizer(list(prompts), add_special_tokens=False, return_offsets_mapping=True)
    lengths = torch.tensor([len(row) + 1 for row in encoded["input_ids"]])
    ids, places = (torch.zeros(len(prompts), int(lengths.max()), dtype=torch.long) for _ in range(2))
    for i, (prompt, row, spans) in enumerate(zip(prompts, encoded["input_ids"], encoded["offset_mapping"], strict=True)):
        if len(row) >= MAX_WORDS:
            raise ValueError(f"prompt of {len(row)} words, at most {MAX_WORDS - 1} fit: {prompt!r}. Shorten it or raise MAX_WORDS.")
        ids[i, : len(row) + 1] = torch.tensor([*row, end])
        place = [0] * len(row)
        for j in range(1, len(row)):
            place[j] = place[j - 1] + 1 if spans[j][0] == spans[j - 1][1] else 0
        places[i, : len(row)] = torch.tensor(place)
    return ids, places, lengths


def load_text_encoder(folder: Path, shapes: ModelConfig) -> PlainTextEncoder:
    """The trained one in a foundation's folder."""
    encoder = PlainTextEncoder(shapes.vlm.vocab_size, shapes.dit.joint_attention_dim, shapes.dit.pooled_projection_dim)
    encoder.load_state_dict(load_file(folder / TEXT_ENCODER))
    return encoder.eval()
