"""Shards: WebDataset tars that come out byte for byte the same on every build, each whole or absent. The second half of a build.

`build_shard(plan) -> Receipt` is pure and runs anywhere: it moves prepared bytes from the chunks' spools into a tar. A receipt beside a tar
says that the tar was verified by reading it back, so that a build goes on where it was stopped.
"""

import io
import json
import os
import tarfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import pyarrow as pa

from data.preparation import chunk_files
from runtime.files import fsync_folder, read_json, sha256_file, sha256_json, write_json

INDEX = np.dtype([("shard", "<u4"), ("offset", "<u8"), ("size", "<u4")])
FORMAT = 2


class ShardMismatch(Exception):
    """A tar is missing, or not the one that its manifest names."""


@dataclass(frozen=True)
class Plan:
    """What one shard holds: prepared rows, in order. picks: (chunk, row) of each; inputs: (chunk, digest of its plan)."""

    shard: int
    picks: tuple[tuple[str, int], ...]
    inputs: tuple[tuple[str, str], ...]
    rows: pa.Table

    @property
    def name(self) -> str:
        return f"shard-{self.shard:06d}.tar"

    @property
    def digest(self) -> str:
        return sha256_json({"format": FORMAT, "picks": self.picks, "inputs": self.inputs})


@dataclass(frozen=True)
class Receipt:
    """A finished shard. spans holds the byte offset and size of each sample in the tar, in order."""

    plan: str
    name: str
    sha256: str
    bytes: int
    samples: int
    spans: list[tuple[int, int]]


def plan_shards(picks: list[tuple[str, int]], rows: pa.Table, inputs: dict[str, str], shard_samples: int) -> list[Plan]:
    """Plans of `shard_samples` rows each; the last may be smaller."""
    plans = []
    for shard, start in enumerate(range(0, len(picks), shard_samples)):
        mine = tuple(picks[start : start + shard_samples])
        chunks = tuple((name, inputs[name]) for name in sorted({name for name, _ in mine}))
        plans.append(Plan(shard, mine, chunks, rows.slice(start, shard_samples)))
    return plans


def build_shard(plan: Plan, folder: Path) -> Receipt:
    """Write the plan's tar and its receipt into `folder`, unless both are there and whole.

    No clock, no network, no shared state: the same plan gives the same bytes on any worker.
    """
    tar, note = folder / plan.name, folder / plan.name.replace(".tar", ".json")
    if note.exists() and tar.exists():
        known = read_json(note)
        if known["plan"] == plan.digest and sha256_file(tar) == known["sha256"]:
            return Receipt(**known | {"spans": [tuple(span) for span in known["spans"]]})
    temporary = folder / f".{plan.name}.{os.getpid()}.tmp"
    spans = []
    with open(temporary, "wb") as handle, ExitStack() as stack:
        spools = {chunk: stack.enter_context(open(chunk_files(folder, chunk)["spool"], "rb")) for chunk, _ in plan.inputs}
        with tarfile.open(fileobj=handle, mode="w", format=tarfile.USTAR_FORMAT) as archive:
            for (chunk, _), row in zip(plan.picks, plan.rows.to_pylist(), strict=True):
                begin = archive.offset
                for name, content in _members(row, spools[chunk]):
                    archive.addfile(_header(name, len(content)), io.BytesIO(content))
                spans.append((begin, archive.offset - begin))
        handle.flush()
        os.fsync(handle.fileno())
    _verify_by_reading(temporary, len(plan.picks))
    receipt = Receipt(plan.digest, plan.name, sha256_file(temporary), temporary.stat().st_size, len(plan.picks), spans)
    os.rename(temporary, tar)
    fsync_folder(folder)
    write_json(note, asdict(receipt))
    return receipt


def _members(row: dict[str, Any], spool: BinaryIO) -> Iterator[tuple[str, bytes]]:
    """`{key}.json` first, then references in order, then the target; keys hold no dot, where WebDataset would split them."""
    facts = {name: row[name] for name in ("task", "category", "kind", "prompt", "source", "source_id", "licence", "bucket")}
    free = {name: json.loads(row[name]) for name in ("texts", "scores", "origin", "scene")}
    images = [{name: value for name, value in image.items() if name != "offset"} for image in row["images"]]
    content = json.dumps({"format": FORMAT, "images": images} | facts | free, sort_keys=True, ensure_ascii=False).encode()
    yield f"{row['key']}.json", content
    for image in row["images"]:
        yield f"{row['key']}.{image['role']}.{image['extension']}", os.pread(spool.fileno(), image["size"], image["offset"])


def _header(name: str, size: int) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.mtime, info.uid, info.gid = size, 0o444, 0, 0, 0
    return info


def _verify_by_reading(tar: Path, samples: int) -> None:
    """Read the tar with webdataset's stock reader, as any user would: every sample whole by its own list of images, none missing."""
    os.environ["WDS_SECURE"] = "1"  # read at import: no pipes, no pickles
    import webdataset

    seen = 0
    for sample in webdataset.WebDataset(str(tar), shardshuffle=False, empty_check=False):
        wanted = {f"{image['role']}.{image['extension']}": image["size"] for image in json.loads(sample["json"])["images"]}
        if lacking := [name for name, size in wanted.items() if len(sample.get(name, b"")) != size]:
            raise ShardMismatch(f"{tar}: sample {sample['__key__']} lacks {lacking}; build it again.")
        seen += 1
    if seen != samples:
        raise ShardMismatch(f"{tar}: {seen} samples read back, {samples} written; is a key there twice?")


def verify_part(folder: Path) -> dict[str, Any]:
    """The manifest of a published part, after checking index, tables and every tar against it.

    Raises:
        ShardMismatch: naming the file, and the command that rebuilds it.
    """
    if not (folder / "manifest.json").is_file():
        raise ShardMismatch(f"{folder}: no manifest.json. Build it with `dvc repro shards@{folder.name}` or `deepgen run`.")
    manifest = read_json(folder / "manifest.json")
    for name, expected in [*manifest["files"].items(), *((shard["name"], shard["sha256"]) for shard in manifest["shards"])]:
        check_file(folder / name, expected)
    return cast(dict[str, Any], manifest)


def check_file(path: Path, sha256: str) -> None:
    """Raises ShardMismatch unless `path` is there with that sha256."""
    if not path.is_file():
        problem = "is missing"
    elif sha256_file(path) != sha256:
        problem = f"has not the sha256 {sha256[:12]}... that its manifest names"
    else:
        return
    raise ShardMismatch(f"{path} {problem}. Rebuild it with `dvc repro -f shards@{path.parent.name}`, or `deepgen run`.")
