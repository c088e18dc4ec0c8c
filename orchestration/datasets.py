"""Shards as the layers above see them: their manifests, and whether the files are the ones that the manifests name."""

from pathlib import Path
from typing import Any

from runtime.files import read_json, sha256_file, sha256_json
from runtime.params import Params
from runtime.store import Store, StoreError, shard_store, tar_name


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


def verify_part(root: Path, part: str, whole: bool = True) -> dict[str, Any]:
    """The manifest of a part whose every shard is present and of the recorded sha256.

    Args:
        whole: fetch the tars of a store and hash them, as those on this machine are; without it, see that they are there with their sizes.

    Raises:
        ShardsDiffer: naming the first shard that is not, or the store that can't be read.
    """
    manifest = read_manifest(root, part)
    rebuild = f"Rebuild: rm -r outputs/shards/{part} && dvc repro shards@{part}"
    for name, expected in manifest["files"].items():
        _check_file(root, shards_folder(root, part) / name, expected, rebuild)
    try:
        store = shard_store(manifest)
        for shard in manifest["shards"]:
            if store is None:
                _check_file(root, shards_folder(root, part) / shard["name"], shard["sha256"], rebuild)
            else:
                _check_stored(store, shard, whole, rebuild)
    except StoreError as error:
        raise ShardsDiffer(f"{part}: its shards can't be looked at. {error}") from error
    return manifest


def _check_file(root: Path, path: Path, expected: str, rebuild: str) -> None:
    if not path.is_file():
        raise ShardsDiffer(f"{path.relative_to(root)} is missing. {rebuild}")
    if (found := sha256_file(path)) != expected:
        raise ShardsDiffer(f"{path.relative_to(root)} has sha256 {found[:12]}, its manifest says {expected[:12]}. {rebuild}")


def _check_stored(store: Store, shard: dict[str, Any], whole: bool, rebuild: str) -> None:
    name = tar_name(shard)
    if (size := store.size(name)) != shard["bytes"]:
        found = "is missing" if size is None else f"has {size} bytes, its manifest says {shard['bytes']}"
        raise ShardsDiffer(f"{store.url(name)} {found}. {rebuild}")
    if whole and (found := store.sha256(name)) != shard["sha256"]:
        raise ShardsDiffer(
            f"{store.url(name)} has sha256 {found[:12]}, its manifest says {shard['sha256'][:12]}. Remove it there. {rebuild}"
        )


def dataset_ids(root: Path, params: Params) -> dict[str, str]:
    """Part -> dataset id, for every part that has a manifest."""
    parts = [part for part in params.data.parts if (shards_folder(root, part) / "manifest.json").is_file()]
    return {part: read_manifest(root, part)["dataset_id"] for part in parts}


def evaluation_set_digest(root: Path, params: Params) -> str:
    """Digest of the evaluation set as it lies on disk, each shard checked by sha256."""
    return sha256_json({part: verify_part(root, part)["dataset_id"] for part in params.evaluation.parts})
