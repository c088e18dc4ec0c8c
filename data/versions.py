"""Two versions of a part side by side."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.rows import read_table
from runtime.files import read_json


@dataclass(frozen=True)
class Difference:
    """What version b has that a has not, by source id; changed: there in both with other content. counts: ending or reason -> (a, b)."""

    added: list[str]
    removed: list[str]
    changed: list[str]
    counts: dict[str, tuple[int, int]]
    same: bool


def compare(a: Path, b: Path) -> Difference:
    """The difference between two published parts."""
    manifests = [read_json(folder / "manifest.json") for folder in (a, b)]
    left, right = (_keys(folder) for folder in (a, b))
    totals: list[dict[str, Any]] = [manifest["counts"] | manifest["reasons"] for manifest in manifests]
    return Difference(
        added=sorted(right.keys() - left.keys()),
        removed=sorted(left.keys() - right.keys()),
        changed=sorted(name for name in left.keys() & right.keys() if left[name] != right[name]),
        counts={name: (totals[0].get(name, 0), totals[1].get(name, 0)) for name in {**totals[0], **totals[1]}},
        same=manifests[0]["dataset_id"] == manifests[1]["dataset_id"],
    )


def _keys(folder: Path) -> dict[str, tuple[str, ...]]:
    """Source id -> key and what its images hold as stored, so that other settings show as well as other sources."""
    rows = read_table(folder / "rows.parquet", ["source_id", "key", "images"]).to_pylist()
    return {row["source_id"]: (row["key"], *(image["sha256"] for image in row["images"])) for row in rows}
