"""What a stage tells in its run folder while it runs, brought to its page in Dagster: log lines, numbers to plot, the newest board."""

import math
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import dagster as dg

from orchestration.console import say
from runtime.progress import line_of
from runtime.recipe import Stage
from runtime.run_folder import heartbeat_of
from runtime.stage import picture_markdown

LOOK_SECONDS = 0.5
LINE_SECONDS, NUMBERS_SECONDS, PICTURE_SECONDS = 15.0, 60.0, 60.0
LINE_SHARE, NUMBERS_SHARE, PICTURE_SHARE = 0.005, 0.02, 0.1  # a week gives some 1,300 lines, 320 rows of numbers and 80 pictures

Context = dg.AssetExecutionContext | dg.OpExecutionContext


class Pace:
    """Due every `seconds`, and more and more rarely: `share` of the time so far is let pass as well. Dagster's event log never shrinks."""

    def __init__(self, seconds: float, share: float) -> None:
        self.seconds, self.share = seconds, share
        self.began, self.last = time.monotonic(), -math.inf

    def due(self) -> bool:
        now = time.monotonic()
        if now - self.last < max(self.seconds, self.share * (now - self.began)):
            return False
        self.last = now
        return True


class Tail:
    """The run folder of one stage process, read as it grows. `folder` is None until the process has locked one.

    Dagster writes a log line, or an event, when it is called, from whichever thread; the list in which the step keeps its events is
    emptied only after the stage has ended, and with it this tail.
    """

    def __init__(self, context: Context, root: Path, stage: Stage, pid: int) -> None:
        self.context, self.root, self.stage, self.pid = context, root, stage, pid
        self.folder: Path | None = None
        self.began = time.time()
        self.lines, self.numbers = Pace(LINE_SECONDS, LINE_SHARE), Pace(NUMBERS_SECONDS, NUMBERS_SHARE)
        self.pictures = Pace(PICTURE_SECONDS, PICTURE_SHARE)
        self.told: dict[str, float] = {}  # what was sent last, by the time it was written
        self.failed = False

    def look(self, last: bool = False) -> None:
        """Tell what is new and due; with `last`, what is new. Of a failure of its own it says a word, once, and nothing else happens."""
        try:
            self.folder = self.folder or folder_of(self.root, self.stage, self.pid)
            if self.folder is not None:
                self._tell(self.folder, last)
        except Exception as error:  # whatever a full disk or a busy database raises: the stage goes on
            if not self.failed:
                say(f"{self.stage.name}: its progress can't be shown ({type(error).__name__}: {error}); it goes on")
            self.failed = True

    def _tell(self, folder: Path, last: bool) -> None:
        beat = heartbeat_of(folder)
        if beat is not None and beat["time"] >= self.began:  # not of an earlier process
            if self._is_new("line", beat["time"]) and (self.lines.due() or last):
                self.told["line"] = beat["time"]
                self.context.log.info(line_of(self.stage.name, beat))
            if self._is_new("numbers", beat["time"]) and (self.numbers.due() or last):
                self.told["numbers"] = beat["time"]
                self._observe(numbers_of(beat))
        board = newest_board(folder)
        if board is not None and self._is_new("board", board.stat().st_mtime) and (self.pictures.due() or last):
            self.told["board"] = board.stat().st_mtime
            self._observe({"board": dg.MetadataValue.md(picture_markdown(board)), "step": int(board.stem.removeprefix("step-"))})

    def _is_new(self, what: str, when: float) -> bool:
        return when > self.told.get(what, self.began)

    def _observe(self, metadata: dict[str, Any]) -> None:
        if not isinstance(self.context, dg.AssetExecutionContext):  # an experiment: it has no asset whose page it could be on
            return
        partition = str(self.stage.key) if self.stage.meta.get("partitioned") else None
        self.context.log_event(dg.AssetObservation(asset_key=self.context.asset_key, partition=partition, metadata=metadata))


@contextmanager
def tailing(context: Context, root: Path, stage: Stage, pid: int) -> Iterator[Tail]:
    """A thread that looks now and then, and once more at the end."""
    tail, over = Tail(context, root, stage, pid), threading.Event()

    def watch() -> None:
        while not over.wait(LOOK_SECONDS):
            tail.look()
        tail.look(last=True)

    thread = threading.Thread(target=watch, daemon=True, name=f"{stage.name}-tail")
    thread.start()
    try:
        yield tail
    finally:
        over.set()
        thread.join(timeout=10)


def folder_of(root: Path, stage: Stage, pid: int) -> Path | None:
    """The run folder that process `pid`, or one that it started, has locked. The lock is only read: trying it might refuse the stage."""
    for lock in (root / "outputs" / "runs" / stage.name.replace("@", "/")).glob("*/lock"):
        writer = lock.read_text().strip()
        if writer.isdigit() and _descends(int(writer), pid):
            return lock.parent
    return None


def _descends(pid: int, ancestor: int) -> bool:
    while pid > 1 and pid != ancestor:
        try:
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:  # it has ended
            return False
    return pid == ancestor


def newest_board(folder: Path) -> Path | None:
    return max((folder / "boards").glob("step-*.png"), default=None)


def numbers_of(beat: dict[str, Any]) -> dict[str, Any]:
    """A heartbeat as metadata. What is no finite number becomes a word: Dagster's page can't read it as a number."""
    return {name: value if math.isfinite(value) else str(value) for name, value in beat.items() if name != "time"}
