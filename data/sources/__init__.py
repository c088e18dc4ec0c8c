"""Sources: each an addressable stream of records, read from the drawn world or from files of the formats that data comes in."""

from collections.abc import Callable
from pathlib import Path

from data.config import PartConfig
from data.sources.drawn import Drawn, read_record
from data.sources.folder import Folder
from data.sources.prompts import Prompts
from data.sources.reader import Source
from data.sources.rows import Rows
from data.sources.tars import Tars

__all__ = ["FORMATS", "Source", "open_source", "read_record"]

# What params.yaml may name as a part's source. A new one is a class here, and its name and settings in data/config.py.
FORMATS: dict[str, Callable[[str, PartConfig, Path], Source]] = {
    "drawn": Drawn,
    "t2i_pretrain_json": Rows,  # [{image, annotation: path of a JSON file with the caption}]
    "t2i_sft_json": Rows,  # [{txt, image_path}]
    "edit_json": Rows,  # [{input_image: [...], output_image, instruction}]
    "folder": Folder,  # images, captions beside them
    "table": Rows,  # JSON, JSONL, CSV, TSV, Parquet
    "webdataset": Tars,  # what img2dataset writes, and our own shards
    "prompts": Prompts,  # a benchmark's or RL's prompt file, without pictures
    "hugging_face": Rows,  # a local folder: Parquet, or what save_to_disk wrote
}


def open_source(name: str, part: PartConfig, root: Path) -> Source:
    """The records of part `name`; a relative `path` starts at `root`. Nothing is fetched.

    Raises:
        FileNotFoundError: what the part names is not there.
        ValueError: it is not what the source reads, or so broken that the records can't be told apart.
    """
    source = FORMATS[part.source](name, part, root)
    if len(source) == 0:
        raise ValueError(f"{name}: no record in {root / str(part.path)}; expected at least one that source {part.source!r} reads.")
    return source
