"""Shards: WebDataset tars that come out byte for byte the same on every build, each whole or absent.

A part is cut into plans by arithmetic; `build_shard(plan) -> Receipt` is pure and runs anywhere. A receipt beside its tar says that the
tar was verified by reading it back, so that a build goes on where it was stopped.
"""

import io
import json
import multiprocessing
import os
import signal
import tarfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.config import PartConfig
from data.records import Record
from data.sources import read_record
from runtime.exits import exit_with_parent
from runtime.files import fsync_folder, read_json, sha256_file, sha256_json, write_atomic, write_json

INDEX = np.dtype([("shard", "<u4"), ("offset", "<u8"), ("size", "<u4")])
FORMAT = 1


class ShardMismatch(Exception):
    """A tar is missing, or not the one that its manifest names."""


@dataclass(frozen=True)
class Plan:
    """What one shard holds: records `start` to `stop` of a part."""

    part: str
    config: PartConfig
    shard: int
    start: int
    stop: int

    @property
    def name(self) -> str:
        return f"shard-{self.shard:06d}.tar"

    @property
    def digest(self) -> str:
        return sha256_json({"format": FORMAT, "config": self.config.model_dump(), "start": self.start, "stop": self.stop})


@dataclass(frozen=True)
class Receipt:
    """A finished shard. spans holds the byte offset and size of each sample in the tar, in order."""

    plan: str
    name: str
    sha256: str
    bytes: int
    samples: int
    spans: list[tuple[int, int]]


def plan_part(name: str, config: PartConfig, shard_samples: int) -> list[Plan]:
    """Plans of `shard_samples` records each; the last may be smaller.

    Raises:
        ValueError: a source that is read but not yet built into shards.
    """
    if config.source != "drawn" or config.samples is None:
        raise ValueError(f"{name}: source {config.source!r} can be read, but shards are built of source 'drawn' only so far.")
    starts = range(0, config.samples, shard_samples)
    return [Plan(name, config, i, start, min(start + shard_samples, config.samples)) for i, start in enumerate(starts)]


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
    with open(temporary, "wb") as handle:
        with tarfile.open(fileobj=handle, mode="w", format=tarfile.USTAR_FORMAT) as archive:
            for index in range(plan.start, plan.stop):
                begin = archive.offset
                for name, content in _members(read_record(plan.part, plan.config, index)):
                    archive.addfile(_header(name, len(content)), io.BytesIO(content))
                spans.append((begin, archive.offset - begin))
        handle.flush()
        os.fsync(handle.fileno())
    _verify_by_reading(temporary, plan)
    receipt = Receipt(plan.digest, plan.name, sha256_file(temporary), temporary.stat().st_size, plan.stop - plan.start, spans)
    os.rename(temporary, tar)
    fsync_folder(folder)
    write_json(note, asdict(receipt))
    return receipt


def _members(record: Record) -> Iterator[tuple[str, bytes]]:
    """`{key}.json` first, then references in order, then the target; keys hold no dot, where WebDataset would split them."""
    facts = {
        "format": FORMAT,
        "task": record.task,
        "category": record.category,
        "kind": record.kind,
        "prompt": record.prompt,
        "source": record.source,
        "source_id": record.source_id,
        "licence": record.licence,
        "scene": record.scene,
    }
    yield f"{record.key}.json", json.dumps(facts, sort_keys=True, ensure_ascii=False).encode()
    for i, image in enumerate(record.references):
        yield f"{record.key}.src.{i}.png", image
    yield f"{record.key}.tgt.png", record.target


def _header(name: str, size: int) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.mtime, info.uid, info.gid = size, 0o444, 0, 0, 0
    return info


def _verify_by_reading(tar: Path, plan: Plan) -> None:
    """Read the tar with webdataset's stock reader, as any user would: every sample whole, none missing."""
    os.environ["WDS_SECURE"] = "1"  # read at import: no pipes, no pickles
    import webdataset

    seen = 0
    wanted = {"json", "tgt.png"} | ({"src.0.png"} if plan.config.task == "image_edit" else set())
    for sample in webdataset.WebDataset(str(tar), shardshuffle=False, empty_check=False):
        if lacking := wanted - set(sample):
            raise ShardMismatch(f"{tar}: sample {sample['__key__']} lacks {sorted(lacking)}; build it again.")
        seen += 1
    if seen != plan.stop - plan.start:
        raise ShardMismatch(f"{tar}: {seen} samples read back, {plan.stop - plan.start} written; is a key there twice?")


