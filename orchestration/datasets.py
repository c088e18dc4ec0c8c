"""Shards as the layers above see them: their manifests, and whether the files are the ones that the manifests name."""

from pathlib import Path
from typing import Any

from runtime.files import read_json, sha256_file, sha256_json
from runtime.params import Params


class ShardsDiffer(Exception):
    """A shard is missing or is not the file that its manifest names."""


def shards_folder(root: Path, part: str) -> Path:
    return root / "outputs" / "shards" / part


def read_manifest(root: Path, part: str) -> dict[str, Any]:
    """The manifest of one part.

    Raises:
        ShardsDiffer: it is not there.
    """
    path = shards_folder(root, part) / "manifest.json"
    if not path.is_file():
        raise ShardsDiffer(f"{path.relative_to(root)} is missing: build the part with `dvc repro shards@{part}` or `deepgen run`.")
    return read_json(path)


def verify_part(root: Path, part: str) -> dict[str, Any]:
    """The manifest of a part whose every shard is present and of the recorded sha256.

    Raises:
        ShardsDiffer: naming the first shard that is not.
    """
    manifest = read_manifest(root, part)
    rebuild = f"Rebuild: rm -r outputs/shards/{part} && dvc repro shards@{part}"
    for name, expected in [*manifest["files"].items(), *((shard["name"], shard["sha256"]) for shard in manifest["shards"])]:
        path = shards_folder(root, part) / name
        if not path.is_file():
            raise ShardsDiffer(f"{path.relative_to(root)} is missing. {rebuild}")
        if (found := sha256_file(path)) != expected:
            raise ShardsDiffer(f"{path.relative_to(root)} has sha256 {found[:12]}, its manifest says {expected[:12]}. {rebuild}")
    return manifest


def dataset_ids(root: Path, params: Params) -> dict[str, str]:
    """Part -> dataset id, for every part that has a manifest."""
    parts = [part for part in params.data.parts if (shards_folder(root, part) / "manifest.json").is_file()]
    return {part: read_manifest(root, part)["dataset_id"] for part in parts}


def evaluation_set_digest(root: Path, params: Params) -> str:
    """Digest of the evaluation set as it lies on disk, each shard checked by sha256."""
    return sha256_json({part: verify_part(root, part)["dataset_id"] for part in params.evaluation.parts})
