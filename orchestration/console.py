"""Words for the person at the terminal. During a run Dagster owns the standard streams, so its own chatter goes to a log file."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

_terminal: TextIO | None = None


def say(line: str) -> None:
    """Print a line where Dagster keeps its step logs, and on the terminal of `deepgen run` if there is one."""
    print(line, flush=True)
    if _terminal is not None:
        print(line, file=_terminal, flush=True)


@contextmanager
def terminal_for_us(log: Path) -> Iterator[None]:
    """Send everything that this process and its children print to `log`, and keep the terminal for `say`."""
    global _terminal
    log.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    out, err = os.dup(1), os.dup(2)
    with open(log, "ab") as handle, os.fdopen(os.dup(out), "w") as _terminal:
        os.dup2(handle.fileno(), 1)
        os.dup2(handle.fileno(), 2)
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os.dup2(out, 1)
            os.dup2(err, 2)
            os.close(out)
            os.close(err)
            _terminal = None
