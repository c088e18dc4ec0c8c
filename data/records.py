"""Records: what a source yields and a shard holds. Images are encoded bytes until a batch needs pixels.

Every record of a source ends in one of four ways: written, quarantined (it is broken), deduplicated (it is there already) or dropped (a
policy does not want it). One that is not written keeps the reason.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal

from runtime.files import sha256_bytes, sha256_json

Ending = Literal["written", "quarantined", "deduplicated", "dropped"]


class Reason(StrEnum):
    """Why a record was not written."""

    RECORD_BAD = "record_bad"  # its line or row can't be parsed, or lacks a field
    FILE_MISSING = "file_missing"
    PATH_OUTSIDE = "path_outside"  # it names a file outside the source's folder
    ZERO_BYTES = "zero_bytes"
    TOO_MANY_BYTES = "too_many_bytes"
    TOO_MANY_PIXELS = "too_many_pixels"  # by its header, before anything is decoded
    FORMAT_UNSUPPORTED = "format_unsupported"
    MODE_UNSUPPORTED = "mode_unsupported"
    TRUNCATED = "truncated"
    DECODE_FAILED = "decode_failed"
    TOO_SMALL = "too_small"
    ASPECT = "aspect"
    TEXT_EMPTY = "text_empty"
    TEXT_BAD = "text_bad"  # control characters, lone surrogates
    TEXT_TOO_LONG = "text_too_long"
    TEXT_BOILERPLATE = "text_boilerplate"
    LANGUAGE = "language"
    REFERENCE_MISSING = "reference_missing"  # an edit without a source image
    SAME_IMAGE = "same_image"  # an edit whose target is its source
    DUPLICATE = "duplicate"
    NEAR_DUPLICATE = "near_duplicate"
    EVALUATION_LEAK = "evaluation_leak"
    SCORE = "score"  # a score column is beyond its threshold
    TAKEDOWN = "takedown"

    @property
    def ending(self) -> Ending:
        if self in (Reason.DUPLICATE, Reason.NEAR_DUPLICATE):
            return "deduplicated"
        policy = (
            Reason.TOO_SMALL,
            Reason.ASPECT,
            Reason.TEXT_TOO_LONG,
            Reason.TEXT_BOILERPLATE,
            Reason.LANGUAGE,
            Reason.EVALUATION_LEAK,
            Reason.SCORE,
            Reason.TAKEDOWN,
        )
        return "dropped" if self in policy else "quarantined"


@dataclass(frozen=True)
class Refused:
    """A record that is not written: why, found where, and what to look at.

    stage: source, text, image, dedup, decontamination or policy; reference: the file or line, as the source names it; sha256: of the bytes
    at fault, where there are any.
    """

    source_id: str
    reason: Reason
    stage: str
    message: str
    reference: str
    sha256: str | None = None


@dataclass(frozen=True)
class Record:
    """One sample of a source, as found: target and references are encoded image bytes; a mere prompt has no target.

    texts: further fields of the record (reasoning, render_text, negative_prompt); scores: columns such as aesthetic, nsfw, clip; origin:
    url, attribution, path, and of the catalogue's sets data_set and published (owner/name@revision); scene: the drawn world's own
    description, for the verifier, None elsewhere.
    """

    source_id: str
    source: str
    task: str
    category: str
    kind: str
    prompt: str
    target: bytes | None
    references: tuple[bytes, ...]
    licence: str
    scene: dict[str, Any] | None = None
    texts: Mapping[str, str] = field(default_factory=dict)
    scores: Mapping[str, float] = field(default_factory=dict)
    origin: Mapping[str, str] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """16 hex digits of where the record came from and what it holds."""
        content = [sha256_bytes(image) for image in (self.target, *self.references) if image is not None]
        return sha256_json([self.source, self.source_id, self.task, self.prompt, content])[:16]
