"""The drawn world: coloured shapes on a 4 x 4 grid with true captions, edits with true instructions, words to render.

A sample is a function of (split, seed, index, task) and nothing else. Which split a scene may belong to is decided by its content,
so that splits cannot overlap; captions, of which there are few ("a red circle"), do recur across splits, scenes never.
"""

# images are uint8 (SIDE, SIDE, 3); places are pixels, x to the right and y down, from the top left corner

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from data.config import DRAWN_SIZE, EDITS, KINDS
from runtime.keys import seed_from

SIDE, CELL, CELLS = DRAWN_SIZE, 16, 4
BACKGROUND = (24, 24, 32)
COLORS = {
    "red": (225, 45, 45),
    "green": (50, 190, 70),
    "blue": (55, 95, 235),
    "yellow": (240, 215, 55),
    "purple": (165, 60, 205),
    "white": (240, 240, 240),
}
SHAPES = ("circle", "square", "triangle", "cross")
PLURALS = {"circle": "circles", "square": "squares", "triangle": "triangles", "cross": "crosses"}
NUMBERS = {1: "one", 2: "two", 3: "three", 4: "four"}
RELATIONS = ("left of", "right of", "above", "below")
POSITIONS = {"top left": (8, 8), "top right": (56, 8), "bottom left": (8, 56), "bottom right": (56, 56)}
WORDS = ("CAT", "DOG", "SUN", "HAT", "PEN", "ICE", "TOP", "EGG")
GLYPHS = {
    "A": "01110 10001 10001 11111 10001",
    "C": "01111 10000 10000 10000 01111",
    "D": "11110 10001 10001 10001 11110",
    "E": "11111 10000 11110 10000 11111",
    "G": "01111 10000 10011 10001 01111",
    "H": "10001 10001 11111 10001 10001",
    "I": "11111 00100 00100 00100 11111",
    "N": "10001 11001 10101 10011 10001",
    "O": "01110 10001 10001 10001 01110",
    "P": "11110 10001 11110 10000 10000",
    "S": "01111 10000 01110 00001 11110",
    "T": "11111 00100 00100 00100 00100",
    "U": "10001 10001 10001 10001 01110",
}
VOCABULARY = tuple(
    sorted(
        {
            *["a", "the", "word", "in", "and", "to", "of", "make", "remove", "add", "move"],
            *COLORS,
            *SHAPES,
            *PLURALS.values(),
            *NUMBERS.values(),
            *WORDS,
            *(word for phrase in (*RELATIONS, *POSITIONS) for word in phrase.split()),
        }
    )
)
SPLITS = {"train": range(0, 90), "validation": range(90, 95), "evaluation": range(95, 100)}

_Y, _X = np.mgrid[0:SIDE, 0:SIDE].astype(np.float32) + 0.5


@dataclass(frozen=True)
class DrawnSample:
    """A prompt with the image it asks for.

    references holds the images to edit (none for text-to-image); scene is what the verifier needs, as plain values: `kind`, and
    `objects` (text_to_image) or `source`, `target`, `edited` (image_edit; `edited` is the index in `target`, None after a removal).
    """

    task: str
    prompt: str
    target: np.ndarray
    references: tuple[np.ndarray, ...]
    kind: str
    scene: dict[str, Any]


def draw_text_to_image(split: str, seed: int, index: int, kinds: Mapping[str, float] = KINDS) -> DrawnSample:
    """Caption and image number `index` of a stream."""
    for attempt in range(10_000):
        rng = _generator(split, seed, index, "text_to_image", attempt)
        drawn = _scene(rng, _choose(rng, kinds))
        if drawn is not None and _belongs(split, drawn[0], drawn[1]):
            caption, scene = drawn
            return DrawnSample("text_to_image", caption, render(scene["objects"]), (), scene["kind"], scene)
    raise AssertionError(f"no scene of split {split!r} in 10,000 attempts: kinds {dict(kinds)}")


