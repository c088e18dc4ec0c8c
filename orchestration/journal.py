"""A journal: a file of JSON lines that is only ever appended to, each line signed with who wrote it, when and from where."""

import json
import os
import pwd
import socket
import time
from pathlib import Path
from typing import Any

from runtime.files import fsync_folder


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Add one line and flush it to disk. What a killed writer left of an earlier line stays, with a line end of its own.

    Raises:
        ValueError: a value of `row` is NaN or infinite.
    """
    line = json.dumps(row, sort_keys=True, allow_nan=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b") as handle:
        if handle.seek(0, os.SEEK_END):
            handle.seek(-1, os.SEEK_END)
            line = line if handle.read(1) == b"\n" else "\n" + line
        handle.write(line.encode())
        handle.flush()
        os.fsync(handle.fileno())
    fsync_folder(path.parent)


def read_rows(path: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """The rows, oldest first, and the numbers of lines that are none: a kill in the middle of a write leaves one."""
    rows, broken = [], []
    lines = path.read_bytes().splitlines() if path.is_file() else []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict):
            rows.append(row)
        else:
            broken.append(number)
    return rows, broken


def signature(via: str, reason: str | None) -> dict[str, Any]:
    """Who acts, on which machine, through what (`cli`, `dagster run ID`), when and why. The user is the system's, whatever $USER says."""
    try:
        user = pwd.getpwuid(os.getuid()).pw_name
    except KeyError:  # a container may run as a number without a name
        user = str(os.getuid())
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return {"time": now, "user": user, "host": socket.gethostname(), "via": via, "reason": reason}
