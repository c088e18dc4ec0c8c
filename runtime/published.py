"""A published part as every storey sees it: its manifest, and whether the files are the ones that the manifest names."""

from pathlib import Path
from typing import Any, cast

from runtime.exits import Plain
from runtime.files import read_json, sha256_file
from runtime.store import Store, shard_store, tar_name


class ShardMismatch(Plain):
    """A tar is missing, or not the one that its manifest names."""


def read_manifest(folder: Path, stage: str | None = None) -> dict[str, Any]:
    """Raises ShardMismatch, naming the stage that makes it (by default the part's own), where there is none."""
    if not (folder / "manifest.json").is_file():
        raise ShardMismatch(f"{folder}: no manifest.json. Build it with `dvc repro {stage or f'shards@{folder.name}'}` or `deepgen run`.")
    return cast(dict[str, Any], read_json(folder / "manifest.json"))


def verify_part(folder: Path, whole: bool = True) -> dict[str, Any]:
    """The manifest of a published part, after checking index, tables and every tar against it.

    Args:
        whole: fetch the tars of a store and hash them, as those on this machine are; without it, see that they are there with their sizes.

    Raises:
        ShardMismatch: naming the file, and the command that rebuilds it.
        StoreError: the store can't be read.
    """
    manifest = read_manifest(folder)
    for name, expected in manifest["files"].items():
        check_file(folder / name, expected)
    store = shard_store(manifest)
    if store is not None:
        check_stored(store, manifest, whole)
    else:
        for shard in manifest["shards"]:
            check_file(folder / shard["name"], shard["sha256"])
    return manifest


def check_stored(store: Store, manifest: dict[str, Any], whole: bool) -> None:
    """Raises ShardMismatch unless every tar of a part is in its store, of its size and, if `whole`, of its sha256."""
    rebuild = f"`dvc repro -f shards@{manifest['part']}`"
    for shard in manifest["shards"]:
        url, size = store.url(tar_name(shard)), store.size(tar_name(shard))
        if size != shard["bytes"]:
            found = "missing" if size is None else f"{size} bytes"
            raise ShardMismatch(f"{url}: {found}, the manifest says {shard['bytes']} bytes. Rebuild it with {rebuild}.")
        if whole and store.sha256(tar_name(shard)) != shard["sha256"]:
            raise ShardMismatch(
                f"{url} has not the sha256 {shard['sha256'][:12]}... that its manifest names. Remove it from the store, then "
                f"rebuild it with {rebuild}."
            )


def check_file(path: Path, sha256: str, stage: str | None = None) -> None:
    """Raises ShardMismatch, naming the stage that makes it (by default the part's own), unless `path` is there with that sha256."""
    if not path.is_file():
        problem = "is missing"
    elif sha256_file(path) != sha256:
        problem = f"has not the sha256 {sha256[:12]}... that its manifest names"
    else:
        return
    raise ShardMismatch(f"{path} {problem}. Rebuild it with `dvc repro -f {stage or f'shards@{path.parent.name}'}`, or `deepgen run`.")
