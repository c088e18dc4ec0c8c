"""What the kill tests share: a clone to stop something in, a row a stop, a folder that remembers what was done."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

REPO = Path(__file__).resolve().parents[1]
GRACE = 90.0  # seconds in which what was stopped must be gone


@dataclass
class Row:
    way: str
    stage: str
    moment: str
    after_s: float
    exit_code: int | None
    gone_s: float | None
    delivered: bool = True
    survived: bool = False
    why: str = ""  # it was not survived


class State:
    """A folder in which finished rows and what an undisturbed run gave are kept: the same command started again skips them."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.seed = folder, seed
        folder.mkdir(parents=True, exist_ok=True)
        self.file = folder / f"rows-{seed}.jsonl"
        self.rows = [Row(**json.loads(line)) for line in self.file.read_text().splitlines()] if self.file.exists() else []

    def done(self, way: str, stage: str | None = None) -> list[Row]:
        return [row for row in self.rows if row.way == way and stage in (None, row.stage)]

    def add(self, rows: Sequence[Row]) -> None:
        """All of them or none: they stand for one trial, which is repeated if this script dies before its end."""
        with open(self.file, "a") as handle:
            handle.write("".join(json.dumps(asdict(row)) + "\n" for row in rows))
        self.rows += rows
        print_rows(rows)

    def remember(self, name: str, make: Callable[[], Any]) -> Any:
        """What `make` gave, here or in an earlier process."""
        file = self.folder / f"{name}.json"
        if not file.exists():
            value = make()
            file.write_text(json.dumps(value))
        return json.loads(file.read_text())

    def empty(self, name: str) -> Path:
        folder = self.folder / name
        shutil.rmtree(folder, ignore_errors=True)
        return folder


def clone(folder: Path) -> Path:
    """The working tree as git sees it, with this clone's environments and the smoke preset."""
    files = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=REPO, capture_output=True, text=True, check=True).stdout
    for name in files.splitlines():
        if (REPO / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPO / name, folder / name)
    subprocess.run(["git", "init", "-q"], cwd=folder, check=True)
    for environment in (".venv", ".venv-dvc"):
        (folder / environment).symlink_to((REPO / environment).resolve())
    shutil.copyfile(folder / "presets" / "smoke.yaml", folder / "params.yaml")
    return folder


def start(root: Path, command: Sequence[str], log: Path, **more: Any) -> subprocess.Popen:
    """`command` in `root`, with its own code and environment first; `env` in `more` adds variables."""
    environment = os.environ | {"PYTHONPATH": str(root), "PATH": f"{root / '.venv' / 'bin'}:{os.environ['PATH']}"} | more.pop("env", {})
    python = str(root / ".venv" / "bin" / "python")
    with log.open("a") as out:
        return subprocess.Popen([python, *command], cwd=root, stdout=out, stderr=subprocess.STDOUT, env=environment, **more)


def start_run(root: Path, log: Path) -> subprocess.Popen:
    return start(root, ["-c", "import sys; sys.argv = ['deepgen', 'run']; from orchestration.cli import main; main()"], log)


def process_of(root: Path, words: str) -> psutil.Process | None:
    """The process in `root` whose command line holds `words`, if one runs."""
    for process in psutil.process_iter(["cmdline"]):
        try:
            if words in " ".join(process.info["cmdline"] or []) and Path(process.cwd()) == root:
                return process
        except psutil.Error:
            continue
    return None


def left_running(root: Path) -> list[str]:
    found = []
    for process in psutil.process_iter(["cmdline"]):
        try:
            if Path(process.cwd()) == root and process.pid != os.getpid() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(" ".join(process.info["cmdline"] or [])[:100])
        except psutil.Error:
            continue
    return found


def seconds_until_gone(root: Path, process: subprocess.Popen) -> float | None:
    """Wait for `process` and for all others in `root`; None where something still lives after GRACE."""
    began = time.monotonic()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=GRACE)
    while left_running(root) and time.monotonic() - began < GRACE:
        time.sleep(0.05)
    return None if left_running(root) else round(time.monotonic() - began, 1)


def log_end(log: Path, size: int = 1500) -> str:
    return log.read_text(errors="replace")[-size:] if log.exists() else ""


def print_rows(rows: Sequence[Row], head: bool = False) -> None:
    if head:
        print(f"{'way':<13} {'stage':<11} {'moment':<26} {'after s':>7} {'exit':>5} {'gone s':>7}  survived")
    for row in rows:
        gone = "-" if row.gone_s is None else f"{row.gone_s:.1f}"
        verdict = "yes" if row.survived else f"NO {row.why}" if row.delivered else "too late"
        print(f"{row.way:<13} {row.stage:<11} {row.moment:<26} {row.after_s:>7.2f} {row.exit_code!s:>5} {gone:>7}  {verdict}")
    sys.stdout.flush()


def print_counts(rows: Sequence[Row]) -> bool:
    """Tried and survived by way; whether all were survived."""
    by_way: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_way[row.way].append(row)
    print(f"\n{'way':<13} {'tried':>6} {'survived':>9} {'too late':>9} {'gone after, at most':>20}")
    for way, mine in [*by_way.items(), ("all", list(rows))]:
        tried = [row for row in mine if row.delivered]
        gone = max((row.gone_s or 0.0 for row in tried), default=0.0)
        print(f"{way:<13} {len(tried):>6} {sum(row.survived for row in tried):>9} {len(mine) - len(tried):>9} {gone:>18.1f} s")
    return all(row.survived for row in rows if row.delivered)
