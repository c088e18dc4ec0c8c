"""What every source of files does: find a record's fields, read its images, and turn what can't be read into a Refused in its place."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from data.config import PartConfig
from data.records import Reason, Record, Refused
from data.sources.files import Bad, check_size, read_inside, shown
from runtime.fetched import published_at

# What a record's fields may be called, whatever the source. Of several names the first that the record has is taken.
NAMES: dict[str, tuple[str, ...]] = {
    "kind": ("task_type", "edit_type", "kind"),
    "reasoning": ("reasoning",),
    "render_text": ("render_text",),
    "negative_prompt": ("negative_prompt",),
    "url": ("url", "URL"),
    "attribution": ("attribution", "author", "credit"),
}


class Source(Protocol):
    """Records by number, in the same order on every machine. What can't be read is a Refused in its place, so that counts add up."""

    def __len__(self) -> int: ...

    def read(self, start: int, stop: int) -> Iterator[Record | Refused]:
        """Records `start` to `stop`, 0 <= start <= stop <= len."""
        ...


@dataclass(frozen=True)
class Found:
    """A record before its images are read. An image is its bytes, a path in the source's folder, or {bytes, path} as Hugging Face has it.

    row: all that the record says, in its own names.
    """

    prompt: Any
    image: Any
    references: Sequence[Any]
    row: Mapping[str, Any] = field(default_factory=dict)


class Reader(ABC):
    """A source of files. Those that derive from it set `total` and say how record i is found."""

    total: int

    def __init__(self, name: str, part: PartConfig, root: Path, names: Mapping[str, tuple[str, ...]] | None = None):
        """Raises FileNotFoundError where `path` is not there."""
        self.name, self.part = name, part
        self.path = root / str(part.path)
        self.provenance = {"data_set": part.data_set, "published": published_at(str(part.path)) if part.data_set else None}
        folder = self.path if self.path.is_dir() else self.path.parent
        self.folder = (root / part.images if part.images else folder).resolve()  # no image is read outside it
        own: dict[str, tuple[str, ...]] = {
            key: (column,) if isinstance(column, str) else column for key, column in (part.columns or {}).items()
        }
        self.names: dict[str, tuple[str, ...]] = {**NAMES, **(names or {}), **own}
        for path in (self.path, self.folder):
            if not path.exists():
                fetch = (
                    " `deepgen fetch` brings a set that the catalogue has and the part names by `data_set`."
                    if part.source == "hugging_face"
                    else ""
                )
                raise FileNotFoundError(f"{name}: {path} is not there; expected what source {part.source!r} reads.{fetch}")

    def __len__(self) -> int:
        return min(self.total, self.part.samples or self.total)

    def read(self, start: int, stop: int) -> Iterator[Record | Refused]:
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"{self.name}: records {start} to {stop} asked for; there are 0 to {len(self)}")
        return (self._read(source_id, find) for source_id, find in self.find(start, stop))

    @abstractmethod
    def find(self, start: int, stop: int) -> Iterator[tuple[str, Callable[[], Found]]]:
        """The source_id of each record, and what finds its fields, or raises Bad."""

    def _read(self, source_id: str, find: Callable[[], Found]) -> Record | Refused:
        try:
            return self._record(source_id, find())
        except Bad as bad:
            return Refused(source_id, bad.reason, "source", str(bad), source_id)

    def _record(self, source_id: str, found: Found) -> Record:
        if not isinstance(found.prompt, str | None):
            raise Bad(Reason.RECORD_BAD, f"the prompt is a {type(found.prompt).__name__}; expected text")
        if found.references and self.part.task == "text_to_image":
            raise Bad(Reason.RECORD_BAD, f"{len(found.references)} source images in a part of task 'text_to_image'; expected none")
        if not found.references and self.part.task == "image_edit":
            raise Bad(Reason.REFERENCE_MISSING, "no source image; expected at least one in a part of task 'image_edit'")
        target, path = self._image(found.image)
        texts = {key: self.pick(found.row, key) for key in ("reasoning", "render_text", "negative_prompt")}
        if wrong := [key for key, text in texts.items() if not isinstance(text, str | None)]:
            raise Bad(Reason.RECORD_BAD, f"{wrong[0]} is a {type(texts[wrong[0]]).__name__}; expected text")
        scores = {key: _score(found.row.get(column), column) for key, column in (self.part.scores or {}).items()}
        origin = {key: self.pick(found.row, key) for key in ("url", "attribution")} | {"path": path} | self.provenance
        return Record(
            source_id=source_id,
            source=self.name,
            task=self.part.task,
            category=self.part.category,
            kind=shown(str(self.pick(found.row, "kind") or self.part.category)),
            prompt=found.prompt or "",
            target=target,
            references=tuple(self._image(reference)[0] for reference in found.references),
            licence=self.part.licence,
            texts={key: text for key, text in texts.items() if text},
            scores={key: score for key, score in scores.items() if score is not None},
            origin={key: shown(str(value)) for key, value in origin.items() if value},
        )

    def pick(self, row: Mapping[str, Any], key: str) -> Any:
        """What the record says of our field `key`; None where it says nothing."""
        return next((row[name] for name in self.names.get(key, ()) if row.get(name) is not None), None)

    def _image(self, value: Any) -> tuple[bytes, str | None]:
        """The bytes, and the path they have in the source."""
        path = None
        if isinstance(value, Mapping):
            path = value.get("path")
            value = path if value.get("bytes") is None else value["bytes"]
        if isinstance(value, bytes):
            check_size(len(value), path or "the image")
            return value, path
        if not isinstance(value, str) or not value:
            raise Bad(Reason.RECORD_BAD, f"an image is {value!r:.80}; expected a path, bytes, or a struct of bytes and path")
        return read_inside(self.folder, value), value


def _score(value: Any, column: str) -> float | None:
    """A finite number, from a number or its text; None where there is none: missing, empty, or the NaN that tables write for it."""
    if value is None or value == "":
        return None
    try:
        score = float(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise Bad(Reason.RECORD_BAD, f"score {column!r} is {value!r:.80}; expected a number") from error
    if math.isinf(score):
        raise Bad(Reason.RECORD_BAD, f"score {column!r} is {value!r}; expected a finite number")
    return None if math.isnan(score) else score
