"""From records as found to records that may be written: the first half of a build.

A part is cut into chunks by arithmetic. `prepare_chunk(chunk, folder) -> ChunkReceipt` is pure and runs anywhere: it reads, judges and
prepares the chunk's records, puts the images' final bytes one behind another into a spool, and leaves a row for each record.
"""

import os
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from data.config import PartConfig, PreparationRules
from data.images import BadImage, PreparedImage, buckets, prepare_image
from data.records import Reason, Record, Refused
from data.rows import PREPARED, SET_ASIDE, packed, refused_row, write_table
from data.rules import judge
from data.sources import Source, open_source
from runtime.files import fsync_folder, read_json, sha256_bytes, sha256_file, sha256_json, write_json

FORMAT = 2


@dataclass(frozen=True)
class Chunk:
    """Records `start` to `stop` of a part, and the rules that they are judged by. `root` is where relative paths of sources begin."""

    part: str
    config: PartConfig
    rules: PreparationRules
    root: Path
    index: int
    start: int
    stop: int

    @property
    def name(self) -> str:
        return f"chunk-{self.index:06d}"

    @property
    def digest(self) -> str:
        settings = {"config": self.config.model_dump(mode="json"), "rules": self.rules.model_dump(mode="json")}
        return sha256_json({"format": FORMAT, "part": self.part, "start": self.start, "stop": self.stop} | settings)


@dataclass(frozen=True)
class ChunkReceipt:
    """A finished chunk: how its records ended, and what its three files hold."""

    plan: str
    name: str
    records: int
    prepared: int
    reasons: dict[str, int]
    files: dict[str, str]


def chunk_files(folder: Path, name: str) -> dict[str, Path]:
    return {kind: folder / f"{name}.{extension}" for kind, extension in (("spool", "bin"), ("rows", "rows"), ("set_aside", "set_aside"))}


def finished_chunk(chunk: Chunk, folder: Path) -> ChunkReceipt | None:
    """The receipt of an earlier run, if it is of this plan and its files are whole."""
    note = folder / f"{chunk.name}.json"
    if not note.exists():
        return None
    known = ChunkReceipt(**read_json(note))
    files = chunk_files(folder, chunk.name)
    whole = known.plan == chunk.digest and all(path.exists() and sha256_file(path) == known.files[kind] for kind, path in files.items())
    return known if whole else None


def prepare_chunk(chunk: Chunk, folder: Path) -> ChunkReceipt:
    """Judge and prepare the chunk's records into `folder`, unless that is done already.

    No clock, no network, no shared state: the same chunk gives the same bytes on any worker.
    """
    if known := finished_chunk(chunk, folder):
        return known
    files = chunk_files(folder, chunk.name)
    sizes = buckets(chunk.rules.image_size, max_aspect=chunk.rules.images.max_aspect)
    rows: list[dict[str, Any]] = []
    refused: list[tuple[int, Refused]] = []
    temporary = files["spool"].with_name(f".{files['spool'].name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as spool:
        for number, record in enumerate(_source(chunk).read(chunk.start, chunk.stop), chunk.start):
            made = record if isinstance(record, Refused) else prepare(record, chunk.config, chunk.rules, sizes)
            if isinstance(record, Refused) or isinstance(made, Refused):
                refused.append((number, made))  # type: ignore[arg-type]
                continue
            offset = spool.tell()
            spool.write(b"".join(image.content for _, image in made))
            rows.append({"record": number} | _row(record, made, offset, chunk.rules.image_size))
        spool.flush()
        os.fsync(spool.fileno())
    os.rename(temporary, files["spool"])
    fsync_folder(folder)
    write_table(files["rows"], pa.Table.from_pylist(rows, PREPARED))
    write_table(files["set_aside"], pa.Table.from_pylist([refused_row(*item) for item in refused], SET_ASIDE))
    reasons = dict(sorted(Counter(str(item.reason) for _, item in refused).items()))
    digests = {kind: sha256_file(path) for kind, path in files.items()}
    receipt = ChunkReceipt(chunk.digest, chunk.name, chunk.stop - chunk.start, len(rows), reasons, digests)
    if receipt.records != len(rows) + len(refused):
        raise AssertionError(f"{chunk.part} {chunk.name}: {receipt.records} records, {len(rows)} prepared and {len(refused)} refused")
    write_json(folder / f"{chunk.name}.json", asdict(receipt))
    return receipt


_opened: dict[str, Source] = {}


def _source(chunk: Chunk) -> Source:
    """The chunk's source, opened once a process: opening may mean to index a large file."""
    key = sha256_json([chunk.part, chunk.config.model_dump(mode="json"), str(chunk.root)])
    if key not in _opened:
        _opened.clear()
        _opened[key] = open_source(chunk.part, chunk.config, chunk.root)
    return _opened[key]


def prepare(
    record: Record, config: PartConfig, rules: PreparationRules, sizes: tuple[tuple[int, int], ...]
) -> list[tuple[str, PreparedImage]] | Refused:
    """The record's images by role, references first, as they will lie in the tar; or why it is refused."""
    fault = judge(record, rules.texts, config.min_scores, config.max_scores)
    if fault is not None:
        reason, stage, message = fault
        return Refused(record.source_id, reason, stage, message, record.origin.get("path", record.source_id))
    lossless = record.category == "text_rendering"  # rendered letters must not pass through a lossy encoder
    named = [(f"src.{i}", content) for i, content in enumerate(record.references)] + (
        [] if record.target is None else [("tgt", record.target)]
    )
    made = []
    for role, content in named:
        try:
            made.append((role, prepare_image(content, f"{record.source_id} {role}", rules.images, sizes, lossless)))
        except BadImage as error:
            reference = record.origin.get("path", record.source_id)
            return Refused(record.source_id, error.reason, "image", str(error), reference, sha256_bytes(content))
    if len(made) > 1 and all(image.pixel_hash == made[-1][1].pixel_hash for _, image in made[:-1]):
        message = "the target's pixels are its source's: nothing was edited"
        return Refused(record.source_id, Reason.SAME_IMAGE, "image", message, record.source_id, made[-1][1].found_sha256)
    return made


def _row(record: Record, made: list[tuple[str, PreparedImage]], offset: int, side: int) -> dict[str, Any]:
    images = []
    for role, image in made:
        facts = {name: getattr(image, name) for name in ("extension", "width", "height", "found_width", "found_height")}
        hashes = {name: getattr(image, name) for name in ("sha256", "found_sha256", "pixel_hash", "perceptual_hash")}
        images.append({"role": role, "offset": offset, "size": len(image.content), "changes": list(image.changes)} | facts | hashes)
        offset += len(image.content)
    # The target's size first; of a mere prompt the square that will be drawn for it.
    sizes = [f"{image.width}x{image.height}" for _, image in (*made[-1:], *made[:-1])] or [f"{side}x{side}"]
    return {
        "key": record.key,
        "source_id": record.source_id,
        "source": record.source,
        "task": record.task,
        "category": record.category,
        "kind": record.kind,
        "prompt": record.prompt,
        "licence": record.licence,
        "bucket": "<".join(sizes),  # the target's size, then those of what it was made from
        "images": images,
        "texts": packed(record.texts),
        "scores": packed(record.scores),
        "origin": packed(record.origin),
        "scene": packed(record.scene),
    }
