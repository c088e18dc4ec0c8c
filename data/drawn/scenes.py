"""Draws scenes with captions and edits with instructions. None stands for a draw that does not fit on the grid."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import numpy as np

from data.drawn.world import (
    CAPTIONS,
    CELL,
    CELLS,
    COLOR_CLUES,
    COLORS,
    COUNT_CLUES,
    INSTRUCTIONS,
    LETTERS,
    NUMBERS,
    OPPOSITE,
    PLURALS,
    POSITIONS,
    RELATIONS,
    SHAPE_CLUES,
    SHAPES,
)

Object = dict[str, Any]  # shape, color, x, y, radius; or word, color, x, y
Drawn = tuple[str, dict[str, Any]] | None  # words, scene
T = TypeVar("T")

JITTER, RADIUS, APART = 0.8, (5.6, 6.4), 12.0  # pixels


def draw_scene(rng: np.random.Generator, kind: str) -> Drawn:
    """A caption and its scene."""
    if kind == "reasoning":
        return _reasoning(rng)
    objects: list[Object] = []
    shape, color = _pick(rng, SHAPES), _pick(rng, COLORS)
    if kind == "word":
        word = _word(rng, color)
        return _say(rng, CAPTIONS[kind], **word), {"kind": kind, "objects": [word]}
    if kind == "position":
        position = _pick(rng, POSITIONS)
        objects.append(_object(rng, shape, color, POSITIONS[position]))
        return _say(rng, CAPTIONS[kind], **objects[0], position=position), {"kind": kind, "objects": objects, "position": position}
    if kind in ("single", "count"):
        count = 1 if kind == "single" else int(rng.integers(2, 5))
        if not all(_place(rng, objects, shape, color) for _ in range(count)):
            return None
        return _say(rng, CAPTIONS[kind], **objects[0], **_numbered(shape, count)), {"kind": kind, "objects": objects}
    other = _pick(rng, SHAPES), _pick(rng, COLORS)
    if other == (shape, color) or not _place(rng, objects, shape, color):
        return None
    relation = _pick(rng, RELATIONS) if kind == "relation" else None
    there = None if relation is None else (lambda x, y: relation_holds(objects[0], {"x": x, "y": y}, relation, 10))
    if not _place(rng, objects, *other, there):
        return None
    said = _say(rng, CAPTIONS[kind], a=_name(objects[0]), b=_name(objects[1]), relation=relation)
    return said, {"kind": kind, "objects": objects} | ({"relation": relation} if relation else {})


def _reasoning(rng: np.random.Generator) -> Drawn:
    """A caption that must be worked out; its scene holds the answer."""
    asked = _pick(rng, ("color", "shape", "count", "position"))
    shape, color = _pick(rng, SHAPES), _pick(rng, COLORS)
    objects: list[Object] = []
    scene: dict[str, Any] = {"kind": "reasoning", "objects": objects}
    clues: dict[str, str] = {}
    count = 1
    if asked == "position":
        clues["position"] = _pick(rng, POSITIONS)
        scene["position"] = OPPOSITE[clues["position"]]
        objects.append(_object(rng, shape, color, POSITIONS[scene["position"]]))
    elif asked == "color":
        clues["thing"] = _pick(rng, COLOR_CLUES)
        color = COLOR_CLUES[clues["thing"]]
    elif asked == "shape":
        clues["clue"] = _pick(rng, SHAPE_CLUES)
        shape = SHAPE_CLUES[clues["clue"]]
    else:
        clues["clue"] = _pick(rng, COUNT_CLUES)
        count = COUNT_CLUES[clues["clue"]]
    if not objects and not all(_place(rng, objects, shape, color) for _ in range(count)):
        return None
    return _say(rng, CAPTIONS[f"reasoning {asked}"], shape=shape, color=color, plural=PLURALS[shape], **clues), scene


def draw_edit(rng: np.random.Generator, kind: str) -> Drawn:
    """An instruction and its scene. The shapes of a picture are all different, so that "the circle" is one."""
    if kind in ("combine", "pick"):
        return _two_pictures(rng, kind)
    if kind == "word":
        return _other_word(rng)
    phrasing, like = kind, kind
    if kind == "reasoning":
        phrasing = _pick(rng, [name for name in INSTRUCTIONS if name.startswith("reasoning ")])
        like = {"reasoning paint": "recolor"}.get(phrasing, phrasing.removeprefix("reasoning "))
    count = int(rng.integers(*{"remove": (2, 4), "add": (1, 3)}.get(like, (1, 4))))
    source: list[Object] = []
    shapes = [str(shape) for shape in rng.permutation(SHAPES)]
    if not all(_place(rng, source, shape, _pick(rng, COLORS)) for shape in shapes[:count]):
        return None
    target = [dict(o) for o in source]
    place = int(rng.integers(count))
    edited: int | None = place
    changed = target[place]
    said: dict[str, Any] = {"shape": changed["shape"], "clue": _clue(SHAPE_CLUES, changed["shape"])}
    if like == "remove":
        target.remove(changed)
        edited = None
    elif like == "add":
        if not _place(rng, target, _pick(rng, shapes[count:]), _pick(rng, COLORS)):
            return None
        edited = len(target) - 1
        said |= target[-1]
    elif like == "move":
        position = _pick(rng, POSITIONS)
        to = _object(rng, changed["shape"], changed["color"], POSITIONS[position])
        far = max(abs(changed["x"] - to["x"]), abs(changed["y"] - to["y"])) >= APART
        if not far or not _is_free([o for o in target if o is not changed], to["x"], to["y"]):
            return None
        changed |= {"x": to["x"], "y": to["y"]}
        said["position"] = position if kind == "move" else OPPOSITE[position]
    else:
        if like == "replace":
            said["other"] = changed["shape"] = _pick(rng, shapes[count:])
        changed["color"] = _pick(rng, [color for color in COLORS if like == "replace" or color != changed["color"]])
        said |= {"color": changed["color"], "thing": _clue(COLOR_CLUES, changed["color"])}
    return _say(rng, INSTRUCTIONS[phrasing], **said), {"kind": kind, "like": like, "source": source, "target": target, "edited": edited}


def _other_word(rng: np.random.Generator) -> Drawn:
    word = _word(rng, _pick(rng, COLORS))
    target = word | {"word": _word(rng, word["color"])["word"]}
    if target["word"] == word["word"]:
        return None
    beside: list[Object] = []
    if rng.random() < 0.5:
        _place(rng, beside, _pick(rng, SHAPES), _pick(rng, COLORS), lambda _, y: not word["y"] <= y < word["y"] + CELL)
    said = _say(rng, INSTRUCTIONS["word"], word=target["word"])
    return said, {"kind": "word", "like": "word", "source": [word, *beside], "target": [target, *beside], "edited": 0}


def _two_pictures(rng: np.random.Generator, kind: str) -> Drawn:
    pictures: list[list[Object]] = [[], []]
    for objects in pictures:
        for _ in range(1 if kind == "combine" else int(rng.integers(1, 3))):
            if not _place(rng, objects, _pick(rng, SHAPES), _pick(rng, COLORS)):
                return None
    order = int(rng.integers(2))
    one, two = ("first", "second") if order == 0 else ("second", "first")
    target, other = pictures[order], pictures[1 - order]
    if any(a["shape"] == b["shape"] or a["color"] == b["color"] for a in target for b in other):  # so that a copy of the wrong one is wrong
        return None
    if kind == "combine":
        target = [target[0] | {"color": other[0]["color"]}]
    said = _say(rng, INSTRUCTIONS[kind], one=one, two=two)
    return said, {"kind": kind, "like": kind, "source": pictures[0], "second": pictures[1], "target": target, "edited": 0}


def relation_holds(a: Mapping[str, float], b: Mapping[str, float], relation: str, margin: float) -> bool:
    """Whether a is `relation` b, by at least `margin` pixels between centres."""
    dx, dy = b["x"] - a["x"], b["y"] - a["y"]
    return {"left of": dx, "right of": -dx, "above": dy, "below": -dy}[relation] > margin


def _pick(rng: np.random.Generator, options: Iterable[T]) -> T:
    options = list(options)
    return options[int(rng.integers(len(options)))]


def _say(rng: np.random.Generator, phrasings: tuple[str, ...], **said: Any) -> str:
    return _pick(rng, phrasings).format(**said)


def _name(o: Object) -> str:
    return f"a {o['color']} {o['shape']}"


def _numbered(shape: str, count: int) -> dict[str, str]:
    return {"number": NUMBERS[count], "plural": PLURALS[shape]}


def _clue(clues: Mapping[str, str], wanted: str) -> str:
    return next(clue for clue, answer in clues.items() if answer == wanted)


def _word(rng: np.random.Generator, color: str) -> Object:
    """Two to four letters from the left edge of a row."""
    letters = rng.choice(list(LETTERS), size=int(rng.integers(2, CELLS + 1)))
    return {"word": "".join(letters), "color": color, "x": 0, "y": CELL * int(rng.integers(CELLS))}


def _object(rng: np.random.Generator, shape: str, color: str, centre: tuple[float, float]) -> Object:
    radius = round(float(rng.uniform(*RADIUS)), 2)
    x, y = (round(axis + float(rng.uniform(-JITTER, JITTER)), 2) for axis in centre)
    return {"shape": shape, "color": color, "x": x, "y": y, "radius": radius}


def _place(
    rng: np.random.Generator, objects: list[Object], shape: str, color: str, where: Callable[[float, float], bool] | None = None
) -> bool:
    """Put one more object into a free cell where `where(x, y)` holds; False if none was found."""
    for _ in range(50):
        column, row = (int(n) for n in rng.integers(CELLS, size=2))
        o = _object(rng, shape, color, (CELL * (column + 0.5), CELL * (row + 0.5)))
        if _is_free(objects, o["x"], o["y"]) and (where is None or where(o["x"], o["y"])):
            objects.append(o)
            return True
    return False


def _is_free(objects: list[Object], x: float, y: float) -> bool:
    return all(max(abs(o["x"] - x), abs(o["y"] - y)) > APART for o in objects)
