"""What the shards are drawn or read from: observed, never made. A part's version is a digest of its settings and of what they pin."""

from pathlib import Path
from typing import Any

import dagster as dg
import yaml

from runtime.files import sha256_json
from runtime.params import parse_params
from runtime.recipe import look_up

SOURCES = "sources"
CATALOGUE = Path("data/catalog.yaml")


def sources_asset(root: Path, parts: list[str]) -> dg.SourceAsset:
    """One partition a part, as of the shards, so that a part that reads something new shows as new data, and no other does."""

    @dg.observable_source_asset(
        name=SOURCES,
        group_name=SOURCES,
        partitions_def=dg.StaticPartitionsDefinition(parts),
        description="What each data part is read from: its settings in params.yaml, the digest or revision that they pin.",
    )
    def sources() -> dg.DataVersionsByPartition:
        return dg.DataVersionsByPartition(source_versions(root))

    return sources


def source_versions(root: Path) -> dict[str, str]:
    """Part -> digest of its settings (among them `content`, the pinned digest of its files) and of the catalogue's entry that it names."""
    sets = yaml.safe_load((root / CATALOGUE).read_text())["data_sets"] if (root / CATALOGUE).is_file() else {}
    parts: dict[str, Any] = look_up(parse_params((root / "params.yaml").read_text()), "data.parts")
    return {name: sha256_json([settings, sets.get(settings.get("data_set"))])[:16] for name, settings in parts.items()}
