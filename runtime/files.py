"""Writing so that a file or folder is whole or absent, whatever kills the writer, and reading by hash."""

import glob
import hashlib
import json
import os
import shutil
import struct
from pathlib import Path
from typing import Any


def fsync_folder(folder: Path) -> None:
    """Make renames inside `folder` durable."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomic(path: Path, content: bytes | str) -> None:
    """Write `content` to `path` through a temporary file in the same folder: fsync, rename, fsync the folder."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    data = content.encode() if isinstance(content, str) else content
    try:
        with open(temporary, "wb") as handle:
            handle.write(data)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Sorted, indented JSON, so that equal values are equal bytes. NaN and infinity are refused: JSON has no name for them."""
    write_atomic(path, json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    return json.loads(Path(path).read_text())


def fsync_tree(folder: Path) -> None:
    """fsync every file and folder under `folder`, so that a rename publishes whole content."""
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
        elif file.is_dir():
            fsync_folder(file)
    fsync_folder(folder)


def publish_folder(temporary: Path, final: Path) -> None:
    """Swap the finished folder `temporary` in at `final`. Both must lie on one file system.

    The old folder is renamed away first: for that instant `final` is absent, never half old and half new.
    """
    fsync_tree(temporary)
    final.parent.mkdir(parents=True, exist_ok=True)
    retired = final.with_name(f".{final.name}.{os.getpid()}.old")
    if final.exists():
        os.rename(final, retired)
    os.rename(temporary, final)
    fsync_folder(final.parent)
    shutil.rmtree(retired, ignore_errors=True)
    _remove_stale(list(final.parent.glob(f".{glob.escape(final.name)}.*.old")))  # of one who was killed just here


def sweep_stale(folder: Path) -> None:
    """Remove what a killed writer left under `folder`: names `.*.PID.tmp` and `.*.PID.old` whose process is gone."""
    _remove_stale([*folder.rglob(".*.tmp"), *folder.rglob(".*.old")])


def _remove_stale(leftovers: list[Path]) -> None:
    for leftover in leftovers:
        pid = leftover.name.rsplit(".", 2)[-2]
        if not pid.isdigit() or Path(f"/proc/{pid}").exists():
            continue
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink(missing_ok=True)


def sha256_bytes(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def sha256_json(value: Any) -> str:
    return sha256_bytes(json.dumps(value, sort_keys=True, allow_nan=False).encode())


def sha256_file(path: Path) -> str:
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def folder_files(folder: Path) -> list[Path]:
    """Files under `folder` that count as its content, sorted: no caches, no leftovers of a killed writer."""
    hidden = {"__pycache__", ".ipynb_checkpoints"}
    return sorted(
        file
        for file in folder.rglob("*")
        if file.is_file() and not hidden.intersection(file.parts) and not file.name.startswith(".") and file.suffix != ".pyc"
    )


def sha256_path(path: Path) -> str:
    """Digest of a file's bytes, or of a folder's relative names and bytes.

    Raises:
        FileNotFoundError: `path` does not exist.
    """
    if path.is_file():
        return sha256_file(path)
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is missing: expected a file or a folder there.")
    return sha256_json([(str(file.relative_to(path)), sha256_file(file)) for file in folder_files(path)])


def tensors_digest(folder: Path, names: str = "") -> str:
    """Digest of the weights in a model folder, without loading them: every tensor's place, name, type, shape and bytes.

    Two folders that hold the same tensors in the same parts have the same digest, whatever else lies beside them.

    Args:
        names: of the tensors whose names hold this alone, by their names from there on: prefixes differ between libraries.

    Raises:
        FileNotFoundError: no safetensors file with such a tensor lies under `folder`.
    """
    rows = []
    for file in sorted(folder.rglob("*.safetensors")):
        with open(file, "rb") as handle:
            (length,) = struct.unpack("<Q", handle.read(8))
            header = json.loads(handle.read(length))
            header.pop("__metadata__", None)
            for name, entry in header.items():
                if names not in name:
                    continue
                begin, end = entry["data_offsets"]
                handle.seek(8 + length + begin)
                digest = hashlib.sha256()
                remaining = end - begin
                while remaining > 0:
                    chunk = handle.read(min(remaining, 1 << 24))
                    if not chunk:
                        raise ValueError(f"{file} is cut short inside tensor {name!r}: publish or fetch it again.")
                    digest.update(chunk)
                    remaining -= len(chunk)
                rows.append(
                    (str(file.parent.relative_to(folder)), name[name.index(names) :], entry["dtype"], entry["shape"], digest.hexdigest())
                )
    if not rows:
        raise FileNotFoundError(f"no tensor{f' {names}*' if names else ''} in safetensors under {folder}: expected a model folder there.")
    return sha256_json(sorted(rows))
