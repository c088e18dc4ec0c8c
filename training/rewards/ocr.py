"""Whether an image shows the words that its prompt quotes: an OCR whose models come inside its package (rapidocr on onnxruntime)."""

import logging
import re
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from runtime.exits import Plain
from training.rewards.scores import Group, Scores

QUOTED = re.compile(r'"([^"]*)"|“([^”]+)”|„([^“”]+)[“”]|«([^»]+)»|「([^」]+)」')
WORD = re.compile(r"\w+")
logger = logging.getLogger(__name__)
Read = Callable[[np.ndarray], Sequence[str]]  # uint8 (H, W, 3) -> lines, from above


class NoOCR(Plain):
    """A reward reads text, and the package that does is not installed."""


class OCR:
    """`ocr`: 1 less the edit distance over the length, of the best match of each quoted string, weighted by their lengths; upper and lower
    case and white space are one. `ocr_words`: share of the quoted words that are among the words read, each as often as it is quoted.

    They apply to text-to-image prompts that quote something. An image that the engine fails on is missing.

    Args:
        names: which of the two.
        read: by default rapidocr's; one image at a time.

    Raises:
        NoOCR: naming what to install.
    """

    def __init__(self, names: Sequence[str], read: Read | None = None) -> None:
        self.names = tuple(names)
        self.read, self.lock = read or rapidocr(), threading.Lock()
        self.failed = self.seen = 0

    def __call__(self, group: Group) -> Scores:
        wanted = quoted(group.prompt)
        if group.task != "text_to_image" or not wanted:
            return Scores.unasked(self.names, len(group.images))
        scores = Scores.missing(self.names, len(group.images))
        for i, image in enumerate(group.images):
            with self.lock:
                self.seen += 1
                try:
                    lines = self.read(image)
                except Exception as error:  # whatever an image does to the engine
                    self.failed += 1
                    logger.warning("OCR failed on an image of %s: %s", group.name, error)
                    continue
            values = {"ocr": similarity(wanted, lines), "ocr_words": word_accuracy(wanted, lines)}
            for k, name in enumerate(self.names):
                scores.values[i, k], scores.valid[i, k] = values[name], True
        return scores

    def facts(self) -> dict[str, float]:
        with self.lock:
            row = {"ocr/images": float(self.seen), "ocr/failed": float(self.failed)}
            self.failed = self.seen = 0
        return row


def rapidocr() -> Read:
    """Its engine, quiet, on the models of its package.

    Raises:
        NoOCR: it is not installed.
    """
    try:
        import onnxruntime  # noqa: F401  # rapidocr asks for it at the first image, where a failure means a missing score
        from rapidocr import RapidOCR
    except ImportError as error:
        raise NoOCR('The rewards ocr and ocr_words need rapidocr and onnxruntime: pip install -c constraints.txt ".[ocr]".') from error
    engine: Any = RapidOCR(params={"Global.log_level": "error"})

    def read(image: np.ndarray) -> Sequence[str]:
        return engine(np.ascontiguousarray(image[..., ::-1])).txts or ()  # it takes BGR

    return read


def quoted(prompt: str) -> tuple[str, ...]:
    """What stands in double quotes, straight or typographic, in the prompt's order."""
    return tuple(text for match in QUOTED.finditer(prompt) if (text := "".join(filter(None, match.groups())).strip()))


def fold(text: str) -> str:
    return "".join(text.casefold().split())


def similarity(wanted: Sequence[str], lines: Sequence[str]) -> float:
    """In [0, 1]. A string may be broken into lines: runs of neighbouring lines are looked at as well."""
    read = [fold(line) for line in lines]
    folded = [text for text in map(fold, wanted) if text]
    return sum(len(text) * nearness(text, read) for text in folded) / sum(map(len, folded))


def nearness(text: str, lines: Sequence[str]) -> float:
    """1 less the edit distance over the longer one's length, of the run of neighbouring lines that is nearest; 0 of no lines.

    A picture may hold dozens of lines that mean nothing, so that a run's distances go on from those of the run without its last line.
    """
    best = 0.0
    for first in range(len(lines)):
        row, length = np.arange(len(text) + 1), 0
        for line in lines[first:]:
            if length and len(text) / length <= best:
                break  # of a longer run no more than that share can be right
            row, length = extend(row, text, line), length + len(line)
            best = max(best, 1 - int(row[-1]) / max(len(text), length))
    return best


def word_accuracy(wanted: Sequence[str], lines: Sequence[str]) -> float:
    left = WORD.findall(" ".join(lines).casefold())
    words = WORD.findall(" ".join(wanted).casefold())
    right = 0
    for word in words:
        if word in left:
            left.remove(word)
            right += 1
    return right / len(words) if words else similarity(wanted, lines)


def extend(row: np.ndarray, text: str, more: str) -> np.ndarray:
    """Levenshtein's distances (len(text) + 1,) between what was read and text[:j], once `more` was read as well; `row` is those before,
    of nothing read 0, 1, 2, ..."""
    letters, places = np.array([ord(letter) for letter in text]), np.arange(len(text) + 1)
    for letter in more:
        moved = row + 1
        np.minimum(moved[1:], row[:-1] + (letters != ord(letter)), out=moved[1:])
        row = np.minimum.accumulate(moved - places) + places
    return row
