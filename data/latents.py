"""Latents of a part, so that training need not run the frozen autoencoder: tars with the rows and keys of the part's own.

`{key}.tgt.npy` is (2, C, h, w), the posterior's mean and standard deviation; `{key}.src.0.npy` and so on are (C, h, w), the mean alone:
a target is sampled anew each time that it is read, a reference never. All are as the autoencoder gives them, neither shifted nor scaled.
Where they were asked for, `{key}.src.0.vit.npy` and so on are (tokens, V), what the VLM's vision tower makes of a reference.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from data.shards import split_members
from runtime.published import ShardMismatch

FORMAT = 1


@dataclass(frozen=True)
class Latents:
    """Of one sample, mean and std (C, h, w), references k arrays (C, h, w), vision k arrays (tokens, V) or none; of a batch, each with B in
    front. float16 or float32."""

    mean: np.ndarray
    std: np.ndarray
    references: tuple[np.ndarray, ...]
    vision: tuple[np.ndarray, ...] = ()

    @property
    def arrays(self) -> tuple[np.ndarray, ...]:
        return self.mean, self.std, *self.references


def latent_members(key: str, latents: Latents) -> list[tuple[str, bytes]]:
    """The tar members of a sample."""
    arrays = {"tgt": np.stack([latents.mean, latents.std])} | {f"src.{i}": mean for i, mean in enumerate(latents.references)}
    arrays |= {f"src.{i}.vit": tokens for i, tokens in enumerate(latents.vision)}
    return [(f"{key}.{role}.npy", _npy(array)) for role, array in arrays.items()]


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def parse_latents(content: bytes, name: str, key: str) -> Latents:
    """The tar members of one sample -> its latents.

    Raises:
        ShardMismatch: naming `name`, where the bytes are another sample's, or no sample's.
    """
    arrays = {member: np.load(io.BytesIO(array), allow_pickle=False) for member, array in split_members(content, name).items()}
    seen = sum(member.endswith(".vit.npy") for member in arrays)  # none, or one a reference
    count = seen or len(arrays) - 1
    wanted = [f"{key}.{role}.npy" for role in ("tgt", *(f"src.{i}" for i in range(count)), *(f"src.{i}.vit" for i in range(seen)))]
    if list(arrays) != wanted:
        raise ShardMismatch(f"{name}: holds {list(arrays)}, expected {wanted}. Make it again with `dvc repro -f latents`.")
    target, *references = arrays.values()
    return Latents(target[0], target[1], tuple(references[:count]), tuple(references[count:]))


def stack_latents(samples: Sequence[Latents]) -> Latents:
    """A batch of samples of one size."""
    references, vision = (
        tuple(np.stack(column) for column in zip(*rows, strict=True))
        for rows in ([sample.references for sample in samples], [sample.vision for sample in samples])
    )
    return Latents(np.stack([sample.mean for sample in samples]), np.stack([sample.std for sample in samples]), references, vision)


def check_latents(sample: dict[str, Any]) -> None:
    """Raises ValueError unless every array of a sample, as webdataset reads it, is finite."""
    for name, content in sample.items():
        if name.endswith(".npy") and not np.isfinite(np.load(io.BytesIO(content), allow_pickle=False)).all():
            raise ValueError(
                f"{sample['__url__']}: sample {sample['__key__']} has {name} beyond its precision, or no number; "
                "set latents.precision to float32, or look at the autoencoder."
            )