def build_part(
    name: str,
    config: PartConfig,
    shard_samples: int,
    folder: Path,
    workers: int = 1,
    on_shard: Callable[[int], None] | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any] | None:
    """Build every shard of a part into `folder`, going on where an earlier build was stopped, and write its manifest and index.

    Returns:
        The manifest, or None where `stop()` turned true between shards.
    """
    folder.mkdir(parents=True, exist_ok=True)
    plans = plan_part(name, config, shard_samples)
    receipts: list[Receipt] = []
    with _pool(min(workers, len(plans))) as pool:
        for receipt in pool.map(build_shard, plans, [folder] * len(plans)):
            receipts.append(receipt)
            if on_shard is not None:
                on_shard(receipt.samples)
            if stop() and len(receipts) < len(plans):
                pool.shutdown(wait=False, cancel_futures=True)  # shards under way end whole, the others don't begin
                return None
    rows = [(shard, offset, size) for shard, receipt in enumerate(receipts) for offset, size in receipt.spans]
    buffer = io.BytesIO()
    np.save(buffer, np.array(rows, INDEX), allow_pickle=False)
    write_atomic(folder / "index.npy", buffer.getvalue())
    shards = [{"name": r.name, "sha256": r.sha256, "bytes": r.bytes, "samples": r.samples} for r in receipts]
    total, written = plans[-1].stop, sum(r.samples for r in receipts)
    manifest = {
        "format": FORMAT,
        "part": name,
        "task": config.task,
        "split": config.split,
        "licence": config.licence,
        "samples": written,
        "counts": {"input": total, "written": written, "quarantined": 0, "deduplicated": 0, "dropped": total - written},
        "shards": shards,
        "index_sha256": sha256_file(folder / "index.npy"),
        "dataset_id": sha256_json([FORMAT, config.task, [shard["sha256"] for shard in shards]])[:32],
    }
    write_json(folder / "manifest.json", manifest)
    return manifest


def _pool(workers: int) -> "ProcessPoolExecutor | _Inline":
    """Fresh processes (a fork would inherit our threads and signal handlers) that leave Ctrl-C to us and end when we do."""
    if workers == 1:
        return _Inline()
    return ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"), initializer=_start_worker)


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    exit_with_parent()


class _Inline:
    """A pool of none: the same interface, this process."""

    def __enter__(self) -> "_Inline":
        return self

    def __exit__(self, *error: object) -> None:
        return None

    def shutdown(self, wait: bool = True, cancel_futures: bool = False) -> None:
        return None

    def map(self, build: Callable[[Plan, Path], Receipt], plans: list[Plan], folders: list[Path]) -> Iterator[Receipt]:
        return map(build, plans, folders)


def verify_part(folder: Path) -> dict[str, Any]:
    """The manifest of a published part, after checking the index and every tar against it.

    Raises:
        ShardMismatch: naming the file, and the command that rebuilds it.
    """
    if not (folder / "manifest.json").is_file():
        raise ShardMismatch(f"{folder}: no manifest.json. Build it with `dvc repro shards@{folder.name}` or `deepgen run`.")
    manifest = read_json(folder / "manifest.json")
    for name, expected in [("index.npy", manifest["index_sha256"]), *((shard["name"], shard["sha256"]) for shard in manifest["shards"])]:
        check_file(folder / name, expected)
    return manifest


def check_file(path: Path, sha256: str) -> None:
    """Raises ShardMismatch unless `path` is there with that sha256."""
    if not path.is_file():
        problem = "is missing"
    elif sha256_file(path) != sha256:
        problem = f"has not the sha256 {sha256[:12]}... that its manifest names"
    else:
        return
    raise ShardMismatch(f"{path} {problem}. Rebuild it with `dvc repro -f shards@{path.parent.name}`, or `deepgen run`.")
