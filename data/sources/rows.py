"""Sources of rows: the JSON lists of the paper, tables, and Hugging Face data sets on disk."""

import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

from data.config import PartConfig
from data.records import Reason
from data.sources.arrow import Arrow, Parquet, files_of_dataset
from data.sources.files import Bad, list_files, read_inside, read_object, relative, shown
from data.sources.reader import Found, Reader
from data.sources.spans import Csv, JsonArray, JsonLines

# What each format calls our fields; of several names the first that a row has is taken. A part's `columns` comes before this.
ALIASES: dict[str, dict[str, tuple[str, ...]]] = {
    "t2i_pretrain_json": {"image": ("image",), "annotation": ("annotation",)},
    "t2i_sft_json": {"image": ("image_path",), "prompt": ("txt",)},
    "edit_json": {"image": ("output_image",), "references": ("input_image", "input_images"), "prompt": ("instruction",)},
    "table": {
        "image": ("image", "image_path", "file_name", "jpg", "png", "output_image", "edited_image"),
        "references": ("references", "input_image", "input_images", "source_image", "original_image"),
        "prompt": ("prompt", "caption", "text", "txt", "TEXT", "instruction", "edit_prompt"),
    },
}
ALIASES["hugging_face"] = ALIASES["table"]
LISTS = {".json": JsonArray, ".jsonl": JsonLines, ".ndjson": JsonLines}
TABLES = LISTS | {".csv": Csv, ".tsv": Csv, ".parquet": Parquet}
SPLIT = re.compile(r"(?:^|/)(train|validation|valid|val|dev|test|eval)(?![a-z])")  # train-00000-of-00002.parquet, train/0000.parquet
FILES: dict[str, dict[str, Any]] = {"table": TABLES, "hugging_face": {".parquet": Parquet, ".arrow": Arrow}}


class RowFile(Protocol):
    """One file of rows."""

    path: Path
    columns: tuple[str, ...] | None

    def __len__(self) -> int: ...

    def rows(self, start: int, stop: int, wanted: Iterable[str]) -> Iterator[tuple[int, Callable[[], Mapping[str, Any]]]]:
        """The number of each row as people count it, and what parses it or raises Bad; columns beyond `wanted` may be left out."""


class Rows(Reader):
    def __init__(self, name: str, part: PartConfig, root: Path):
        super().__init__(name, part, root, ALIASES[part.source])
        kinds = FILES.get(part.source, LISTS)
        paths = self._paths(tuple(kinds))
        self.files: list[RowFile] = []
        for path in paths:
            kind = next((kind for suffix, kind in kinds.items() if path.name.lower().endswith(suffix)), None)
            if kind is None:
                raise ValueError(f"{name}: {path} given; source {part.source!r} reads {', '.join(kinds)}.")
            self.files.append(kind(path))
        for file in self.files:
            self._has_the_columns(file)
        self.ends = list(accumulate(len(file) for file in self.files))
        self.total = self.ends[-1] if self.ends else 0

    def _paths(self, suffixes: tuple[str, ...]) -> list[Path]:
        if self.part.source != "hugging_face":
            return list_files(self.path, self.part.glob or "*", suffixes)  # below it lie annotations, which are no lists
        if (saved := files_of_dataset(self.path)) is not None:
            return saved
        paths = list_files(self.path, self.part.glob or "**/*", suffixes)
        splits = sorted({found[1] for path in paths if (found := SPLIT.search(relative(path, self.path)))})
        if len(splits) > 1 and self.part.glob is None:
            raise ValueError(f"{self.path} holds the splits {splits}. Choose one by the part's `glob`, such as '**/{splits[0]}-*'.")
        return paths

    def _has_the_columns(self, file: RowFile) -> None:
        if file.columns is None:
            return
        needed = [*(self.part.columns or {}), "image", "prompt", *(["references"] if self.part.task == "image_edit" else [])]
        lacking = [key for key in needed if not set(self.names[key]) & set(file.columns)]
        scores = [column for column in (self.part.scores or {}).values() if column not in file.columns]
        if "image" in lacking and set(self.names["url"]) & set(file.columns):
            raise ValueError(f"{file.path} holds URLs, not images. Fetch them first, with `deepgen fetch` or img2dataset.")
        if lacking or scores:
            wanted = "; ".join([*(f"{key} ({' or '.join(self.names[key])})" for key in lacking), *scores])
            raise ValueError(f"{file.path} has no column for {wanted}. It has {list(file.columns)}: set the part's `columns` or `scores`.")

    def find(self, start: int, stop: int) -> Iterator[tuple[str, Callable[[], Found]]]:
        wanted = {name for names in self.names.values() for name in names} | set((self.part.scores or {}).values())
        while start < stop:
            which = bisect_right(self.ends, start)
            file, first = self.files[which], self.ends[which - 1] if which else 0
            end = min(stop, self.ends[which])
            label = relative(file.path, self.path)
            for number, parse in file.rows(start - first, end - first, wanted):
                yield f"{label}#{number}", partial(self._found, parse)
            start = end

    def _found(self, parse: Callable[[], Mapping[str, Any]]) -> Found:
        row = parse()
        if self.part.source == "t2i_pretrain_json":
            annotation = self.pick(row, "annotation")
            if not isinstance(annotation, str):
                raise Bad(Reason.RECORD_BAD, f"annotation is {annotation!r:.80}; expected the path of a JSON file")
            told = read_object(read_inside(self.folder, annotation), shown(annotation))
            return Found(told.get(self.part.caption_field or "caption"), self.pick(row, "image"), (), {**told, **row})
        image = self.pick(row, "image")
        if image is None and self.pick(row, "url"):
            raise Bad(Reason.FILE_MISSING, "a URL and no image; fetch the images first, with `deepgen fetch` or img2dataset")
        return Found(self.pick(row, "prompt"), image, self._references(row), row)

    def _references(self, row: Mapping[str, Any]) -> list[Any]:
        """Every source image of an edit, in order."""
        if self.part.task != "image_edit":
            return []
        columns = (self.part.columns or {}).get("references")
        if isinstance(columns, tuple):
            return [row[column] for column in columns if row.get(column) not in (None, "")]
        value = self.pick(row, "references")
        return value if isinstance(value, list) else [] if value in (None, "") else [value]
