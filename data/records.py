"""Records: what a source yields and a shard holds. Images are encoded bytes until a batch needs pixels."""

import io
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from runtime.files import sha256_bytes, sha256_json

FORMATS = ("PNG", "JPEG", "WEBP")
MAX_PIXELS = 50_000_000


class BadImage(Exception):
    """Bytes that are no image we read, or too large an image."""


@dataclass(frozen=True)
class Record:
    """One sample of a source, ready to be written.

    target and references are PNG or JPEG bytes; scene is the drawn world's own description, for the verifier, and None elsewhere.
    """

    source_id: str
    source: str
    task: str
    category: str
    kind: str
    prompt: str
    target: bytes
    references: tuple[bytes, ...]
    licence: str
    scene: dict[str, Any] | None = None

    @property
    def key(self) -> str:
        """16 hex digits of where the record came from and what it holds."""
        content = [sha256_bytes(image) for image in (self.target, *self.references)]
        return sha256_json([self.source, self.source_id, self.task, self.prompt, content])[:16]


def encode_png(image: np.ndarray) -> bytes:
    """uint8 (H, W, 3) -> PNG; equal pixels give equal bytes."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG", compress_level=6)
    return buffer.getvalue()


def decode_image(content: bytes, name: str) -> np.ndarray:
    """Encoded bytes -> uint8 (H, W, 3).

    Raises:
        BadImage: naming `name`: not PNG, JPEG or WebP, cut short, or of more than 50 million pixels by its header.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own cap below is the stricter one
            opened = Image.open(io.BytesIO(content), formats=FORMATS)
        with opened as image:
            if image.width * image.height > MAX_PIXELS:
                raise BadImage(f"{name}: {image.width} x {image.height} pixels; allowed: up to {MAX_PIXELS:,}")
            return np.asarray(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise BadImage(f"{name}: {error}; expected a whole {', '.join(FORMATS)} file") from error
