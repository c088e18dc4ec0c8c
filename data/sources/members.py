"""One record over several files of a folder or tar: {key}.jpg, {key}.txt, {key}.json, or {key}.src.0.png, {key}.tgt.png, {key}.json."""

import re
from collections.abc import Callable, Collection
from typing import Any

from data.records import Reason
from data.sources.files import IMAGES, Bad, read_object, read_text

SOURCE_IMAGE = re.compile(r"src\.(\d{1,4})\.(\w+)")


def images_of(extensions: Collection[str]) -> tuple[str, list[str]]:
    """Which of a record's members is the target, and which are its source images, in order. Extensions are in lower case."""
    targets = [extension for extension in extensions if extension.removeprefix("tgt.") in IMAGES]
    numbered = [(int(m[1]), m[0]) for m in map(SOURCE_IMAGE.fullmatch, extensions) if m is not None and m[2] in IMAGES]
    if len(targets) > 1:
        raise Bad(Reason.RECORD_BAD, f"target images {sorted(targets)}; expected one")
    if not targets:
        raise Bad(Reason.FILE_MISSING, f"no target image among {sorted(extensions)}; expected 'jpg', 'tgt.png' or the like")
    numbers = sorted(number for number, _ in numbered)
    if numbers != list(range(len(numbers))):
        raise Bad(Reason.FILE_MISSING, f"source images {numbers}; expected src.0, src.1, ... with none left out and none twice")
    return targets[0], [extension for _, extension in sorted(numbered)]


def caption_of(extensions: Collection[str], read: Callable[[str], bytes], caption_field: str | None) -> tuple[Any, dict[str, Any]]:
    """The prompt, and what else the JSON member says. The prompt is the JSON's `caption_field`, else the .txt, else the JSON's own."""
    row = read_object(read("json"), "its .json") if "json" in extensions else {}
    if caption_field and "json" in extensions:
        return row.get(caption_field), row
    if "txt" in extensions:
        return read_text(read("txt"), "its .txt"), row
    return row.get("prompt", row.get("caption")), row
