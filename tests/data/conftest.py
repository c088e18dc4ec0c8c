"""Small real parts, built once: sizes are prime, so that no shard, batch or rank divides them by luck."""

from pathlib import Path
from typing import Any

import pytest

from data.build import build_part
from data.config import DataConfig, ImageRules, MixtureConfig, PartConfig
from data.mixture import resolve_mixture

PARTS = {
    "captions": PartConfig(source="drawn", task="text_to_image", split="train", samples=23, seed=1, licence="CC0-1.0"),
    "relations": PartConfig(
        source="drawn", task="text_to_image", split="train", samples=7, seed=2, licence="CC0-1.0", kinds={"relation": 1}
    ),
    "words": PartConfig(source="drawn", task="text_to_image", split="train", samples=3, seed=3, licence="CC0-1.0", kinds={"word": 1}),
    "edits": PartConfig(source="drawn", task="image_edit", split="train", samples=13, seed=4, licence="CC0-1.0"),
}
DATA = DataConfig(image_size=64, shard_samples=5, images=ImageRules(min_side=32), parts=PARTS)
MIXTURE = MixtureConfig(
    seed=11,
    ratio={"image_edit": 1, "text_to_image": 3},
    parts={"captions": 2.0, "relations": 1.0, "words": 0.5, "edits": 1.0},
)


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of published parts. Tests that change one make a copy."""
    folder = tmp_path_factory.mktemp("shards")
    for name in PARTS:
        build_part(name, DATA, folder / name, folder)
        sweep_chunks(folder / name)
    return folder


def sweep_chunks(folder: Path) -> None:
    """Leave what is published, as the stage command does."""
    for file in [*folder.glob("chunk-*"), *folder.glob("shard-*.json")]:
        file.unlink()


@pytest.fixture(scope="session")
def mixture(shards: Path) -> dict[str, Any]:
    return resolve_mixture("sft", MIXTURE, shards)
