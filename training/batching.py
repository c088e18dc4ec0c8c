"""Small helpers between data and model: groups of samples, images as pixels."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby, islice
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from model.vae import to_pixels

T = TypeVar("T")


def batched(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """Runs of `size` items; the last may be shorter."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


def one_size_batches(samples: Iterable[Any], size: int) -> Iterator[Sequence[Any]]:
    """Up to `size` samples that can be stacked: neighbours of the same shapes. Parts lie sorted by them."""
    for _, run in groupby(samples, lambda sample: [image.shape for image in (sample.target, *sample.references)]):
        while batch := list(islice(run, size)):
            yield batch


def stack_pixels(images: Sequence[np.ndarray], device: torch.device | str = "cpu") -> Tensor:
    """uint8 (H, W, 3) images of one size -> (B, 3, H, W) in [-1, 1]."""
    return to_pixels(torch.from_numpy(np.stack(images)).to(device))


def reference_pixels(samples: Sequence[Any], device: torch.device | str = "cpu") -> tuple[Tensor, ...]:
    """The k references of samples that have as many each: k tensors (B, 3, H, W) in [-1, 1]; empty where they have none."""
    return tuple(stack_pixels(images, device) for images in zip(*(sample.references for sample in samples), strict=True))
