"""The tars of a published part, wherever they lie: beside their manifest, or in the store that it names."""

import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from data.shards import check_images, split_members
from runtime.files import read_json
from runtime.published import ShardMismatch, check_file, check_stored
from runtime.store import Store, shard_store, tar_name


class Tars(Protocol):
    """Random access to the samples of a part, whose bytes are the ones that were built."""

    def read(self, shard: int, offset: int, size: int) -> bytes:
        """`size` bytes of tar number `shard` from byte `offset`: one whole sample. Raises ShardMismatch."""

    def close(self) -> None: ...


def open_tars(folder: Path, manifest: dict[str, Any], stage: str) -> Tars:
    """Raises ShardMismatch, naming the first tar that is missing or has not the size in the manifest, and the stage that makes it."""
    store = shard_store(manifest)
    return LocalTars(folder, manifest, stage) if store is None else StoredTars(store, manifest)


class LocalTars:
    """Tars beside their manifest. Each one's sha256 is checked before its first sample is read."""

    def __init__(self, folder: Path, manifest: dict[str, Any], stage: str) -> None:
        self.folder, self.shards, self.stage = folder, manifest["shards"], stage
        self.handles: dict[int, int] = {}
        self.opening = threading.Lock()
        for shard in self.shards:
            path = folder / shard["name"]
            if not path.is_file() or path.stat().st_size != shard["bytes"]:
                found = f"{path.stat().st_size} bytes" if path.is_file() else "missing"
                raise ShardMismatch(
                    f"{path}: {found}, its manifest says {shard['bytes']} bytes. Rebuild it with `dvc repro -f {stage}`, or `deepgen run`."
                )

    def read(self, shard: int, offset: int, size: int) -> bytes:
        if shard not in self.handles:
            with self.opening:
                self._open(shard)
        return os.pread(self.handles[shard], size, offset)

    def _open(self, shard: int) -> None:
        """Check the whole tar, once, whichever thread comes first."""
        if shard not in self.handles:
            entry = self.shards[shard]
            check_file(self.folder / entry["name"], entry["sha256"], self.stage)
            self.handles[shard] = os.open(self.folder / entry["name"], os.O_RDONLY)

    def close(self) -> None:
        for handle in self.handles.values():
            os.close(handle)
        self.handles.clear()


class StoredTars:
    """Tars in a store, read by byte range. None is fetched whole, so each image is checked by the sha256 in its sample's own JSON instead.

    That JSON is taken as it came: a prompt is covered by the tar's sha256 alone, which `python -m data verify` checks.
    """

    def __init__(self, store: Store, manifest: dict[str, Any]) -> None:
        check_stored(store, manifest, whole=False)
        self.store, self.part = store, manifest["part"]
        self.names = [tar_name(shard) for shard in manifest["shards"]]

    def read(self, shard: int, offset: int, size: int) -> bytes:
        where = self.store.url(self.names[shard])
        try:
            content = self.store.read(self.names[shard], offset, offset + size)
        except FileNotFoundError:
            raise ShardMismatch(f"{where}: missing. Rebuild it with `dvc repro -f shards@{self.part}`.") from None
        if len(content) != size:
            raise ShardMismatch(f"{where}: {len(content)} bytes came from byte {offset}, the sample there has {size}. {self._mend()}")
        try:
            members = split_members(content, where)
            key = next(iter(members)).partition(".")[0]
            facts = json.loads(bytes(members.pop(f"{key}.json")))
            check_images(facts, {name.removeprefix(f"{key}."): bytes(image) for name, image in members.items()}, f"{where} {key}")
        except (ShardMismatch, KeyError, ValueError) as error:  # a spoilt header, or spoilt JSON, is a ValueError
            raise ShardMismatch(f"{where}: the sample at byte {offset} is not the one that was built: {error}. {self._mend()}") from error
        return content

    def _mend(self) -> str:
        return f"Remove the tar from the store, then rebuild it with `dvc repro -f shards@{self.part}`."

    def close(self) -> None:
        return None


def upload_tars(folder: Path, manifest: dict[str, Any], store: Store) -> Iterator[bool]:
    """Bring the tars of a finished build into the store, one a step; False for one that was there already.

    Raises:
        StoreError: one can't be written.
    """
    for shard in manifest["shards"]:
        yield store.put(folder / shard["name"], tar_name(shard))


def tar_urls(folder: Path) -> list[str]:
    """URL of every tar of a published part, or its path where it lies beside the manifest."""
    manifest = read_json(folder / "manifest.json")
    store = shard_store(manifest)
    return [str(folder / shard["name"]) if store is None else store.url(tar_name(shard)) for shard in manifest["shards"]]
