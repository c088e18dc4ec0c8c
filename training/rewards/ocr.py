"""Whether an image shows the words that its prompt quotes: an OCR whose models come inside its package (rapidocr on onnxruntime)."""

import logging
import re
import threading
from collections.abc import Callable, Sequence
from itertools import accumulate
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
    runs = ["", *(run for first in range(len(read)) for run in accumulate(read[first:]))]
    folded = [text for text in map(fold, wanted) if text]
    total = sum(map(len, folded))
    return sum(len(text) * max(1 - distance(text, run) / max(len(text), len(run)) for run in runs) for text in folded) / total


def word_accuracy(wanted: Sequence[str], lines: Sequence[str]) -> float:
    left = WORD.findall(" ".join(lines).casefold())
    words = WORD.findall(" ".join(wanted).casefold())
    right = 0
    for word in words:
        if word in left:
            left.remove(word)
            right += 1
    return right / len(words) if words else similarity(wanted, lines)


def distance(one: str, other: str) -> int:
    """Levenshtein's: insertions, deletions and substitutions."""
    row = list(range(len(other) + 1))
    for i, a in enumerate(one, 1):
        before, row[0] = row[0], i
        for j, b in enumerate(other, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (a != b))
    return row[-1]
