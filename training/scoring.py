"""A model's images for evaluation samples, counted by the verifier."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from data.drawn import held_out
from data.loader import Sample
from data.verifier import verify
from model.deepgen import DeepGen
from model.generate import generate
from model.vae import to_uint8
from runtime.keys import seed_from
from training.batching import one_size_batches, reference_pixels


@dataclass(frozen=True)
class Scored:
    """One evaluation sample, the image made for it (uint8 H, W, 3), and what the verifier says."""

    sample: Sample
    image: np.ndarray
    strict: bool
    parts: dict[str, float]


Draw = Callable[[Sequence[Sample]], np.ndarray]  # samples of one size -> uint8 (N, H, W, 3)


def score(
    model: DeepGen,
    samples: Iterable[Sample],
    steps: int,
    guidance: float,
    batch_size: int,
    seed: int,
    on_batch: Callable[[int], None] | None = None,
) -> list[Scored]:
    """Make an image for every sample (one seed each, from its key) and verify it. Samples of a part share the task."""
    model.eval()

    def draw(batch: Sequence[Sample]) -> np.ndarray:
        pixels = generate(
            model,
            [sample.prompt for sample in batch],
            image_seeds(batch, seed),
            batch[0].target.shape[:2],
            reference_pixels(batch, model.device),
            steps,
            guidance,
        )
        return to_uint8(pixels).cpu().numpy()

    return score_with(draw, samples, batch_size, on_batch)


def score_with(draw: Draw, samples: Iterable[Sample], batch_size: int, on_batch: Callable[[int], None] | None = None) -> list[Scored]:
    """Verify what `draw` makes of the samples."""
    scored: list[Scored] = []
    for batch in one_size_batches(list(samples), batch_size):
        for sample, image in zip(batch, draw(batch), strict=True):
            verdict = verify(sample.scene, image, sample.task)
            scored.append(Scored(sample, image, verdict.strict, verdict.parts))
        if on_batch is not None:
            on_batch(len(batch))
    return scored


def image_seeds(samples: Sequence[Sample], seed: int) -> list[int]:
    """What each sample's noise is drawn from: the same for every model."""
    return [seed_from("evaluation", seed, sample.key) for sample in samples]


def facts(scored: Scored) -> dict[str, Any]:
    """What stays of a scored sample without its pictures: stages are compared on it, sample by sample."""
    sample = scored.sample
    return {
        "key": sample.key,
        "kind": sample.kind,
        "prompt": sample.prompt,
        "held_out": held_out(sample.scene),
        "strict": bool(scored.strict),
        "parts": {name: float(value) for name, value in scored.parts.items()},
    }


def summarize(scored: Sequence[Scored]) -> dict[str, Any]:
    """Strict accuracy with its 95% interval, by kind, and the mean of each part that applies."""
    kinds: dict[str, list[bool]] = defaultdict(list)
    parts: dict[str, list[float]] = defaultdict(list)
    for row in scored:
        kinds[row.sample.kind].append(row.strict)
        for name, value in row.parts.items():
            parts[name].append(value)
    return share([row.strict for row in scored]) | {
        "kinds": {kind: share(rows) for kind, rows in sorted(kinds.items())},
        "parts": {name: round(sum(values) / len(values), 4) for name, values in sorted(parts.items())},
    }


def share(strict: Sequence[bool]) -> dict[str, Any]:
    """Of how many which share is strictly right, with its 95% interval."""
    right = sum(strict)
    low, high = wilson_interval(right, len(strict))
    return {"n": len(strict), "strict": round(right / len(strict), 4), "interval_95": [round(low, 4), round(high, 4)]}


def wilson_interval(right: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """95% score interval of a proportion."""
    share = right / n
    centre = share + z * z / (2 * n)
    spread = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    # rounding would leave the ends of none and of all a trifle outside
    return max(0.0, (centre - spread) / (1 + z * z / n)), min(1.0, (centre + spread) / (1 + z * z / n))
