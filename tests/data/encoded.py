"""Small images, encoded, and what becomes of them under rules that refuse none for its size."""

import io

import numpy as np
import pytest
from PIL import Image

from data.config import ImageRules
from data.images import BadImage, PreparedImage, buckets, decode_image, prepare_image
from data.records import Reason

RULES = ImageRules(min_side=1, max_aspect=16)
BUCKETS = buckets(64)
NOISE = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
SMOOTH = np.stack(np.meshgrid(np.arange(64) * 4, np.arange(64) * 4), axis=-1).astype(np.uint8)
SMOOTH = np.concatenate([SMOOTH, 255 - SMOOTH[:, :, :1]], axis=-1)  # red grows to the right, green downwards


def texture(seed: int, width: int = 96, height: int = 96) -> np.ndarray:
    """A smooth picture of its own: no two are near duplicates."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def encode(pixels: np.ndarray | Image.Image, format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image = Image.fromarray(pixels) if isinstance(pixels, np.ndarray) else pixels
    image.save(buffer, format=format, **options)
    return buffer.getvalue()


def prepare(content: bytes, rules: ImageRules = RULES, lossless: bool = False) -> PreparedImage:
    return prepare_image(content, "row 7", rules, BUCKETS, lossless)


def pixels_of(content: bytes) -> np.ndarray:
    return decode_image(prepare(content).content, "x")


def refusal(content: bytes, rules: ImageRules = RULES) -> Reason:
    with pytest.raises(BadImage, match="row 7") as caught:
        prepare(content, rules)
    return caught.value.reason
