"""Decontamination: whether a training record is an item of an evaluation set, by its prompt or by its images.

What follows from a hit is the caller's choice: "a red circle" may well recur, a page of instructions may not.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from data.prompts import read_prompts
from runtime.files import sha256_json

# Near matches share half of their runs of 8 words, which holds until about every sixteenth word is changed. GPT-3's rule, one run of 13 in
# common, suits pages of text; prompts open alike, and the whole is what makes an item. Of 1,450 prompts of training files and unrelated
# benchmarks 47 share some run of 8 words with one of 6,900 evaluation prompts, none shares half of them.
GRAM = 8
NEAR_WORDS = 20  # shorter prompts are only matched whole: their few runs are phrases that recur by themselves
NEAR_SHARE = 0.5
NEAR_BITS = 2  # of 64: recompressing and shrinking a picture moves its perceptual hash by up to 2, unrelated pictures differ in 22 or more
BANDS = tuple(combinations(range(4), 2))  # two bits touch at most two of four 16-bit bands, so two others stay equal

_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^ \u3040-\u30ff\u3400-\u9fff]+")  # Chinese and Japanese put no spaces: a character each


class _Folded(dict[int, str]):
    """Code point -> what it folds to, filled as characters are met: translate() is five times faster than normalize() on Chinese."""

    def __missing__(self, code: int) -> str:
        plain = unicodedata.normalize("NFKC", chr(code)).casefold()
        kinds = {unicodedata.category(character) for character in plain}
        if all(kind[0] in "LMN" for kind in kinds):
            self[code] = plain
        else:
            self[code] = "" if kinds == {"Cf"} else " "  # zero-width marks part no words; punctuation, symbols and white space do
        return self[code]


_FOLDED = _Folded()


def fold(prompt: str) -> str:
    """The prompt as its copies agree: NFKC, casefold, each run of punctuation and white space one space.

    Files are copied with line ends flattened, typographic quotes and full-width commas made plain, a full stop added or lost; none of these
    makes another prompt. Letters and digits are kept as they are: "two cats" and "three cats" are two items.
    """
    return " ".join(unicodedata.normalize("NFC", prompt).translate(_FOLDED).split())


def grams(folded: str) -> set[int]:
    """Hashes, of this process only, of the runs of GRAM words in a folded prompt."""
    words = _WORD.findall(folded)
    return {hash(tuple(words[i : i + GRAM])) for i in range(len(words) - GRAM + 1)}


@dataclass(frozen=True)
class ImageHashes:
    """An image as others are compared with it: hash of its upright pixels, and its 64-bit perceptual hash."""

    pixels: str
    perceptual: int


class EvaluationIndex:
    """Every prompt and image of the evaluation sets, looked up in constant time a record."""

    def __init__(self, prompts: Mapping[str, Iterable[str]], images: Mapping[str, Iterable[ImageHashes]] | None = None) -> None:
        """prompts and images: by evaluation set, in the order of its items; in what `leak` says, they are counted from 0."""
        self._exact: dict[str, str] = {}
        self._near: dict[int, list[str]] = {}
        self._size: dict[str, int] = {}  # number of grams of an item
        self._pixels: dict[str, str] = {}
        self._bands: dict[tuple[int, int], list[tuple[int, str]]] = {}
        self.prompts: dict[str, int] = {}  # how many each set has
        for name, texts in prompts.items():
            for i, text in enumerate(texts):
                self._add_prompt(fold(text), f"{name}[{i}]")
                self.prompts[name] = i + 1
        for name, hashes in (images or {}).items():
            for i, image in enumerate(hashes):
                self._pixels.setdefault(image.pixels, f"{name}[{i}]")
                for key in _band_keys(image.perceptual):
                    self._bands.setdefault(key, []).append((image.perceptual, f"{name}[{i}]"))
        bands = sorted((key, sorted(found)) for key, found in self._bands.items())
        # Changes with any prompt, image or name: what a build was filtered with.
        self.digest = sha256_json([sorted(self._exact.items()), sorted(self._pixels.items()), bands])

    def _add_prompt(self, folded: str, item: str) -> None:
        if not folded or folded in self._exact:
            return
        self._exact[folded] = item
        if len(_WORD.findall(folded)) >= NEAR_WORDS:
            found = grams(folded)
            self._size[item] = len(found)
            for gram in found:
                self._near.setdefault(gram, []).append(item)

    def leak(self, prompt: str, images: Iterable[ImageHashes] = ()) -> str | None:
        """Which evaluation item a record is, and by what it was told; None for one that is none.

        images: of the record's target and references.
        """
        folded = fold(prompt)
        if item := self._exact.get(folded):
            return f"{item}: the same prompt"
        for image in images:
            if found := self._image_leak(image):
                return found
        return self._near_leak(folded)

    def _near_leak(self, folded: str) -> str | None:
        """Grams in common, as a share of the shorter prompt's: a prompt that was cut off or continued is still the same item."""
        if folded.count(" ") < NEAR_WORDS - 1 and folded.isascii():
            return None
        mine = grams(folded)
        if len(mine) <= NEAR_WORDS - GRAM:
            return None
        common = Counter(item for gram in mine for item in self._near.get(gram, ()))
        shares = ((count / min(len(mine), self._size[item]), item) for item, count in common.items())
        share, item = max(shares, default=(0.0, ""))
        return f"{item}: {share:.0%} of the prompt's runs of {GRAM} words" if share >= NEAR_SHARE else None

    def _image_leak(self, image: ImageHashes) -> str | None:
        if item := self._pixels.get(image.pixels):
            return f"{item}: the same pixels"
        for key in _band_keys(image.perceptual):
            for other, item in self._bands.get(key, ()):
                if (bits := (other ^ image.perceptual).bit_count()) <= NEAR_BITS:
                    return f"{item}: a picture that differs in {bits} of 64 bits"
        return None


def _band_keys(perceptual: int) -> list[tuple[int, int]]:
    """For each pair of 16-bit bands, their 32 bits: two hashes within two bits of each other share one of the six."""
    band = [perceptual >> shift & 0xFFFF for shift in (0, 16, 32, 48)]
    return [(pair, band[a] << 16 | band[b]) for pair, (a, b) in enumerate(BANDS)]


def read_index(prompt_files: Mapping[str, Path], images: Mapping[str, Iterable[ImageHashes]] | None = None) -> EvaluationIndex:
    """The index of prompt files, by the name of their evaluation set."""
    return EvaluationIndex({name: read_prompts(path) for name, path in prompt_files.items()}, images)


def print_leaks(prompts: Mapping[str, Sequence[str]], against: Sequence[Path], examples: int = 3) -> None:
    """For each set of training prompts and each evaluation prompt file how many of the set are in the file, and the first of them.

    Raises:
        FileNotFoundError, UnknownLayout: a file is not there, or can't be read.
    """
    for path in against:
        index = read_index({path.name: path})
        for name, some in prompts.items():
            hits = [(i, found) for i, prompt in enumerate(some) if (found := index.leak(prompt))]
            print(f"{name}: {len(hits):,} of {len(some):,} prompts are in {path}")
            for i, found in hits[:examples]:
                print(f"  {name}[{i}] is {found}")
