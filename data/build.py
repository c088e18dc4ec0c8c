"""A part's build, end to end: prepare its chunks, choose what is written, write the shards, account for every record."""

import json
import multiprocessing
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa

from data.config import DataConfig, Deduplicate, PartConfig
from data.preparation import Chunk, ChunkReceipt, chunk_files, prepare_chunk
from data.records import Refused
from data.rows import PREPARED, SET_ASIDE, WRITTEN, read_table, refused_row, write_table
from data.selection import find_duplicates
from data.shards import FORMAT, Receipt, build_shard, index_of, plan_shards, save_index
from data.sources import open_source
from runtime.exits import INTERRUPTED, exit_with_parent
from runtime.files import sha256_file, sha256_json, write_json

Work = TypeVar("Work")
Done = TypeVar("Done")
DEDUPLICATE: dict[str, Deduplicate] = {"drawn": "none", "prompts": "exact"}  # of sources that have other than near duplicates
TABLES = ("index.npy", "rows.parquet", "set_aside.parquet")


class Stopped(Exception):
    """A build was asked to stop; what is finished is kept."""


class Unbalanced(Exception):
    """Records went in that came out nowhere, or twice: a bug of ours, never published."""


def plan_chunks(name: str, data: DataConfig, root: Path) -> list[Chunk]:
    """The part's records, `shard_samples` to a chunk; the last may be smaller."""
    config, size = data.parts[name], data.shard_samples
    records = len(open_source(name, config, root))
    return [Chunk(name, config, data.rules, root, i, start, min(start + size, records)) for i, start in enumerate(range(0, records, size))]


def build_part(
    name: str,
    data: DataConfig,
    folder: Path,
    root: Path,
    workers: int = 1,
    on_records: Callable[[int], None] = lambda records: None,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Build every shard of a part into `folder`, going on where an earlier build was stopped, with its manifest, index and tables.

    Args:
        root: where relative paths of sources begin.
        on_records: told of each finished chunk's records.

    Returns:
        The manifest.

    Raises:
        Stopped: `stop()` turned true between chunks or shards.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = data.parts[name]
    with _pool(workers) as pool:
        chunks: list[ChunkReceipt] = []
        for receipt in _in_order(pool, prepare_chunk, plan_chunks(name, data, root), folder, stop):
            chunks.append(receipt)
            on_records(receipt.records)
        tables = [read_table(chunk_files(folder, chunk.name)["rows"]) for chunk in chunks]
        rows = pa.concat_tables(tables) if tables else PREPARED.empty_table()
        places = [(chunk.name, row) for chunk, table in zip(chunks, tables, strict=True) for row in range(len(table))]
        refused = find_duplicates(rows, config.deduplicate or DEDUPLICATE.get(config.source, "near"), data.near_distance)
        sizes = rows["bucket"].to_pylist()
        chosen = sorted(
            (row for row in range(len(rows)) if row not in refused), key=lambda row: sizes[row]
        )  # stable: order within a bucket
        written = rows.take(pa.array(chosen, pa.int64()))
        plans = plan_shards([places[row] for row in chosen], written, {chunk.name: chunk.plan for chunk in chunks}, data.shard_samples)
        shards = list(_in_order(pool, build_shard, plans, folder, stop))
    numbers = rows["record"].to_pylist()
    later = pa.Table.from_pylist([refused_row(numbers[row], refused[row]) for row in sorted(refused)], SET_ASIDE)
    _write_tables(folder, chunks, written, later, shards)
    manifest = _manifest(name, config, folder, chunks, refused, written["bucket"].to_pylist(), shards)
    write_json(folder / "manifest.json", manifest)
    return manifest


def _write_tables(folder: Path, chunks: Sequence[ChunkReceipt], written: pa.Table, later: pa.Table, shards: Sequence[Receipt]) -> None:
    index = index_of(shards)
    save_index(folder / "index.npy", index)
    for name in ("shard", "offset", "size"):
        written = written.append_column(WRITTEN.field(name), pa.array(index[name]))
    write_table(folder / "rows.parquet", written)
    earlier = [read_table(chunk_files(folder, chunk.name)["set_aside"]) for chunk in chunks]
    write_table(folder / "set_aside.parquet", pa.concat_tables([*earlier, later]))


def _manifest(
    name: str,
    config: PartConfig,
    folder: Path,
    chunks: Sequence[ChunkReceipt],
    refused: dict[int, Refused],
    sizes: list[str],
    shards: Sequence[Receipt],
) -> dict[str, Any]:
    table = [{"name": r.name, "sha256": r.sha256, "bytes": r.bytes, "samples": r.samples} for r in shards]
    reasons: Counter[str] = Counter(str(item.reason) for item in refused.values())
    for chunk in chunks:
        reasons.update(chunk.reasons)
    endings = read_table(folder / "set_aside.parquet", ["ending"])["ending"].to_pylist()
    written = sum(receipt.samples for receipt in shards)
    counts = {"input": sum(chunk.records for chunk in chunks), "written": written}
    counts |= {ending: endings.count(ending) for ending in ("quarantined", "deduplicated", "dropped")}
    if counts["input"] != sum(value for key, value in counts.items() if key != "input") or len(endings) != reasons.total():
        raise Unbalanced(
            f"{name}: {json.dumps(counts)}, {reasons.total()} reasons for {len(endings)} rows set aside; nothing is published."
        )
    buckets = Counter(sizes)  # in the order of the index, which is sorted by them
    return {
        "format": FORMAT,
        "part": name,
        "task": config.task,
        "split": config.split,
        "licence": config.licence,
        "samples": written,
        "counts": counts,
        "reasons": dict(sorted(reasons.items())),
        "buckets": [{"bucket": bucket, "samples": buckets[bucket]} for bucket in sorted(buckets)],
        "shards": table,
        "files": {file: sha256_file(folder / file) for file in TABLES},
        "dataset_id": sha256_json([FORMAT, config.task, [shard["sha256"] for shard in table]])[:32],
    }


def _in_order(
    pool: "ProcessPoolExecutor | _Inline", work: Callable[[Work, Path], Done], plans: Sequence[Work], folder: Path, stop: Callable[[], bool]
) -> Iterator[Done]:
    for i, done in enumerate(pool.map(work, plans, [folder] * len(plans))):
        yield done
        if stop() and i + 1 < len(plans):
            pool.shutdown(wait=False, cancel_futures=True)  # what is under way ends whole, the rest does not begin
            raise Stopped


def _pool(workers: int) -> "ProcessPoolExecutor | _Inline":
    """Fresh processes (a fork would inherit our threads and signal handlers) that leave Ctrl-C to us and end when we do."""
    if workers == 1:
        return _Inline()
    return ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"), initializer=_start_worker)


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    exit_with_parent()
    builder = multiprocessing.parent_process()
    if builder is None or os.getppid() != builder.pid:  # it was killed while this process started: nobody would ever send work, or an end
        os._exit(INTERRUPTED)


class _Inline:
    """A pool of none: the same interface, this process."""

    def __enter__(self) -> "_Inline":
        return self

    def __exit__(self, *error: object) -> None:
        return None

    def shutdown(self, wait: bool = True, cancel_futures: bool = False) -> None:
        return None

    def map(self, work: Callable[[Any, Path], Any], plans: Sequence[Any], folders: Sequence[Path]) -> Iterator[Any]:
        return map(work, plans, folders)
