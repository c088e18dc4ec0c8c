"""Progress of long work: a bar on a terminal, plain lines elsewhere, and `progress.jsonl` as the heartbeat others read."""

import json
import sys
import time
from pathlib import Path
from types import TracebackType

from runtime.stage import rank

ROW = ("time", "step", "total", "rate", "eta_s")  # of a line of progress.jsonl; what else it holds are values


class Progress:
    """Counts `total` units of work. Of several ranks the first tells; the others would say the same.

    Args:
        total: units in all.
        unit: what is counted, singular ("step", "sample").
        desc: the name shown before the bar.
        log: file that gets one JSON line each time progress is shown: time, step, total, rate (units/s), eta_s, values.
        start: units that an earlier process had done.
        every_s: seconds between plain lines where no terminal is attached.
        samples: of which a unit is made; where given, samples_per_s is shown and written as well.
    """

    def __init__(
        self, total: int, unit: str, desc: str, log: Path | None = None, start: int = 0, every_s: float = 10.0, samples: int = 0
    ) -> None:
        self.total, self.unit, self.desc, self.every_s, self.samples = total, unit, desc, every_s, samples
        self.done = self.start = start
        self.values: dict[str, float] = {}
        self.began = self.shown = time.monotonic()
        self.log = None
        if log is not None:
            log.parent.mkdir(parents=True, exist_ok=True)
            self.log = open(log, "a")  # noqa: SIM115 - closed in __exit__
        self.bar, self.tells = None, rank() == 0
        if self.tells and sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=total, initial=start, unit=unit, desc=desc, dynamic_ncols=True)

    def update(self, n: int = 1, /, **values: float) -> None:
        self.done += n
        self.values |= values
        now = time.monotonic()
        if self.bar is not None:
            self.bar.update(n)
            if values:
                self.bar.set_postfix({name: f"{value:.4g}" for name, value in values.items()}, refresh=False)
        last = self.done >= self.total
        if self.tells and (last or now - self.shown >= (1.0 if self.bar is not None else self.every_s)):
            self._show(now)

    def _show(self, now: float) -> None:
        self.shown = now
        rate = (self.done - self.start) / max(now - self.began, 1e-9)
        eta = (self.total - self.done) / rate if rate > 0 else float("inf")
        if self.samples:
            self.values["samples_per_s"] = round(rate * self.samples, 2)
        row = {"time": time.time(), "step": self.done, "total": self.total, "rate": rate, "eta_s": min(eta, 1e9)} | self.values
        if self.bar is None:
            print(line_of(self.desc, row, f"{self.unit}s"), flush=True)
        if self.log is not None:
            self.log.write(json.dumps(row | {"rate": round(rate, 4), "eta_s": round(min(eta, 1e9), 1)}) + "\n")
            self.log.flush()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if self.bar is not None:
            self.bar.close()
        if self.log is not None:
            self.log.close()


def line_of(desc: str, row: dict[str, float], units: str = "") -> str:
    """A row of progress.jsonl in words: step of total, rate, time left, and its values."""
    values = "  ".join(f"{name} {value:.4g}" for name, value in row.items() if name not in ROW)
    done = f"{row['step']}/{row['total']} {units}".rstrip()
    return f"{desc}: {done}  {row['rate']:.3g}/s  ETA {_clock(row['eta_s'])}  {values}".rstrip()


def _clock(seconds: float) -> str:
    if seconds > 360000:
        return "?"
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
