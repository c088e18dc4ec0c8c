"""Similarity of picture and prompt by a CLIP, a cosine: transformers' model and tokenizer from a folder on this machine."""

import threading
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoTokenizer, CLIPModel

from runtime.exits import Plain
from runtime.files import read_json
from training.batching import stack_pixels
from training.rewards.scores import Group, Scores


class NoCLIP(Plain):
    """The reward `clip` is asked for, and its folder lacks weights, or holds another model's."""


class CLIPSimilarity:
    """Applies to text-to-image: of an edit's instruction a picture is no likeness.

    What a prompt has beyond CLIP's length is not read; the share of prompts that were cut is told.

    Args:
        folder: of config.json and model.safetensors; of a released CLIP also preprocessor_config.json and the tokenizer's files.
        tokenizer: the project's, for a CLIP that has none of its own: it closes a prompt by padding, and reads pixels in [-1, 1].

    Raises:
        NoCLIP: naming what is missing, or does not belong together.
    """

    names: tuple[str, ...] = ("clip",)

    def __init__(self, folder: Path, tokenizer: Path, device: torch.device) -> None:
        self.own = (folder / "tokenizer_config.json").is_file()
        words = folder if self.own else tokenizer
        for file in (folder / "config.json", folder / "model.safetensors", words / "tokenizer_config.json"):
            if not file.is_file():
                raise NoCLIP(f"{file} is missing, which the reward clip reads. Bring it there, or take clip out of mr_grpo.rewards.")
        kind = read_json(folder / "config.json").get("model_type")
        if kind != "clip":
            raise NoCLIP(f"{folder / 'config.json'}: model_type is {kind!r}, the reward clip reads 'clip'. Bring a CLIP's folder there.")
        clip, loaded = CLIPModel.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True, local_files_only=True, output_loading_info=True
        )
        if absent := sorted(loaded["missing_keys"]):  # transformers makes them up
            raise NoCLIP(f"{folder / 'model.safetensors'} lacks {absent[0]} ({len(absent)} of its tensors). Bring the whole file there.")
        self.clip = clip.eval().to(device)
        self.tokenizer = AutoTokenizer.from_pretrained(words, local_files_only=True)
        if len(self.tokenizer) > (rows := clip.config.text_config.vocab_size):
            raise NoCLIP(
                f"{words}: {len(self.tokenizer)} words, and the CLIP in {folder} has rows for {rows}. It needs the tokenizer that it was "
                "trained with: in its own folder, or the project's if that is the one."
            )
        file = folder / "preprocessor_config.json"
        norm = read_json(file) if file.is_file() else {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
        self.mean, self.std = (torch.tensor(norm[f"image_{name}"], device=device).view(3, 1, 1) for name in ("mean", "std"))
        self.device, self.lock = device, threading.Lock()
        self.asked = self.cut = 0

    @torch.no_grad()
    def __call__(self, group: Group) -> Scores:
        if group.task != "text_to_image":
            return Scores.unasked(self.names, len(group.images))
        # One caption for all: a group's images are compared, and nothing else.
        caption = F.normalize(self.clip.get_text_features(self.tokens(group.prompt)).pooler_output, dim=-1)
        pictures = F.normalize(self.clip.get_image_features(self.pixels(group)).pooler_output, dim=-1)
        there = torch.ones(len(group.images), 1, dtype=torch.bool)
        return Scores(self.names, (pictures @ caption.T).float().cpu(), there, there.clone())

    def tokens(self, prompt: str) -> Tensor:
        """(1, L) ids, of no more than CLIP has places."""
        ids = self.tokenizer.encode(prompt, add_special_tokens=self.own)
        end = ids[-1] if self.own else self.tokenizer.pad_token_id
        ids = ids if self.own else [*ids, end]
        places = self.clip.config.text_config.max_position_embeddings
        with self.lock:
            self.asked += 1
            self.cut += len(ids) > places
        return torch.tensor([[*ids[: places - 1], end] if len(ids) > places else ids], device=self.device)

    def pixels(self, group: Group) -> Tensor:
        """(G, 3, S, S) as CLIP reads them; S is its image size."""
        side = self.clip.config.vision_config.image_size
        pixels = (stack_pixels(group.images, self.device) + 1) / 2
        if pixels.shape[-2:] != (side, side):
            pixels = F.interpolate(pixels, (side, side), mode="bicubic", antialias=True).clamp(0, 1)
        return (pixels - self.mean) / self.std

    def facts(self) -> dict[str, float]:
        with self.lock:
            share = self.cut / max(1, self.asked)
            self.asked = self.cut = 0
        return {"clip/prompts_cut": share}
