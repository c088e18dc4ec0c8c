"""Shards: WebDataset tars that come out byte for byte the same on every build, each whole or absent. The second half of a build.

`build_shard(plan) -> Receipt` is pure and runs anywhere: it moves prepared bytes from the chunks' spools into a tar. A receipt beside a tar
says that the tar was verified by reading it back, so that a build goes on where it was stopped.
"""

import io
import json
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa

from data.preparation import chunk_files
from runtime.files import fsync_folder, read_json, sha256_bytes, sha256_file, sha256_json, write_atomic, write_json
from runtime.published import ShardMismatch

INDEX = np.dtype([("shard", "<u4"), ("offset", "<u8"), ("size", "<u4")])
FORMAT = 2
BLOCK = 512  # bytes of a tar header, and what members are padded to


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
    if known := finished_shard(folder, plan.name, plan.digest):
        return known
    with ExitStack() as stack:
        spools = {chunk: stack.enter_context(open(chunk_files(folder, chunk)["spool"], "rb")) for chunk, _ in plan.inputs}
        samples = (_members(row, spools[chunk]) for (chunk, _), row in zip(plan.picks, plan.rows.to_pylist(), strict=True))
        return write_shard(folder, plan.name, plan.digest, samples, check_sample)


def finished_shard(folder: Path, name: str, plan: str) -> Receipt | None:
    """The receipt of an earlier run, if it is of this plan and its tar is whole."""
    tar, note = folder / name, _note(folder, name)
    if not (note.exists() and tar.exists()):
        return None
    known = read_json(note)
    if known["plan"] != plan or sha256_file(tar) != known["sha256"]:
        return None
    return Receipt(**known | {"spans": [tuple(span) for span in known["spans"]]})


def write_shard(
    folder: Path,
    name: str,
    plan: str,
    samples: Iterable[Iterable[tuple[str, bytes]]],
    check: Callable[[dict[str, Any]], None],
) -> Receipt:
    """Write samples, each its tar members in order, as a tar that is whole or absent, and its receipt.

    Args:
        check: told of each sample as webdataset's stock reader gives it back; raises what is wrong with it.
    """
    temporary = folder / f".{name}.{os.getpid()}.tmp"
    spans = []
    with open(temporary, "wb") as handle:
        with tarfile.open(fileobj=handle, mode="w", format=tarfile.USTAR_FORMAT) as archive:
            for members in samples:
                begin = archive.offset
                for member, content in members:
                    archive.addfile(_header(member, len(content)), io.BytesIO(content))
                spans.append((begin, archive.offset - begin))
        handle.flush()
        os.fsync(handle.fileno())
    _verify_by_reading(temporary, len(spans), check)
    receipt = Receipt(plan, name, sha256_file(temporary), temporary.stat().st_size, len(spans), spans)
    os.rename(temporary, folder / name)
    fsync_folder(folder)
    write_json(_note(folder, name), asdict(receipt))
    return receipt


def _note(folder: Path, name: str) -> Path:
    return folder / name.replace(".tar", ".json")


def index_of(shards: Iterable[Receipt]) -> np.ndarray:
    """Where each sample lies: INDEX (N,), in the shards' order."""
    return np.array([(shard, *span) for shard, receipt in enumerate(shards) for span in receipt.spans], INDEX)


def save_index(path: Path, index: np.ndarray) -> None:
    buffer = io.BytesIO()
    np.save(buffer, index, allow_pickle=False)
    write_atomic(path, buffer.getvalue())


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


def check_sample(sample: dict[str, Any]) -> None:
    """Raises ShardMismatch unless a sample, as webdataset reads it, is whole by its own JSON."""
    images = {name: content for name, content in sample.items() if name != "json" and not name.startswith("__")}
    check_images(json.loads(sample["json"]), images, f"{sample['__url__']}: sample {sample['__key__']}")


def _verify_by_reading(tar: Path, samples: int, check: Callable[[dict[str, Any]], None]) -> None:
    """Read the tar with webdataset's stock reader, as any user would: every sample whole, none missing."""
    os.environ["WDS_SECURE"] = "1"  # read at import: no pipes, no pickles
    import webdataset

    seen = 0
    for sample in webdataset.WebDataset(str(tar), shardshuffle=False, empty_check=False):
        check(sample)
        seen += 1
    if seen != samples:
        raise ShardMismatch(f"{tar}: {seen} samples read back, {samples} written; is a key there twice?")


def split_members(content: bytes, name: str) -> dict[str, memoryview]:
    """Member name -> bytes of a run of USTAR entries, without a copy: tarfile takes longer over headers than libjpeg over a small image."""
    members: dict[str, memoryview] = {}
    view, place = memoryview(content), 0
    while place < len(content):
        header = content[place : place + BLOCK]
        if header[257:263] != b"ustar\0" or header[156:157] != b"0":
            raise ShardMismatch(f"{name}: no plain file's USTAR header at byte {place} of its run; rebuild the part, with `dvc repro -f`.")
        size = int(header[124:135], 8)
        members[header[:100].rstrip(b"\0").decode("ascii")] = view[place + BLOCK : place + BLOCK + size]
        place += BLOCK + -(-size // BLOCK) * BLOCK
    return members


def check_images(facts: dict[str, Any], images: Mapping[str, bytes], where: str) -> None:
    """Raises ShardMismatch, naming `where`, unless `images` ("tgt.png" -> bytes) are those that the sample's JSON lists, by sha256."""
    wanted = {f"{image['role']}.{image['extension']}": image["sha256"] for image in facts["images"]}
    missing = sorted(wanted.keys() - images.keys())
    spoilt = sorted(name for name in images if name not in wanted or sha256_bytes(images[name]) != wanted[name])
    if missing or spoilt:
        raise ShardMismatch(f"{where}: images missing: {missing or 'none'}; not of the sha256 in the sample's JSON: {spoilt or 'none'}")
