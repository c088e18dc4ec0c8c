"""The drawn world: coloured shapes on a 4 x 4 grid with true captions, edits with true instructions, words to write.

A sample is a function of (split, seed, index, task, kinds) and nothing else. Which split a scene may belong to is decided by the content of
its pictures, so that splits cannot overlap; captions, of which there are few ("a red circle"), do recur across splits, pictures never.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from data.config import EDITS, KINDS
from data.drawn.pixels import coverage, letter_mask, render, word_coverage
from data.drawn.repaint import repaint_scene
from data.drawn.scenes import Drawn, draw_edit, draw_scene, relation_holds
from data.drawn.world import (
    BACKGROUND,
    CELL,
    COLORS,
    HELD_OUT,
    LETTERS,
    NUMBERS,
    POSITIONS,
    SHAPES,
    SIDE,
    VOCABULARY,
)
from runtime.keys import seed_from

__all__ = [
    "BACKGROUND",
    "CELL",
    "COLORS",
    "HELD_OUT",
    "LETTERS",
    "NUMBERS",
    "POSITIONS",
    "SHAPES",
    "SIDE",
    "VOCABULARY",
    "DrawnSample",
    "coverage",
    "draw_image_edit",
    "draw_text_to_image",
    "held_out",
    "letter_mask",
    "relation_holds",
    "render",
    "repainted",
    "word_coverage",
]

SPLITS = {"train": range(0, 90), "validation": range(90, 95), "evaluation": range(95, 100)}  # of a hundred
ATTEMPTS = 10_000


@dataclass(frozen=True)
class DrawnSample:
    """A prompt with the image it asks for.

    references holds the images to edit (none for text-to-image, two for `combine` and `pick`); scene is what the verifier needs, as plain
    values: `kind`, and `objects` (text_to_image) or `like`, `source`, `second`, `target`, `edited` (image_edit; `like` is what is done,
    `edited` the index in `target`, None after a removal).
    """

    task: str
    prompt: str
    target: np.ndarray
    references: tuple[np.ndarray, ...]
    kind: str
    scene: dict[str, Any]


def draw_text_to_image(split: str, seed: int, index: int, kinds: Mapping[str, float] = KINDS) -> DrawnSample:
    """Caption and image number `index` of a stream."""
    caption, scene = _draw(draw_scene, split, seed, index, "text_to_image", kinds)
    return DrawnSample("text_to_image", caption, render(scene["objects"]), (), scene["kind"], scene)


def draw_image_edit(split: str, seed: int, index: int, kinds: Mapping[str, float] = EDITS) -> DrawnSample:
    """Instruction, one or two sources, and target number `index` of a stream."""
    instruction, scene = _draw(draw_edit, split, seed, index, "image_edit", kinds)
    return DrawnSample("image_edit", instruction, render(scene["target"]), _references(scene), scene["kind"], scene)


def repainted(sample: DrawnSample, seed: int, index: int) -> DrawnSample:
    """A training edit in colours that have no name, but for the one that its instruction asks for; number `index` of a stream."""
    rng = np.random.Generator(np.random.Philox(key=seed_from("repainted", seed, index)))
    scene = repaint_scene(rng, sample.scene)
    return replace(sample, target=render(scene["target"]), references=_references(scene), scene=scene)


def held_out(scene: Mapping[str, Any]) -> bool:
    """Whether a scene holds a colour on a shape that no training scene combines."""
    return any((o["color"], o.get("shape")) in HELD_OUT for objects in _pictures(scene) for o in objects)


def _references(scene: Mapping[str, Any]) -> tuple[np.ndarray, ...]:
    return tuple(render(scene[name]) for name in ("source", "second") if name in scene)


def _draw(
    draw: Callable[[np.random.Generator, str], Drawn], split: str, seed: int, index: int, task: str, kinds: Mapping[str, float]
) -> tuple[str, dict[str, Any]]:
    rng = np.random.Generator(np.random.Philox(key=seed_from("drawn", split, seed, index, task)))
    kind = _choose(rng, kinds)
    for _ in range(ATTEMPTS):
        drawn = draw(rng, kind)
        if drawn is not None and _belongs(split, drawn[1]):
            return drawn
    raise AssertionError(f"no scene of split {split!r} and kind {kind!r} in {ATTEMPTS} attempts")


def _choose(rng: np.random.Generator, weights: Mapping[str, float]) -> str:
    """A kind by weight. They are walked by name, not in the caller's order: how params.yaml orders its keys changes no draw."""
    kinds = sorted(kind for kind in weights if weights[kind] > 0)
    total = sum(weights.values())
    return str(rng.choice(kinds, p=[weights[kind] / total for kind in kinds]))


def _pictures(scene: Mapping[str, Any]) -> list[list[dict[str, Any]]]:
    return [scene[name] for name in ("objects", "source", "second", "target") if name in scene]


def _belongs(split: str, scene: Mapping[str, Any]) -> bool:
    """The pictures alone decide, places as whole pixels."""
    if split == "train" and held_out(scene):
        return False
    pictures = [
        [[o.get("word", o.get("shape")), o["color"], round(o["x"]), round(o["y"])] for o in objects] for objects in _pictures(scene)
    ]
    return seed_from("split", json.dumps(pictures)) % 100 in SPLITS[split]
