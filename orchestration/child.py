"""A command of the rooms below, or DVC, run by the command line."""

import ctypes
import os
import signal
from collections.abc import Callable
from pathlib import Path
from subprocess import Popen

from runtime import exits


def run_child(command: list[str], root: Path, environment: dict[str, str] | None = None, group: bool = False) -> int:
    """Run `command` at `root` to its end and give its exit code; signals that come meanwhile are passed on, and waited for.

    It has a session of its own, so that Ctrl-C at the terminal reaches it once, from here, and not twice.

    Args:
        group: for `dvc repro`, which is deaf while a stage runs: as Ctrl-C does, the stage is told as well; a command that then ends
            unfinished is INTERRUPTED; and it ends if this process is killed.
    """
    started: list[Popen[bytes]] = []
    asked: list[int] = []

    def pass_on(number: int, _: object) -> None:
        asked.append(number)
        for process in started:
            if group:
                os.killpg(process.pid, signal.SIGINT)
            else:
                process.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in exits.SIGNALS}
    try:
        started.append(Popen(command, cwd=root, env=environment, start_new_session=True, preexec_fn=ends_with_parent() if group else None))
        code = started[0].wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if group and asked and code != exits.DONE:
        return exits.INTERRUPTED
    return code if code >= 0 else 128 - code


def ends_with_parent() -> Callable[[], None]:
    """For Popen's preexec_fn: the kernel sends the new process SIGTERM when this one dies."""
    libc = ctypes.CDLL(None)
    return lambda: libc.prctl(exits.PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
