"""Records in Parquet and Arrow files, a batch at a time: a file is never whole in memory."""

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

from data.records import Reason
from data.sources.files import Bad, read_object

BATCH = 64  # rows; with images in them, some ten MB


class Parquet:
    """number: the row, from 1."""

    noun = "row"

    def __init__(self, path: Path):
        """Raises ValueError where the file is no whole Parquet file."""
        from pyarrow import parquet

        self.path = path
        try:
            metadata = parquet.read_metadata(path)
        except Exception as error:  # pyarrow has many, with no common base
            raise ValueError(f"{path}: {error}. It is no Parquet file, or not whole: fetch it again.") from error
        self.columns = tuple(metadata.schema.to_arrow_schema().names)
        self.ends = list(accumulate(metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)))

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def batches(self, group: int, wanted: list[str]) -> Iterator[Any]:
        from pyarrow import parquet

        with parquet.ParquetFile(self.path) as file:
            yield from file.iter_batches(BATCH, row_groups=[group], columns=wanted)

    def rows(self, start: int, stop: int, wanted: Iterable[str]) -> Iterator[tuple[int, Callable[[], Mapping[str, Any]]]]:
        columns = [name for name in self.columns if name in set(wanted)]
        while start < stop:
            group = bisect_right(self.ends, start)
            at, end = self.ends[group - 1] if group else 0, min(stop, self.ends[group])
            try:
                for batch in self.batches(group, columns):
                    first, at = at, at + len(batch)
                    for row in range(start, min(at, end)):
                        start = row + 1
                        yield start, partial(_row, batch, row - first, f"{self.path.name} row {start}")
                    if start >= end:
                        break
            except Exception as error:
                message = f"{self.path.name}, rows after {start} of group {group}: {error}"
                for number in range(start + 1, end + 1):
                    yield number, partial(_fail, message)
            start = end


class Arrow(Parquet):
    """The stream that `save_to_disk` writes. Its batches take the place of row groups; the file is mapped, not read."""

    def __init__(self, path: Path):
        self.path = path
        self.columns, sizes = (), []
        try:
            with self._open() as stream:
                self.columns = tuple(stream.schema.names)
                sizes = [len(batch) for batch in stream]
        except Exception as error:
            raise ValueError(f"{path}: {error}. It is no Arrow stream, or not whole: fetch it again.") from error
        self.ends = list(accumulate(sizes))

    def _open(self) -> Any:
        import pyarrow

        return pyarrow.ipc.open_stream(pyarrow.memory_map(str(self.path)))

    def batches(self, group: int, wanted: list[str]) -> Iterator[Any]:
        with self._open() as stream:
            for i, batch in enumerate(stream):
                if i == group:
                    for row in range(0, len(batch), BATCH):
                        yield batch.slice(row, BATCH).select(wanted)
                    return


def _row(batch: Any, row: int, where: str) -> Mapping[str, Any]:
    try:
        return batch.slice(row, 1).to_pylist()[0]
    except Exception as error:  # text that is no UTF-8, a time out of range
        raise Bad(Reason.RECORD_BAD, f"{where}: {error}") from error


def _fail(message: str) -> Mapping[str, Any]:
    raise Bad(Reason.RECORD_BAD, message)


def files_of_dataset(folder: Path) -> list[Path] | None:
    """The Arrow files that `save_to_disk` names in state.json, in its order; None where it did not write this folder.

    Raises:
        ValueError: several splits, of which none is chosen; a state that names a file elsewhere.
    """
    if (folder / "dataset_dict.json").is_file():
        splits = _told(folder / "dataset_dict.json", "splits")
        raise ValueError(f"{folder} holds the splits {splits}. Let the part's `path` name one of these folders.")
    if not (folder / "state.json").is_file():
        return None
    names = [str(file.get("filename")) for file in _told(folder / "state.json", "_data_files")]
    if wrong := [name for name in names if Path(name).name != name or (folder / name).is_symlink()]:
        raise ValueError(f"{folder / 'state.json'} names {wrong[0]!r}; expected files of its own folder.")
    return [folder / name for name in names]


def _told(file: Path, key: str) -> list[Any]:
    try:
        return list(read_object(file.read_bytes(), file.name)[key])
    except (Bad, KeyError, TypeError) as error:
        raise ValueError(f"{file}: {error}; expected a list {key!r}, as save_to_disk writes it.") from error
