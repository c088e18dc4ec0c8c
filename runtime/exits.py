"""Exit codes of a stage command, and how it ends when told to or when its parent dies."""

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any, TextIO

DONE = 0
FAILED = 1
BAD_PARAMS = 2
INPUTS_CHANGED = 3
LOCKED = 4
HUNG = 5  # a rank took no step for launch.hang_seconds: its stacks are in the run folder, the same command goes on
UNREACHABLE = 6  # a store did not answer: the same command may go through later
NO_READER = 141  # as a shell reports SIGPIPE: what this printed was not read to its end
INTERRUPTED = 75  # EX_TEMPFAIL: state is saved, run the same command to go on

PR_SET_PDEATHSIG = 1
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Plain(Exception):
    """An error that a user can mend and whose message says how: stage commands show it without its trace."""


class Unreachable(Plain):
    """Something outside this machine did not answer; the same command may go through later."""


class Interrupted(Exception):
    """The stage was asked to stop and has saved its state; the same command continues it."""


class StopRequest:
    """Set by SIGTERM, SIGINT or SIGHUP; the loop looks at it after each step. A second signal ends the process at once.

    What the kernel sends because the parent died is no second request: the step is still finished and saved. It sends one for each thread
    of the dying parent that inherits this process, all within a moment and before the parent is seen to be gone.
    """

    MOMENT = 1.0  # seconds

    def __init__(self) -> None:
        self.signal: int | None = None
        self.asked = False
        self.since = 0.0
        self.parent = os.getppid()

    def install(self) -> None:
        for number in SIGNALS:
            signal.signal(number, self._receive)

    def over(self) -> None:
        """The work is done and its exit code stands: Python puts the default handlers back while it shuts down, but not over this."""
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def ask(self) -> None:
        """As if a signal had come: for work beside that has failed. One that comes later is the first."""
        self.asked = True

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            if os.getppid() != self.parent or time.monotonic() - self.since < self.MOMENT:
                return
            os._exit(128 + number)
        self.signal, self.since = number, time.monotonic()
        said = f"{signal.Signals(number).name}: finishing this step, then saving. Once more to stop at once.\n"
        with contextlib.suppress(OSError):  # not print: this may have come in the middle of one
            os.write(1, said.encode())

    def __bool__(self) -> bool:
        return self.asked or self.signal is not None


@contextlib.contextmanager
def stopping() -> Iterator[StopRequest]:
    """The body of a command that ends with its parent, and where a signal is a request. Nested inside `runtime.stage.guard`."""
    exit_with_parent()
    stop = StopRequest()
    stop.install()
    try:
        yield stop
    finally:
        stop.over()


class QuietStream:
    """A text stream that drops what it is given once nobody reads it any more, instead of failing the work that prints."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def exit_with_parent() -> None:
    """Receive SIGTERM when the parent dies, so that a killed orchestrator leaves no orphan; a stuck process is ended after 60 s.

    What is printed after that is lost, and no error: the state is still saved. Survives `exec`, so a launcher that this process becomes
    is covered as well. Linux only.
    """
    sys.stdout, sys.stderr = QuietStream(sys.stdout), QuietStream(sys.stderr)  # type: ignore[assignment]
    parent = os.getppid()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed: this stage needs Linux")
    if os.getppid() != parent:  # it died between the two calls
        os.kill(os.getpid(), signal.SIGTERM)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        time.sleep(60)  # the kernel has sent SIGTERM; a second one would mean: stop without saving
        os._exit(INTERRUPTED)

    threading.Thread(target=watch, daemon=True, name="parent-watch").start()
