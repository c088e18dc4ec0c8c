"""Reads an image of the drawn world back into objects, without seeing the caption, and scores them against a scene.

Connected components against templates: correctness is measured, not judged.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from data.drawn import BACKGROUND, COLORS, POSITIONS, SHAPES, SIDE, WORDS, coverage, relation_holds, word_coverage

TEMPLATE = 20  # side to which a component is scaled before it is compared
FOREGROUND = 85.0  # distance in RGB from the background
SMALLEST, SPECK = 25, 8  # pixels: below the first a component is no object, below the second it is nothing
MIN_OVERLAP, MIN_PURITY, MAX_COLOR_DISTANCE = 0.72, 0.7, 90.0
MIN_WORD_OVERLAP = 0.7
STAYED, MOVED_TO, IN_POSITION = 4.0, 8.0, 9.0  # pixels that a centre may lie off

_COLOR_NAMES = tuple(COLORS)
_COLOR_VALUES = np.array(list(COLORS.values()), np.float32)


@dataclass(frozen=True)
class Found:
    """An object seen in an image: what it is (None where it is nothing known) and the centre of its bounding box in pixels."""

    shape: str | None
    color: str | None
    x: float
    y: float


@dataclass(frozen=True)
class Verdict:
    """strict: every part is right. parts: what applies to this scene, each in [0, 1]."""

    strict: bool
    parts: dict[str, float]


def verify(scene: Mapping[str, Any], image: np.ndarray, task: str) -> Verdict:
    """Score a uint8 (SIDE, SIDE, 3) image against what was asked for.

    Raises:
        ValueError: an image of another size or type, which no threshold here is meant for.
    """
    if image.shape != (SIDE, SIDE, 3) or image.dtype != np.uint8:
        raise ValueError(f"verify reads uint8 ({SIDE}, {SIDE}, 3); got {image.dtype} {image.shape}: scale it first.")
    if task == "image_edit":
        parts = _edit_parts(find_objects(image), scene)
    elif scene["kind"] == "word":
        word, color = read_word(image)
        asked = scene["objects"][0]
        parts = {"word": float(word == asked["word"]), "color": float(color == asked["color"])}
    else:
        parts = _scene_parts(find_objects(image), scene)
    return Verdict(all(value == 1.0 for value in parts.values()), parts)


def _scene_parts(found: Sequence[Found], scene: Mapping[str, Any]) -> dict[str, float]:
    wanted = [(o["shape"], o["color"]) for o in scene["objects"]]
    seen = [(f.shape, f.color) for f in found]
    most = max(len(seen), len(wanted), 1)
    parts = {
        "count": float(len(seen) == len(wanted)),
        "shape": _overlap([s for s, _ in seen], [s for s, _ in wanted]) / most,
        "color": _overlap([c for _, c in seen], [c for _, c in wanted]) / most,
        "binding": _overlap(seen, wanted) / most,
    }
    if "relation" in scene:
        first, second = ([f for f in found if (f.shape, f.color) == want] for want in wanted)
        alone = len(first) == 1 and len(second) == 1
        parts["relation"] = float(alone and relation_holds(vars(first[0]), vars(second[0]), scene["relation"], 4))
    if "position" in scene:
        matches = [f for f in found if (f.shape, f.color) == wanted[0]]
        parts["position"] = float(len(matches) == 1 and _near(matches[0], *POSITIONS[scene["position"]], IN_POSITION))
    return parts


def _edit_parts(found: Sequence[Found], scene: Mapping[str, Any]) -> dict[str, float]:
    """kept: share of what should have stayed that is where it was; edited: the change itself; count: nothing more, nothing less."""
    target, edited = scene["target"], scene["edited"]
    left, kept = list(found), 0
    stays = [o for i, o in enumerate(target) if i != edited]
    for o in stays:
        match = next((f for f in left if (f.shape, f.color) == (o["shape"], o["color"]) and _near(f, o["x"], o["y"], STAYED)), None)
        if match is not None:
            left.remove(match)
            kept += 1
    if edited is None:
        done = not left
    else:
        o = target[edited]
        off: dict[str, float] = {"recolor": STAYED, "move": MOVED_TO, "add": float("inf")}
        done = any((f.shape, f.color) == (o["shape"], o["color"]) and _near(f, o["x"], o["y"], off[scene["kind"]]) for f in left)
    return {"kept": kept / len(stays) if stays else 1.0, "edited": float(done), "count": float(len(found) == len(target))}


def _overlap(seen: Sequence[Any], wanted: Sequence[Any]) -> int:
    return sum((Counter(seen) & Counter(wanted)).values())


def _near(found: Found, x: float, y: float, off: float) -> bool:
    return max(abs(found.x - x), abs(found.y - y)) < off


def find_objects(image: np.ndarray) -> list[Found]:
    """Every component that stands out from the background; one too small or unlike any shape or colour is found as None."""
    from scipy import ndimage

    pixels = np.asarray(image, np.float32)
    stands_out = np.linalg.norm(pixels - np.array(BACKGROUND, np.float32), axis=-1) > FOREGROUND
    labels, _ = ndimage.label(stands_out)
    found = []
    for number, (rows, columns) in enumerate(ndimage.find_objects(labels), start=1):
        mask = labels[rows, columns] == number
        area = int(mask.sum())
        if area < SPECK:
            continue
        x, y = (columns.start + columns.stop) / 2, (rows.start + rows.stop) / 2
        if area < SMALLEST:
            found.append(Found(None, None, x, y))
            continue
        found.append(Found(_shape_of(mask, ndimage.zoom), _color_of(pixels[rows, columns], mask, ndimage.binary_erosion), x, y))
    return found


def _shape_of(mask: np.ndarray, zoom: Callable[..., np.ndarray]) -> str | None:
    height, width = mask.shape
    if not 0.65 < height / width < 1.55:
        return None
    scaled = _to_template(mask, zoom)
    templates = _templates()
    both = (templates & scaled).sum((1, 2))
    overlap = both / (templates | scaled).sum((1, 2))
    best = int(overlap.argmax())
    return SHAPES[best] if overlap[best] > MIN_OVERLAP else None


def _color_of(pixels: np.ndarray, mask: np.ndarray, erode: Callable[..., np.ndarray]) -> str | None:
    inner = erode(mask)
    if inner.sum() < 6:
        inner = mask
    inside = pixels[inner]
    nearest = np.linalg.norm(inside[:, None] - _COLOR_VALUES, axis=-1).argmin(-1)
    counts = np.bincount(nearest, minlength=len(_COLOR_NAMES))
    best = int(counts.argmax())
    pure = counts[best] / counts.sum() > MIN_PURITY
    close = np.linalg.norm(inside.mean(0) - _COLOR_VALUES[best]) < MAX_COLOR_DISTANCE
    return _COLOR_NAMES[best] if pure and close else None


def _to_template(mask: np.ndarray, zoom: Callable[..., np.ndarray]) -> np.ndarray:
    height, width = mask.shape
    return zoom(mask.astype(np.float32), (TEMPLATE / height, TEMPLATE / width), order=1, grid_mode=True, mode="nearest") > 0.5


def _crop(mask: np.ndarray) -> np.ndarray:
    rows, columns = np.where(mask)
    return mask[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]


@cache
def _templates() -> np.ndarray:
    from scipy import ndimage

    return np.stack([_to_template(_crop(coverage(shape, 32.0, 32.0, 16.0) > 0.5), ndimage.zoom) for shape in SHAPES])


@cache
def _word_templates() -> dict[str, np.ndarray]:
    return {word: _crop(word_coverage(word, 0, 0) > 0) for word in WORDS}


def read_word(image: np.ndarray) -> tuple[str | None, str | None]:
    """The word of the list that fits what stands out, and its colour; None where nothing fits."""
    pixels = np.asarray(image, np.float32)
    stands_out = np.linalg.norm(pixels - np.array(BACKGROUND, np.float32), axis=-1) > FOREGROUND
    if stands_out.sum() < 40:
        return None, None
    seen = _crop(stands_out)
    overlaps = {word: _best_overlap(seen, template) for word, template in _word_templates().items()}
    best = max(overlaps, key=lambda word: overlaps[word])
    color = _COLOR_NAMES[int(np.linalg.norm(pixels[stands_out].mean(0) - _COLOR_VALUES, axis=-1).argmin())]
    return (best if overlaps[best] > MIN_WORD_OVERLAP else None), color


def _best_overlap(seen: np.ndarray, template: np.ndarray) -> float:
    """Largest intersection over union over small shifts; 0 where the sizes differ by more than 3 pixels."""
    height, width = max(seen.shape[0], template.shape[0]), max(seen.shape[1], template.shape[1])
    if abs(seen.shape[0] - template.shape[0]) > 3 or abs(seen.shape[1] - template.shape[1]) > 3:
        return 0.0
    base = np.zeros((height, width), bool)
    base[: seen.shape[0], : seen.shape[1]] = seen
    best = 0.0
    for down in range(height - template.shape[0] + 1):
        for right in range(width - template.shape[1] + 1):
            moved = np.zeros_like(base)
            moved[down : down + template.shape[0], right : right + template.shape[1]] = template
            best = max(best, float((base & moved).sum() / (base | moved).sum()))
    return best
