"""Objects to pixels. Images are uint8 (SIDE, SIDE, 3); places are pixels, x to the right and y down, from the top left corner."""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np

from data.drawn.world import BACKGROUND, CELL, COLORS, LETTERS, SIDE

_Y, _X = np.mgrid[0:SIDE, 0:SIDE].astype(np.float32) + 0.5


def coverage(shape: str, x: float, y: float, radius: float) -> np.ndarray:
    """(SIDE, SIDE) share of each pixel that the shape covers, from its signed distance."""
    dx, dy = _X - x, _Y - y
    if shape == "circle":
        distance = np.sqrt(dx * dx + dy * dy) - radius
    elif shape == "square":
        distance = np.maximum(abs(dx), abs(dy)) - radius * 0.9
    elif shape == "triangle":  # apex up, base as wide as twice the radius
        distance = np.maximum(dy - radius, (abs(dx) - (dy + radius) * 0.5) / np.sqrt(1.25))
    else:
        arm = radius * 0.36
        distance = np.minimum(np.maximum(abs(dx) - radius, abs(dy) - arm), np.maximum(abs(dx) - arm, abs(dy) - radius))
    return np.clip(0.5 - distance, 0, 1)


@cache
def letter_mask(letter: str) -> np.ndarray:
    """(CELL, CELL) pixels of a letter, 10 x 10 of them in the middle."""
    glyph = np.array([[int(bit) for bit in row] for row in LETTERS[letter].split()], np.float32)
    return np.pad(np.kron(glyph, np.ones((2, 2), np.float32)), (CELL - 10) // 2)


def word_coverage(word: str, x: float, y: float) -> np.ndarray:
    """(SIDE, SIDE) pixels of a word, one letter a cell, from the cell whose corner is (x, y)."""
    mask = np.zeros((SIDE, SIDE), np.float32)
    for i, letter in enumerate(word):
        left = int(x) + i * CELL
        mask[int(y) : int(y) + CELL, left : left + CELL] = letter_mask(letter)
    return mask


def render(objects: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """uint8 (SIDE, SIDE, 3) image of a scene's objects, in order; a color is a name or an (R, G, B)."""
    image = np.broadcast_to(np.array(BACKGROUND, np.float32), (SIDE, SIDE, 3)).copy()
    for o in objects:
        mask = word_coverage(o["word"], o["x"], o["y"]) if "word" in o else coverage(o["shape"], o["x"], o["y"], o["radius"])
        color = COLORS[o["color"]] if isinstance(o["color"], str) else o["color"]
        image += mask[..., None] * (np.array(color, np.float32) - image)
    return image.round().astype(np.uint8)
