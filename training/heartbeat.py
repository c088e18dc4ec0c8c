"""A rank that takes no step ends itself and leaves its stacks; one that loses another says so."""

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from runtime import exits
from runtime.notices import tell_end
from runtime.stage import StageRun, rank
from training.ranks import RankLost, is_lost_rank

GRACE = 2.0  # seconds between the stacks and the end


class Heartbeat:
    """Ends this process with `exits.HUNG` after `seconds` without a `beat`, its `last_word` said; 0 never does.

    The stacks of all threads go to `hang-rank0.txt` of the run folder. faulthandler writes them from a thread of its own in C, so that a
    call that holds Python's lock hides nothing; the end needs that lock, and where it is held the other ranks end the run instead.
    """

    def __init__(self, folder: Path, seconds: float, last_word: Callable[[str], None] = lambda words: None) -> None:
        self.path, self.seconds, self.last_word = folder / f"hang-rank{rank()}.txt", seconds, last_word
        self.last = time.monotonic()
        self.over = threading.Event()

    def beat(self) -> None:
        """A step, a look at held-out samples or a save was finished."""
        self.last = time.monotonic()
        if self.seconds:
            faulthandler.dump_traceback_later(self.seconds, file=self.file)

    def __enter__(self) -> "Heartbeat":
        if self.seconds:
            self.file = open(self.path, "a")  # what an earlier process left there stays
            self.beat()
            threading.Thread(target=self._watch, daemon=True, name="heartbeat").start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        if self.seconds:
            faulthandler.cancel_dump_traceback_later()
            self.file.close()
            if not self.path.stat().st_size:
                self.path.unlink()

    def _watch(self) -> None:
        while not self.over.wait(min(1.0, self.seconds / 4)):
            if time.monotonic() - self.last > self.seconds + GRACE:
                words = f"rank {rank()}: no step for {self.seconds:g} s; its stacks are in {self.path}"
                print(words, file=sys.stderr, flush=True)
                self.last_word(words)
                os._exit(exits.HUNG)


@contextlib.contextmanager
def watch_ranks(run: StageRun) -> Iterator[Heartbeat]:
    """A heartbeat for the loop inside. Where the first rank hangs, that is noted and told as any other failure.

    Raises:
        RankLost: in place of the group's own error, when another rank died or hangs.
    """

    def last_word(words: str) -> None:
        if rank() == 0:
            tell_end(run.root, run.name, run.folder, run.params.notices, "failed", words)

    try:
        with Heartbeat(run.folder, run.params.launch.hang_seconds, last_word) as heartbeat:
            yield heartbeat
    except RuntimeError as error:
        if not is_lost_rank(error):
            raise
        raise RankLost(
            f"rank {rank()} lost another rank ({str(error).splitlines()[0][:200]}). The first error above, or {run.folder}/hang-rank*.txt, "
            "says why; the same command goes on from the last checkpoint."
        ) from error
