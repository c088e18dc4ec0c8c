"""A command of the rooms below, run by the command line."""

import signal
from pathlib import Path
from subprocess import Popen

from runtime import exits


def run_child(command: list[str], root: Path) -> int:
    """Run `command` at `root` to its end and give its exit code; signals that come meanwhile are passed on, and waited for.

    It has a session of its own, so that Ctrl-C at the terminal reaches it once, from here, and not twice.
    """
    started: list[Popen[bytes]] = []

    def pass_on(number: int, _: object) -> None:
        for process in started:
            process.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in exits.SIGNALS}
    try:
        started.append(Popen(command, cwd=root, start_new_session=True))
        code = started[0].wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return code if code >= 0 else 128 - code