def draw_image_edit(split: str, seed: int, index: int, kinds: Mapping[str, float] = EDITS) -> DrawnSample:
    """Instruction, source and target number `index` of a stream."""
    for attempt in range(10_000):
        rng = _generator(split, seed, index, "image_edit", attempt)
        drawn = _edit(rng, _choose(rng, kinds))
        if drawn is not None and _belongs(split, drawn[0], drawn[1]):
            instruction, scene = drawn
            return DrawnSample("image_edit", instruction, render(scene["target"]), (render(scene["source"]),), scene["kind"], scene)
    raise AssertionError(f"no edit of split {split!r} in 10,000 attempts: kinds {dict(kinds)}")


def _generator(*purpose: str | int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=seed_from("drawn", *purpose)))


def _choose(rng: np.random.Generator, weights: Mapping[str, float]) -> str:
    """A kind by weight. They are walked in our order, not the caller's: how params.yaml orders its keys changes no draw."""
    kinds = [kind for kind in (*KINDS, *EDITS) if weights.get(kind, 0) > 0]
    total = sum(weights[kind] for kind in kinds)
    return str(rng.choice(kinds, p=[weights[kind] / total for kind in kinds]))


def _belongs(split: str, prompt: str, scene: dict[str, Any]) -> bool:
    """The content alone decides the split: prompt and scene, places as whole pixels."""
    whole = json.dumps([prompt, scene], sort_keys=True, default=float)
    rounded = json.dumps([prompt, _rounded(json.loads(whole))], sort_keys=True)
    return seed_from("split", rounded) % 100 in SPLITS[split]


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_rounded(inner) for inner in value]
    return round(value) if isinstance(value, float) else value


# ---------------------------------------------------------------- scenes


def _pick(rng: np.random.Generator, options: Any) -> Any:
    options = list(options)
    return options[int(rng.integers(len(options)))]


def _place(rng: np.random.Generator, objects: list[dict[str, Any]], shape: str, color: str, where: Any = None) -> bool:
    """Put one more object into a free cell where `where(x, y)` holds; False if none was found."""
    for _ in range(200):
        radius = round(float(rng.uniform(5.6, 6.4)), 2)
        x, y = (round(float(CELL * (rng.integers(CELLS) + 0.5) + rng.uniform(-0.8, 0.8)), 2) for _ in range(2))
        if is_free(objects, x, y) and (where is None or where(x, y)):
            objects.append({"shape": shape, "color": color, "x": x, "y": y, "radius": radius})
            return True
    return False


def is_free(objects: list[dict[str, Any]], x: float, y: float) -> bool:
    return all(max(abs(o["x"] - x), abs(o["y"] - y)) > 12 for o in objects)


def relation_holds(a: Mapping[str, float], b: Mapping[str, float], relation: str, margin: float) -> bool:
    """Whether a is `relation` b, by at least `margin` pixels between centres."""
    dx, dy = b["x"] - a["x"], b["y"] - a["y"]
    return {"left of": dx, "right of": -dx, "above": dy, "below": -dy}[relation] > margin


def _name(o: Mapping[str, Any]) -> str:
    return f"a {o['color']} {o['shape']}"


def _scene(rng: np.random.Generator, kind: str) -> tuple[str, dict[str, Any]] | None:
    """A caption and its scene, or None where the draw does not fit on the grid."""
    objects: list[dict[str, Any]] = []
    shape, color = _pick(rng, SHAPES), _pick(rng, COLORS)
    if kind == "word":
        word = _pick(rng, WORDS)
        row, column = int(rng.integers(CELLS)), int(rng.integers(CELLS - len(word) + 1))
        objects.append({"word": word, "color": color, "x": CELL * column, "y": CELL * row})
        return f"the word {word} in {color}", {"kind": kind, "objects": objects}
    if kind == "single":
        return (f"a {color} {shape}", {"kind": kind, "objects": objects}) if _place(rng, objects, shape, color) else None
    if kind == "position":
        position = _pick(rng, POSITIONS)
        px, py = POSITIONS[position]
        _place(rng, objects, shape, color, lambda x, y: max(abs(x - px), abs(y - py)) < 6)
        return (f"a {color} {shape} in the {position}", {"kind": kind, "objects": objects, "position": position}) if objects else None
    if kind == "count":
        count = int(rng.integers(2, 5))
        if not all(_place(rng, objects, shape, color) for _ in range(count)):
            return None
        return f"{NUMBERS[count]} {color} {PLURALS[shape]}", {"kind": kind, "objects": objects}
    other_shape, other_color = _pick(rng, SHAPES), _pick(rng, COLORS)
    if (other_shape, other_color) == (shape, color) or not _place(rng, objects, shape, color):
        return None
    first = objects[0]
    if kind == "two":
        if not _place(rng, objects, other_shape, other_color):
            return None
        return f"{_name(first)} and {_name(objects[1])}", {"kind": kind, "objects": objects}
    relation = _pick(rng, RELATIONS)
    if not _place(rng, objects, other_shape, other_color, lambda x, y: relation_holds(first, {"x": x, "y": y}, relation, 10)):
        return None
    return f"{_name(first)} {relation} {_name(objects[1])}", {"kind": kind, "objects": objects, "relation": relation}


