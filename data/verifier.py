"""Reads an image of the drawn world back into objects, without seeing the caption, and scores them against a scene.

Shapes are connected components against templates, letters are cells of the grid against glyphs: correctness is measured, not judged.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from data.drawn import BACKGROUND, CELL, COLORS, LETTERS, POSITIONS, SHAPES, SIDE, coverage, letter_mask, relation_holds
from data.drawn.world import CELLS

TEMPLATE = 20  # side to which a component is scaled before it is compared
FOREGROUND = 85.0  # distance in RGB from the background
SMALLEST, SPECK = 25, 8  # pixels: below the first a component is no object, below the second it is nothing
MIN_OVERLAP, MIN_PURITY, MAX_COLOR_DISTANCE = 0.72, 0.7, 90.0
COVERED = 0.5  # share of the way from the background to its colour from which a pixel belongs to a letter
MIN_LETTER, LETTER_MARGIN, LETTER_SHIFT = 0.7, 0.08, 1  # overlap with a glyph, its lead over the next glyph, pixels that it may lie off
STAYED, MOVED_TO, IN_POSITION = 4.0, 8.0, 9.0  # pixels that a centre may lie off
RELATED_BY = 4.0  # pixels by which a relation must hold
ANYWHERE = float("inf")
EDITED_WITHIN = {
    "recolor": STAYED,
    "replace": STAYED,
    "word": STAYED,
    "move": MOVED_TO,
    "add": ANYWHERE,
    "combine": ANYWHERE,
    "pick": ANYWHERE,
}
UNKNOWN = "?"  # a letter that fits no glyph

_BACKGROUND = np.array(BACKGROUND, np.float32)
_COLOR_NAMES = tuple(COLORS)
_COLOR_VALUES = np.array(list(COLORS.values()), np.float32)
_INKS = _COLOR_VALUES - _BACKGROUND
_LENGTHS = (_INKS**2).sum(-1)  # squared


@dataclass(frozen=True)
class Found:
    """An object seen in an image: what it is (None where it is nothing known), its colour and its place in pixels.

    what is a shape, or the letters of a word with "?" for each that can't be read; color is None where it is none of ours, or where the
    letters of a word differ in it. The place is the centre of a shape's bounding box, and the corner of a word's first cell.
    """

    what: str | None
    color: str | None
    x: float
    y: float

    @property
    def is_word(self) -> bool:
        return self.what is not None and self.what not in SHAPES


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
    found = find_objects(image)
    if task == "image_edit":
        parts = _edit_parts(found, scene)
    elif "word" in scene["objects"][0]:
        parts = _word_parts(found, scene["objects"][0])
    else:
        parts = _scene_parts(found, scene)
    return Verdict(all(value == 1.0 for value in parts.values()), parts)


def _word_parts(found: Sequence[Found], asked: Mapping[str, Any]) -> dict[str, float]:
    text, color = _text(found)
    return {"word": _letters_right(text, asked["word"]), "color": float(color == asked["color"]), "count": float(len(found) == 1)}


def _scene_parts(found: Sequence[Found], scene: Mapping[str, Any]) -> dict[str, float]:
    wanted = [(o["shape"], o["color"]) for o in scene["objects"]]
    seen = [(f.what, f.color) for f in found]
    most = max(len(seen), len(wanted), 1)
    parts = {
        "count": float(len(seen) == len(wanted)),
        "shape": _overlap([what for what, _ in seen], [shape for shape, _ in wanted]) / most,
        "color": _overlap([color for _, color in seen], [color for _, color in wanted]) / most,
        "binding": _overlap(seen, wanted) / most,
    }
    if "relation" in scene:
        first, second = ([f for f in found if (f.what, f.color) == want] for want in wanted)
        alone = len(first) == 1 and len(second) == 1
        parts["relation"] = float(alone and relation_holds(vars(first[0]), vars(second[0]), scene["relation"], RELATED_BY))
    if "position" in scene:
        matches = [f for f in found if (f.what, f.color) == wanted[0]]
        parts["position"] = float(len(matches) == 1 and _near(matches[0], *POSITIONS[scene["position"]], IN_POSITION))
    return parts


def _edit_parts(found: Sequence[Found], scene: Mapping[str, Any]) -> dict[str, float]:
    """kept: share of what should have stayed that is where it was; edited: the change itself; count: nothing more, nothing less."""
    target, edited, like = scene["target"], scene["edited"], scene["like"]
    left, kept = list(found), 0
    stays = [o for i, o in enumerate(target) if i != edited]
    for o in stays:
        match = next((f for f in left if _is(f, o, STAYED)), None)
        if match is not None:
            left.remove(match)
            kept += 1
    done = not left if edited is None else any(_is(f, target[edited], EDITED_WITHIN[like]) for f in left)
    parts = {"kept": kept / len(stays) if stays else 1.0, "edited": float(done), "count": float(len(found) == len(target))}
    if like == "word":
        asked = target[edited]
        written = [f for f in left if f.is_word and _near(f, asked["x"], asked["y"], STAYED)]
        parts["word"] = _letters_right(_text(written)[0], asked["word"])
    return parts


def _is(found: Found, o: Mapping[str, Any], off: float) -> bool:
    return (found.what, found.color) == (o.get("word", o.get("shape")), o["color"]) and _near(found, o["x"], o["y"], off)


def _overlap(seen: Sequence[Any], wanted: Sequence[Any]) -> int:
    return sum((Counter(seen) & Counter(wanted)).values())


def _near(found: Found, x: float, y: float, off: float) -> bool:
    return max(abs(found.x - x), abs(found.y - y)) < off


def _letters_right(read: str | None, asked: str) -> float:
    """1 - character error rate, not below 0."""
    return max(0.0, 1 - _edit_distance(read or "", asked) / len(asked))


def _edit_distance(a: str, b: str) -> int:
    """Fewest letters put in, left out or exchanged (Levenshtein)."""
    row = list(range(len(b) + 1))
    for i, letter in enumerate(a, start=1):
        before, row[0] = row[0], i
        for j, other in enumerate(b, start=1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (letter != other))
    return row[-1]


def read_word(image: np.ndarray) -> tuple[str | None, str | None]:
    """The letters of an image in reading order, a blank between words, and their colour; None for no letter, and for several colours."""
    return _text(find_objects(image))


def _text(found: Sequence[Found]) -> tuple[str | None, str | None]:
    words = sorted((f for f in found if f.is_word), key=lambda f: (f.y, f.x))
    colors = {f.color for f in words}
    return " ".join(str(f.what) for f in words) or None, colors.pop() if len(colors) == 1 else None


def find_objects(image: np.ndarray) -> list[Found]:
    """Every component that stands out from the background, and every run of letters in a row of cells as one word.

    One too small or unlike any shape or colour is found as None. A cell beside a letter that holds neither shape nor letter is a letter
    that can't be read.
    """
    from scipy import ndimage

    pixels = np.asarray(image, np.float32)
    stands_out = np.linalg.norm(pixels - _BACKGROUND, axis=-1) > FOREGROUND
    letters, colors = _read_letters(pixels)
    rest = stands_out & ~(letters != "").repeat(CELL, 0).repeat(CELL, 1)
    labels, _ = ndimage.label(rest)
    found = []
    unread = _by_cell(rest).sum((2, 3)) >= SMALLEST
    for number, (rows, columns) in enumerate(ndimage.find_objects(labels), start=1):
        mask = labels[rows, columns] == number
        area = int(mask.sum())
        if area < SPECK:
            continue
        x, y = (columns.start + columns.stop) / 2, (rows.start + rows.stop) / 2
        if area < SMALLEST:
            found.append(Found(None, None, x, y))
            continue
        shape = _shape_of(mask, ndimage.zoom)
        if shape is not None:
            unread[rows.start // CELL : (rows.stop - 1) // CELL + 1, columns.start // CELL : (columns.stop - 1) // CELL + 1] = False
        found.append(Found(shape, _color_of(pixels[rows, columns], mask, ndimage.binary_erosion), x, y))
    letters[unread] = UNKNOWN
    words = _words(letters, colors)
    written = {(row, column) for w, row, first in words for column in range(first, first + len(w.what or ""))}
    return [w for w, _, _ in words] + [f for f in found if f.what or (int(f.y) // CELL, int(f.x) // CELL) not in written]


def _words(letters: np.ndarray, colors: np.ndarray) -> list[tuple[Found, int, int]]:
    """Runs of letters in the rows of the grid, with row and first column; a run of nothing but unread ones is no word."""
    words = []
    for row in range(CELLS):
        column = 0
        while column < CELLS:
            stop = column
            while stop < CELLS and letters[row, stop]:
                stop += 1
            if set(run := "".join(letters[row, column:stop])) - {UNKNOWN}:
                inks = {color for letter, color in zip(run, colors[row, column:stop], strict=True) if letter != UNKNOWN}
                words.append((Found(run, inks.pop() if len(inks) == 1 else None, CELL * column, CELL * row), row, column))
            column = max(stop, column + 1)
    return words


def _by_cell(pixels: np.ndarray) -> np.ndarray:
    """(SIDE, SIDE, ...) -> (CELLS, CELLS, CELL, CELL, ...)."""
    return pixels.reshape(CELLS, CELL, CELLS, CELL, *pixels.shape[2:]).swapaxes(1, 2)


def _read_letters(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(CELLS, CELLS) letters, "" where a cell holds none, and (CELLS, CELLS) names of their colours, None where it is none of ours.

    A letter's pixels lie between the background and its colour, and how far along says how much of a pixel it covers. What is covered by
    half is compared with the glyphs. The colour is the one in which pixels wholly covered or not at all come nearest to the cell.
    """
    offsets = _by_cell(pixels - _BACKGROUND)
    along = offsets @ (_INKS / _LENGTHS[:, None]).T
    # squared error of the cell as pure ink on the background falls by this much, were it of this colour
    inks = (np.maximum(2 * along - 1, 0).sum((2, 3)) * _LENGTHS).argmax(-1)
    covered = np.take_along_axis(along, inks[:, :, None, None, None], -1)[..., 0] > COVERED
    both = covered.reshape(CELLS, CELLS, -1).astype(np.float32) @ _glyphs()
    overlap = both / np.maximum(covered.sum((2, 3))[:, :, None] + _glyphs().sum(0) - both, 1)
    overlap = overlap.reshape(CELLS, CELLS, len(LETTERS), -1).max(-1)  # at the best shift
    second, first = np.moveaxis(np.sort(overlap, -1)[..., -2:], -1, 0)
    letters = np.where((first > MIN_LETTER) & (first - second > LETTER_MARGIN), np.array(list(LETTERS))[overlap.argmax(-1)], "")
    colors = np.full(letters.shape, None, object)
    for row, column in zip(*np.nonzero(letters), strict=True):
        colors[row, column] = _color_of_letter(offsets[row, column], covered[row, column], inks[row, column])
    return letters, colors


