"""What rewards are asked, and what they answer. A missing score is masked, never zero."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Group:
    """The images that were made for one prompt.

    name: the same in a resumed run and on whatever rank; requests are named by it. images: G of them, uint8 (H, W, 3). scene: the drawn
    world's description, empty elsewhere. references: what an edit starts from, uint8 (H, W, 3). part: of data.parts, whose prompt it is.
    """

    name: str
    task: str
    prompt: str
    images: tuple[np.ndarray, ...]
    scene: dict[str, Any]
    references: tuple[np.ndarray, ...] = ()
    part: str = ""


@dataclass(frozen=True)
class Scores:
    """values (N, K) and valid (N, K): row i image i, column k the reward `names[k]`.

    applies (N, K) is False where a reward has no meaning for a prompt (no relation in "a red circle"); such a value is not missing.
    """

    names: tuple[str, ...]
    values: Tensor
    valid: Tensor
    applies: Tensor

    @classmethod
    def unasked(cls, names: Sequence[str], count: int) -> "Scores":
        """Of `count` images to none of which these rewards apply."""
        never = torch.zeros(count, len(names), dtype=torch.bool)
        return cls(tuple(names), torch.zeros(count, len(names)), never, never.clone())

    @classmethod
    def missing(cls, names: Sequence[str], count: int) -> "Scores":
        """Of `count` images to which these rewards apply, and that nobody scored."""
        unasked = cls.unasked(names, count)
        return cls(unasked.names, unasked.values, unasked.valid, torch.ones_like(unasked.applies))

    @property
    def coverage(self) -> float:
        """Share of the values that apply which are valid."""
        asked = int(self.applies.sum())
        return float((self.valid & self.applies).sum()) / asked if asked else 1.0


def beside(scores: Sequence[Scores]) -> Scores:
    """Columns of several rewards for the same images."""
    names = tuple(name for part in scores for name in part.names)
    return Scores(names, *(torch.cat([getattr(part, field) for part in scores], 1) for field in ("values", "valid", "applies")))


def below(scores: Sequence[Scores]) -> Scores:
    """Rows of several groups, scored by the same rewards."""
    return Scores(scores[0].names, *(torch.cat([getattr(part, field) for part in scores]) for field in ("values", "valid", "applies")))


class Reward(Protocol):
    """Scores a group of G images: (G, K), K = len(names). May be called by several threads at a time.

    It raises only where the run can't go on, as when a judge is not the one that the run began with; what it can't score it says to be
    missing.
    """

    names: tuple[str, ...]

    def __call__(self, group: Group) -> Scores: ...

    def facts(self) -> dict[str, float]:
        """Numbers about the work since they were last asked for (latency, retries, ties, ...), to be logged; empty where there are none."""
        ...
