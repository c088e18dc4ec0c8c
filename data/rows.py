"""The tables of a part: a row for every record that was written, and one for every record that was not, with its reason."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data.records import Refused
from runtime.files import write_atomic

IMAGE = pa.struct(
    [
        ("role", pa.string()),  # src.0, src.1, ... or tgt: the member's name in the tar
        ("extension", pa.string()),
        ("offset", pa.uint64()),  # in the chunk's spool
        ("size", pa.uint32()),
        ("width", pa.uint32()),
        ("height", pa.uint32()),
        ("found_width", pa.uint32()),
        ("found_height", pa.uint32()),
        ("sha256", pa.string()),
        ("found_sha256", pa.string()),
        ("pixel_hash", pa.string()),
        ("perceptual_hash", pa.uint64()),
        ("changes", pa.list_(pa.string())),
    ]
)
PREPARED = pa.schema(
    [
        ("record", pa.uint64()),  # its number in the source
        ("key", pa.string()),
        ("source_id", pa.string()),
        ("source", pa.string()),
        ("task", pa.string()),
        ("category", pa.string()),
        ("kind", pa.string()),
        ("prompt", pa.string()),
        ("licence", pa.string()),
        ("bucket", pa.string()),
        ("images", pa.list_(IMAGE)),
        ("texts", pa.string()),  # JSON, as the three below
        ("scores", pa.string()),
        ("origin", pa.string()),
        ("scene", pa.string()),
    ]
)
ADDRESS = [pa.field("shard", pa.uint32()), pa.field("offset", pa.uint64()), pa.field("size", pa.uint32())]
WRITTEN = pa.schema([*PREPARED, *ADDRESS])
SET_ASIDE = pa.schema(
    [("record", pa.uint64())]
    + [(name, pa.string()) for name in ("source_id", "ending", "reason", "stage", "message", "reference", "sha256")]
)


def refused_row(record: int, refused: Refused) -> dict[str, Any]:
    names = ("source_id", "stage", "message", "reference", "sha256")
    told = {name: getattr(refused, name) for name in names}
    return {"record": record, "ending": refused.reason.ending, "reason": str(refused.reason)} | told


def packed(value: Mapping[str, Any] | None) -> str:
    """JSON of a record's free-form field; equal values are equal text."""
    return json.dumps(dict(value) if value is not None else None, sort_keys=True, ensure_ascii=False)


def write_table(path: Path, table: pa.Table) -> None:
    """Whole or absent; equal rows are equal bytes."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", row_group_size=50_000)
    write_atomic(path, sink.getvalue().to_pybytes())


def read_table(path: Path, columns: list[str] | None = None) -> pa.Table:
    return pq.read_table(path, columns=columns, partitioning=None)
