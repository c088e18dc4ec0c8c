"""What a build set aside, and another try at it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from data.config import DataConfig
from data.images import buckets
from data.preparation import prepare
from data.records import Refused
from data.rows import read_table
from data.sources import open_source


def set_aside(folder: Path, reason: str | None = None) -> list[dict[str, Any]]:
    """Rows of the records of a published part that were not written, of one reason or of all."""
    rows = cast(list[dict[str, Any]], read_table(folder / "set_aside.parquet").to_pylist())
    return [row for row in rows if reason is None or row["reason"] == reason]


def redrive(name: str, data: DataConfig, folder: Path, root: Path, reason: str) -> Iterator[tuple[str, Refused | None]]:
    """(source id, why it is still refused or None) of every record set aside for `reason`, read and judged anew from its source.

    Nothing is written: a build that has the same inputs must have the same bytes. Duplicates are judged by a build alone.
    """
    config = data.parts[name]
    source = open_source(name, config, root)
    sizes = buckets(data.image_size, max_aspect=data.images.max_aspect)
    for row in set_aside(folder, reason):
        record = next(iter(source.read(row["record"], row["record"] + 1)))
        made = record if isinstance(record, Refused) else prepare(record, config, data.rules, sizes)
        yield row["source_id"], made if isinstance(made, Refused) else None