def _edit(rng: np.random.Generator, kind: str) -> tuple[str, dict[str, Any]] | None:
    """An instruction and its scene, or None where the draw does not fit on the grid. Shapes in a source are all different."""
    count = int(rng.integers(*{"remove": (2, 4), "add": (1, 3)}.get(kind, (1, 4))))
    source: list[dict[str, Any]] = []
    shapes = [str(shape) for shape in rng.permutation(SHAPES)]
    if not all(_place(rng, source, shape, _pick(rng, COLORS)) for shape in shapes[:count]):
        return None
    target = [dict(o) for o in source]
    place = int(rng.integers(count))
    edited: int | None = place
    changed = target[place]
    if kind == "recolor":
        changed["color"] = _pick(rng, [color for color in COLORS if color != changed["color"]])
        instruction = f"make the {changed['shape']} {changed['color']}"
    elif kind == "remove":
        instruction, edited = f"remove the {changed['shape']}", None
        target.remove(changed)
    elif kind == "add":
        if not _place(rng, target, _pick(rng, shapes[count:]), _pick(rng, COLORS)):
            return None
        instruction, edited = f"add {_name(target[-1])}", len(target) - 1
    else:
        position = _pick(rng, POSITIONS)
        x, y = (round(centre + float(rng.uniform(-0.8, 0.8)), 2) for centre in POSITIONS[position])
        far = max(abs(changed["x"] - x), abs(changed["y"] - y)) >= 12
        if not far or not is_free([o for o in target if o is not changed], x, y):
            return None
        changed["x"], changed["y"] = x, y
        instruction = f"move the {changed['shape']} to the {position}"
    return instruction, {"kind": kind, "source": source, "target": target, "edited": edited}


# ---------------------------------------------------------------- pixels


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


def word_coverage(word: str, x: float, y: float) -> np.ndarray:
    """(SIDE, SIDE) pixels of a word, one letter of 10 x 10 pixels a cell, from the cell whose corner is (x, y)."""
    mask = np.zeros((SIDE, SIDE), np.float32)
    for i, letter in enumerate(word):
        glyph = np.array([[int(bit) for bit in row] for row in GLYPHS[letter].split()], np.float32)
        top, left = int(y) + 3, int(x) + 3 + i * CELL
        mask[top : top + 10, left : left + 10] = np.kron(glyph, np.ones((2, 2), np.float32))
    return mask


def render(objects: list[dict[str, Any]]) -> np.ndarray:
    """uint8 (SIDE, SIDE, 3) image of a scene's objects, in order."""
    image = np.broadcast_to(np.array(BACKGROUND, np.float32), (SIDE, SIDE, 3)).copy()
    for o in objects:
        mask = word_coverage(o["word"], o["x"], o["y"]) if "word" in o else coverage(o["shape"], o["x"], o["y"], o["radius"])
        image += mask[..., None] * (np.array(COLORS[o["color"]], np.float32) - image)
    return image.round().astype(np.uint8)


# ---------------------------------------------------------------- combinations


def held_out(scene: Mapping[str, Any]) -> bool:
    """Whether a scene combines what no training scene combines. Splits keep no combination apart yet: none does."""
    return False