def _color_of_letter(offsets: np.ndarray, covered: np.ndarray, ink: int) -> str | None:
    """A thin stroke has no inside, and its hue is soft from pixel to pixel: purity is that of the quarters of the cell."""
    half = CELL // 2
    quarters = (offsets * covered[..., None]).reshape(2, half, 2, half, 3).sum((1, 3))
    weights = covered.reshape(2, half, 2, half).sum((1, 3))
    pure = weights[_nearest_line(quarters) == ink].sum() / weights.sum() > MIN_PURITY
    close = np.linalg.norm(offsets[covered].mean(0) - _INKS[ink]) < MAX_COLOR_DISTANCE
    return _COLOR_NAMES[ink] if pure and close else None


def _nearest_line(offsets: np.ndarray) -> np.ndarray:
    """Which colour's line from the background each offset (..., 3) lies nearest to."""
    return (offsets @ (_INKS / np.sqrt(_LENGTHS)[:, None]).T).argmax(-1)


@cache
def _glyphs() -> np.ndarray:
    """float32 (CELL * CELL, letters * shifts) masks."""
    shifts = range(-LETTER_SHIFT, LETTER_SHIFT + 1)
    masks = [np.roll(letter_mask(letter), (down, right), (0, 1)) for letter in LETTERS for down in shifts for right in shifts]
    return np.stack(masks).reshape(len(masks), -1).T.astype(np.float32)


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
