"""Pictures of an edit in colours that have no name: a model then learns to keep and move any colour, not those it has seen on a shape."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from data.drawn.world import BACKGROUND, COLORS, HELD_OUT

FROM_HELD_OUT = 100.0  # distance in RGB from a colour that is held out for the shape
FROM_BACKGROUND = 100.0
COLORED = ("recolor", "add", "replace")  # edits whose instruction names the new colour, or tells of it
ATTEMPTS = 1000


def repaint_scene(rng: np.random.Generator, scene: dict[str, Any]) -> dict[str, Any]:
    """The same edit with every colour but the one that is asked for replaced by any colour, an (R, G, B) of 0 to 255.

    A shape gets no colour near one that is held out for it, so that no training picture holds anything like a held-out combination.
    """
    pictures = {name: scene[name] for name in ("source", "second", "target") if name in scene}
    asked = scene["target"][scene["edited"]]["color"] if scene["like"] in COLORED else None
    shapes: dict[str, set[str]] = {}
    for objects in pictures.values():
        for o in objects:
            shapes.setdefault(o["color"], set()).add(o.get("shape", ""))
    paints = {color: color if color == asked else _any_color(rng, sorted(on)) for color, on in sorted(shapes.items())}
    return scene | {name: [o | {"color": paints[o["color"]]} for o in objects] for name, objects in pictures.items()}


def _any_color(rng: np.random.Generator, shapes: Sequence[str]) -> tuple[int, int, int]:
    for _ in range(ATTEMPTS):
        color = rng.integers(256, size=3)
        if _distance(color, BACKGROUND) >= FROM_BACKGROUND and not any(_near_held_out(color, shape) for shape in shapes):
            return tuple(color.tolist())
    raise AssertionError(f"no colour for {shapes} in {ATTEMPTS} attempts")


def _near_held_out(color: Sequence[int] | np.ndarray, shape: str) -> bool:
    """Whether this colour is nearest, or near, to one that is held out for the shape."""
    distances = {name: _distance(color, value) for name, value in COLORS.items()}
    nearest = min(distances, key=distances.__getitem__)
    return any(shape == held and (name == nearest or distances[name] < FROM_HELD_OUT) for name, held in HELD_OUT)


def _distance(a: Sequence[int] | np.ndarray, b: Sequence[int] | np.ndarray) -> float:
    return float(np.linalg.norm(np.subtract(a, b, dtype=float)))
