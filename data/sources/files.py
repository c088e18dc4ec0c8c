"""Files of a source: read inside its folder only, no larger than a record may be, JSON as strictly as we write it."""

import json
import math
import os
from pathlib import Path, PurePosixPath
from typing import Any

from data.records import Reason

MAX_BYTES = 200_000_000  # of one image, text or line
IMAGES = frozenset({"avif", "bmp", "gif", "heic", "jpeg", "jpg", "png", "tif", "tiff", "webp"})  # by suffix; what they hold is judged later


class Bad(Exception):
    """Why one record can't be read; `Reader.read` makes a Refused of it."""

    def __init__(self, reason: Reason, message: str):
        super().__init__(message)
        self.reason = reason


def shown(name: str) -> str:
    """A file name as text that any file can hold: what is no UTF-8 becomes escapes."""
    return name.encode("utf-8", "backslashreplace").decode()


def list_files(path: Path, pattern: str, suffixes: tuple[str, ...]) -> list[Path]:
    """`path` itself, or the files of that folder that match, sorted by their path.

    Raises:
        FileNotFoundError: none is there.
        ValueError: a link in the folder leads out of it.
    """
    if path.is_file():
        return [path]
    found = sorted((file for file in path.glob(pattern) if file.is_file()), key=lambda file: file.as_posix())
    files = [file for file in found if file.name.lower().endswith(suffixes)]
    if not files:
        raise FileNotFoundError(f"{path}: no file {pattern!r} ending in {' or '.join(suffixes)}. Look at the part's `path` and `glob`.")
    for file in files:
        if not file.resolve().is_relative_to(path.resolve()):
            raise ValueError(f"{file}: a link out of {path}. Copy the folder with its links followed: `cp -rL`.")
    return files


def read_inside(folder: Path, name: str) -> bytes:
    """The bytes of file `name` of the resolved `folder`.

    Raises:
        Bad: the name leads out of the folder, by `..`, as absolute, by NUL or by a link; no such file; no byte or too many.
    """
    if "\0" in name or PurePosixPath(name).is_absolute() or ".." in name.split("/"):
        raise Bad(Reason.PATH_OUTSIDE, f"{shown(name)!r} leads out of {folder}; expected a relative path without '..' or NUL")
    if "://" in name:
        raise Bad(Reason.FILE_MISSING, f"{shown(name)!r} is a URL; fetch the images first, with `deepgen fetch` or img2dataset")
    try:
        path = os.path.realpath(os.path.join(folder, name))
        if not path.startswith(os.path.join(folder, "")):
            raise Bad(Reason.PATH_OUTSIDE, f"{shown(name)!r} is a link that leads out of {folder}")
        if not os.path.isfile(path):  # asked first: opening a pipe would wait forever
            raise Bad(Reason.FILE_MISSING, f"{shown(name)!r}: no such file in {folder}")
        size = os.stat(path).st_size
        check_size(size, name)
        with open(path, "rb") as handle:
            return handle.read(size)
    except (OSError, ValueError, RuntimeError) as error:  # a name too long, bytes that can't be in a name, a loop of links
        raise Bad(Reason.FILE_MISSING, f"{shown(name)!r} can't be read: {shown(str(error))}") from error


def check_size(size: int, name: str) -> None:
    if size == 0:
        raise Bad(Reason.ZERO_BYTES, f"{shown(name)!r} holds no byte")
    if size > MAX_BYTES:
        raise Bad(Reason.TOO_MANY_BYTES, f"{shown(name)!r} holds {size:,} bytes; allowed: {MAX_BYTES:,}")


def read_text(content: bytes, where: str) -> str:
    """UTF-8, a byte order mark aside; line ends stay as they are."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Bad(Reason.RECORD_BAD, f"{where}: byte {error.start} is no UTF-8") from error


def read_object(content: bytes, where: str) -> dict[str, Any]:
    """A JSON object in which every key comes once and every number is finite and of at most 64 bits."""
    text = read_text(content, where)
    try:
        value = json.loads(text, object_pairs_hook=_once, parse_constant=_finite, parse_float=_finite, parse_int=_whole)
    except json.JSONDecodeError as error:
        raise Bad(Reason.RECORD_BAD, f"{where}, character {error.pos + 1}: {error.msg}") from error
    except (ValueError, RecursionError) as error:
        raise Bad(Reason.RECORD_BAD, f"{where}: {error}") from error
    if not isinstance(value, dict):
        raise Bad(Reason.RECORD_BAD, f"{where} is a {type(value).__name__}; expected an object")
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(key for key in keys if keys.count(key) > 1)!r} comes twice")
    return value


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text[:20]} is no finite number")
    return value


def _whole(text: str) -> int:
    if len(text) > 20 or not -(2**63) <= (value := int(text)) < 2**64:
        raise ValueError(f"{text[:20]}... takes more than 64 bits")
    return value


def relative(path: Path, base: Path) -> str:
    """`path` as its source names it: from the source's folder, or the bare name where the source is one file."""
    return shown(os.path.relpath(path, base) if base.is_dir() else path.name)
