"""Chat templates and tokens: what the VLM reads for generating and for editing (paper section 3; released templates)."""

import logging
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

HEADER, FOOTER = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
GENERATE = "Generate an image: "
VISION_START, IMAGE_PAD, VISION_END = "<|vision_start|>", "<|image_pad|>", "<|vision_end|>"
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", VISION_START, VISION_END, IMAGE_PAD, "<|video_pad|>")

logger = logging.getLogger(__name__)


def prompt_tokens(tokenizer: PreTrainedTokenizerBase, prompt: str, image_tokens: Sequence[int], limit: int) -> list[int]:
    """Token ids of one chat turn, up to and including the assistant's header.

    Args:
        prompt: a caption, an instruction, or "" for the unconditional branch.
        image_tokens: how many tokens each reference image takes; empty for text-to-image.
        limit: the most tokens of the user's own text; of longer text the middle is left out, with a warning.

    Raises:
        ValueError: the prompt holds a control token of the chat template.
    """
    forbidden = [token for token in SPECIAL_TOKENS if token in prompt]
    if forbidden:
        raise ValueError(f"prompt holds the control tokens {forbidden}; expected plain text. Remove them from {prompt[:80]!r}.")
    images = "".join(VISION_START + IMAGE_PAD * count + VISION_END for count in image_tokens)
    before = HEADER + (images + "\n" if images else GENERATE)
    text = tokenizer.encode(prompt, add_special_tokens=False) if prompt else []
    if len(text) > limit:
        logger.warning("prompt of %d tokens: the middle %d are left out (limit %d)", len(text), len(text) - limit, limit)
        text = text[: limit - limit // 2] + text[len(text) - limit // 2 :]
    return tokenizer.encode(before, add_special_tokens=False) + text + tokenizer.encode(FOOTER, add_special_tokens=False)
