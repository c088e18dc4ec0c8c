"""Small real parts, built once: sizes are prime, so that no shard, batch or rank divides them by luck."""

from pathlib import Path
from typing import Any

import pytest

from data.config import MixtureConfig, PartConfig
from data.mixture import resolve_mixture
from data.shards import build_part

SHARD_SAMPLES = 5
PARTS = {
    "captions": PartConfig(source="drawn", task="text_to_image", split="train", samples=23, seed=1, licence="CC0-1.0"),
    "relations": PartConfig(
        source="drawn", task="text_to_image", split="train", samples=7, seed=2, licence="CC0-1.0", kinds={"relation": 1}
    ),
    "words": PartConfig(source="drawn", task="text_to_image", split="train", samples=3, seed=3, licence="CC0-1.0", kinds={"word": 1}),
    "edits": PartConfig(source="drawn", task="image_edit", split="train", samples=13, seed=4, licence="CC0-1.0"),
}
MIXTURE = MixtureConfig(
    seed=11,
    ratio={"image_edit": 1, "text_to_image": 3},
    parts={"captions": 2.0, "relations": 1.0, "words": 0.5, "edits": 1.0},
)


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of published parts. Tests that change one make a copy."""
    folder = tmp_path_factory.mktemp("shards")
    for name, config in PARTS.items():
        build_part(name, config, SHARD_SAMPLES, folder / name)
    return folder


@pytest.fixture(scope="session")
def mixture(shards: Path) -> dict[str, Any]:
    return resolve_mixture("sft", MIXTURE, shards)
