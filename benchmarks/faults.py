"""Stop the smoke recipe at some moment of each stage, in each way, and show that it ends with the same bytes.

    python benchmarks/faults.py [--json FILE] [--ways SIGINT SIGTERM SIGKILL orchestrator] [--seed N]

A clone runs once undisturbed, which also says how long each stage's process lives. Then, for each way, another clone is stopped once in
every stage, at a random moment of that life: the stage's own process gets the signal, or the orchestrator above it gets SIGKILL. After each
stop nothing of the project may be left running; after the last, every output in dvc.lock must be the undisturbed run's.
Goal: every stop survived. Exits 1 where one was not.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import yaml

REPO = Path(__file__).resolve().parents[1]
STAGES = ("foundation", "shards", "mixture", "alignment", "sft", "mr_grpo", "evaluation", "export")
WAYS = ("SIGINT", "SIGTERM", "SIGKILL", "orchestrator")
GRACE = 90.0  # seconds in which what was stopped must be gone


@dataclass
class Row:
    way: str
    stage: str
    after_s: float
    exit_code: int | None
    gone_s: float | None
    delivered: bool = True
    survived: bool = False


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


def start(root: Path, log: Path) -> subprocess.Popen:
    code = "import sys; sys.argv = ['deepgen', 'run']; from orchestration.cli import main; main()"
    environment = os.environ | {"PYTHONPATH": str(root), "PATH": f"{root / '.venv' / 'bin'}:{os.environ['PATH']}"}
    return subprocess.Popen(
        [str(root / ".venv" / "bin" / "python"), "-c", code], cwd=root, stdout=log.open("a"), stderr=subprocess.STDOUT, env=environment
    )


def stage_process(root: Path, stage: str) -> psutil.Process | None:
    """The process of a stage's own command in `root`, if it runs."""
    words = {"export": "training export", "shards": "data shards", "mixture": "data mixture", "evaluation": "training evaluate"}
    wanted = words.get(stage, f"training {stage}")
    for process in psutil.process_iter(["cmdline"]):
        try:
            line = " ".join(process.info["cmdline"] or [])
            if f"-m {wanted}" in line and Path(process.cwd()) == root:
                return process
        except psutil.Error:
            continue
    return None


def left_running(root: Path) -> list[str]:
    found = []
    for process in psutil.process_iter(["cmdline"]):
        try:
            if Path(process.cwd()) == root and process.pid != os.getpid():
                found.append(" ".join(process.info["cmdline"] or [])[:100])
        except psutil.Error:
            continue
    return found


def lifetimes(root: Path, run: subprocess.Popen) -> dict[str, float]:
    """Seconds that the first process of each stage lived, watched until `run` ends."""
    seen: dict[str, tuple[int, float, float]] = {}
    while run.poll() is None:
        for stage in STAGES:
            process = stage_process(root, stage)
            if process is not None and process.pid == seen.setdefault(stage, (process.pid, time.monotonic(), 0.0))[0]:
                seen[stage] = (process.pid, seen[stage][1], time.monotonic())
        time.sleep(0.1)
    return {stage: last - first for stage, (_, first, last) in seen.items()}


def stop_in(root: Path, stage: str, way: str, wait: float, log: Path) -> Row:
    """Run until `stage` has been at it for `wait` seconds, stop it in the given way, and see that all is gone.

    A stage without steps may finish whole after SIGINT or SIGTERM; then the run is interrupted as Ctrl-C does.
    """
    run = start(root, log)
    while (process := stage_process(root, stage)) is None:
        if run.poll() is not None:
            return Row(way, stage, wait, run.returncode, 0.0, delivered=False)
        time.sleep(0.05)
    time.sleep(wait)
    delivered = process.is_running()
    with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
        os.kill(run.pid, signal.SIGKILL) if way == "orchestrator" else process.send_signal(signal.Signals[way])
    began = time.monotonic()
    while process.is_running() and process.status() != psutil.STATUS_ZOMBIE and time.monotonic() - began < GRACE:
        time.sleep(0.1)
    with contextlib.suppress(subprocess.TimeoutExpired):
        run.wait(timeout=5)
    if run.poll() is None:
        run.send_signal(signal.SIGINT)
    run.wait()
    while left_running(root) and time.monotonic() - began < GRACE:
        time.sleep(0.2)
    gone = None if left_running(root) else round(time.monotonic() - began, 1)
    return Row(way, stage, round(wait, 2), run.returncode, gone, delivered)


def outputs_of(root: Path) -> dict:
    lock = yaml.safe_load((root / "dvc.lock").read_text())["stages"]
    return {name: [(out["path"], out["md5"]) for out in stage["outs"]] for name, stage in lock.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--stages", nargs="+", default=list(STAGES), choices=STAGES)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as scratch:
        base = clone(Path(scratch) / "base")
        run = start(base, Path(scratch) / "base.log")
        lives = lifetimes(base, run)
        if run.returncode != 0:
            sys.exit(f"the undisturbed run failed:\n{(Path(scratch) / 'base.log').read_text()[-2000:]}")
        expected = outputs_of(base)
        print("seconds a process: " + "  ".join(f"{stage} {life:.1f}" for stage, life in lives.items()), flush=True)
        for way in arguments.ways:
            root, log = clone(Path(scratch) / way), Path(scratch) / f"{way}.log"
            mine = [stop_in(root, stage, way, rng.uniform(0.0, 0.8) * lives[stage], log) for stage in arguments.stages]
            code = start(root, log).wait()
            same = code == 0 and outputs_of(root) == expected
            for row in mine:
                row.survived = same and row.delivered and row.gone_s is not None
            rows += mine
            print_rows(mine)
            if not same:
                print(f"{way}: exit code {code}; outputs {'equal' if code == 0 else 'incomplete'}\n{log.read_text()[-1500:]}", flush=True)
    survived, stops = sum(row.survived for row in rows), sum(row.delivered for row in rows)
    print(f"{survived} of {stops} stops survived with the same bytes; {len(rows) - stops} came too late; goal: all")
    if arguments.json:
        arguments.json.write_text(json.dumps([vars(row) for row in rows], indent=1))
    sys.exit(0 if survived == stops else 1)


def print_rows(rows: list[Row]) -> None:
    print(f"{'way':<13} {'stage':<11} {'after s':>7} {'exit':>5} {'gone s':>7}  survived")
    for row in rows:
        gone = "-" if row.gone_s is None else f"{row.gone_s:.1f}"
        verdict = "yes" if row.survived else "NO" if row.delivered else "too late"
        print(f"{row.way:<13} {row.stage:<11} {row.after_s:>7.2f} {row.exit_code!s:>5} {gone:>7}  {verdict}", flush=True)


if __name__ == "__main__":
    main()
