"""Records in text files: one pass finds where each lies, so that any can be read alone. What it says is parsed only then, and strictly."""

import csv
import io
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from data.records import Reason
from data.sources.files import MAX_BYTES, Bad, check_size, read_object, read_text

SPAN = np.dtype([("offset", "<i8"), ("size", "<i8"), ("number", "<i8")])
BOM = b"\xef\xbb\xbf"


class Spans(ABC):
    """number: the line that a record begins on, or its place in an array, from 1."""

    noun = "line"
    columns: tuple[str, ...] | None = None  # None: each record has names of its own

    def __init__(self, path: Path):
        self.path = path
        self.spans = np.fromiter(self.index(), SPAN)

    def __len__(self) -> int:
        return len(self.spans)

    @abstractmethod
    def index(self) -> Iterator[tuple[int, int, int]]:
        """Offset, size and number of every record."""

    @abstractmethod
    def parse(self, content: bytes, where: str) -> Mapping[str, Any]: ...

    def rows(self, start: int, stop: int, wanted: Iterable[str]) -> Iterator[tuple[int, Callable[[], Mapping[str, Any]]]]:
        with open(self.path, "rb") as handle:
            for offset, size, number in self.spans[start:stop].tolist():
                handle.seek(offset)
                yield number, partial(self._row, handle.read(min(size, MAX_BYTES + 1)), f"{self.path.name} {self.noun} {number}")

    def _row(self, content: bytes, where: str) -> Mapping[str, Any]:
        check_size(len(content), where)
        return self.parse(content, where)


class JsonLines(Spans):
    def index(self) -> Iterator[tuple[int, int, int]]:
        offset = 0
        with open(self.path, "rb") as handle:
            for number, line in enumerate(handle, start=1):  # lines end in \n alone: U+2028 and \r may stand in a text
                if line.removeprefix(BOM).strip():
                    yield offset, len(line.removesuffix(b"\n")), number
                offset += len(line)

    def parse(self, content: bytes, where: str) -> Mapping[str, Any]:
        return read_object(content, where)


class JsonArray(JsonLines):
    noun = "record"

    def index(self) -> Iterator[tuple[int, int, int]]:
        """Raises ValueError, naming line and column, where the array breaks: nothing after that can be trusted."""
        text = self.path.read_bytes().decode("utf-8", "surrogateescape")  # a byte that is no UTF-8 spoils its record, not the array
        decode = json.JSONDecoder(parse_int=str, parse_float=str).raw_decode  # numbers are judged with their record
        try:
            position = self._next(text, int(text.startswith("\ufeff")), "[")
            offset, last, number = 0, 0, 0
            closed = text[position : position + 1] == "]"
            while not closed:
                _, end = decode(text, position)
                number += 1
                offset += len(text[last:position].encode("utf-8", "surrogateescape"))
                size = len(text[position:end].encode("utf-8", "surrogateescape"))
                yield offset, size, number
                offset, last = offset + size, end
                after = self._space(text, end)
                closed = text[after : after + 1] == "]"
                position = after if closed else self._next(text, after, ",")
            if (rest := self._space(text, position + 1)) < len(text):
                raise json.JSONDecodeError("Nothing expected after the array", text, rest)
        except json.JSONDecodeError as error:
            place = f"{self.path}, line {error.lineno}, column {error.colno}"
            raise ValueError(f"{place}: {error.msg}; expected one JSON array. Name it .jsonl if it holds one object a line.") from error
        except RecursionError as error:
            line = text.count("\n", 0, position) + 1
            raise ValueError(f"{self.path}, line {line}: record {number + 1} is nested too deep to be read. Take it out.") from error

    @staticmethod
    def _space(text: str, position: int) -> int:
        found = re.compile(r"[ \t\n\r]*").match(text, position)
        assert found is not None, "the pattern matches nothing at all, too"
        return found.end()

    def _next(self, text: str, position: int, mark: str) -> int:
        """Where the value after `mark` begins."""
        position = self._space(text, position)
        if text[position : position + 1] != mark:
            raise json.JSONDecodeError(f"Expecting {mark!r}", text, position)
        return self._space(text, position + 1)


class Csv(Spans):
    """RFC 4180, with a header; quoted fields may hold line ends, which stay as they are. `.tsv` is the same with tabs."""

    def __init__(self, path: Path):
        self.delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
        csv.field_size_limit(MAX_BYTES)
        super().__init__(path)

    def index(self) -> Iterator[tuple[int, int, int]]:
        """Raises ValueError where the header is no header, or a quote is never closed."""
        offset = last = line = first = 0
        with open(self.path, "rb") as handle:
            reader = csv.reader(_lines(handle), delimiter=self.delimiter)
            while True:
                try:
                    row = next(reader)
                except StopIteration:
                    break
                except csv.Error:
                    row = ["its parse says why"]
                last, offset, first, line = offset, handle.tell(), line + 1, reader.line_num
                if row and self.columns is None:
                    self.columns = self._header(row)
                elif row:
                    yield last, offset - last, first
            handle.seek(last)
            if _quote_is_open(handle.read(offset - last), self.delimiter):
                raise ValueError(
                    f"{self.path}, line {first}: a quote opened here is never closed, so that the rows after it can't be told."
                )

    def _header(self, row: list[str]) -> tuple[str, ...]:
        names = tuple(row)
        if len(set(names)) < len(names):
            raise ValueError(f"{self.path}: its header is {names}; expected a name for each column, each once.")
        return names

    def parse(self, content: bytes, where: str) -> Mapping[str, Any]:
        try:
            row = next(csv.reader([read_text(content, where)], delimiter=self.delimiter, strict=True))
        except csv.Error as error:
            raise Bad(Reason.RECORD_BAD, f"{where}: {error}") from error
        assert self.columns is not None, "a record was found before the header"
        if len(row) != len(self.columns):
            raise Bad(Reason.RECORD_BAD, f"{where}: {len(row)} fields; expected {len(self.columns)}: {list(self.columns)}")
        return dict(zip(self.columns, row, strict=True))


def _lines(handle: io.BufferedReader) -> Iterator[str]:
    """`handle.tell()` stays at the end of the line that was given last, as it would not if the file were iterated."""
    if handle.read(len(BOM)) != BOM:
        handle.seek(0)
    while line := handle.readline():
        yield line.decode("utf-8", "surrogateescape")


def _quote_is_open(row: bytes, delimiter: str) -> bool:
    lines = [row.decode("utf-8", "surrogateescape"), "a further row"]
    try:
        return len(list(csv.reader(lines, delimiter=delimiter))) == 1  # the further row was swallowed
    except csv.Error:
        return False
