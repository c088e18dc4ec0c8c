"""Stop the smoke recipe at some moment of each stage, in each way, and show that it ends with the same bytes.

    python benchmarks/faults.py [--json FILE] [--ways SIGINT SIGTERM SIGKILL orchestrator build] [--moments N] [--seed N]

A clone runs once undisturbed, which also says how long each stage's process lives. Then, for each way, another clone is stopped once in
every stage, at a random moment of that life: the stage's own process gets the signal, or the orchestrator above it gets SIGKILL. After each
stop nothing of the project may be left running; after the last, every output in dvc.lock must be the undisturbed run's.
The way `build` kills the build of one larger part, with two workers, at `--moments` random moments of its start, its chunks, its shards
and its publication: every third time one of its workers, else itself, and every other time over an older version that is published.
After each kill it runs to its end: every sha256 must be the undisturbed build's, and no file and no process may be left over.
Goal: every stop survived. Exits 1 where one was not.
"""

import argparse
import contextlib
import hashlib
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
WAYS = ("SIGINT", "SIGTERM", "SIGKILL", "orchestrator", "build")
PHASES = {"start": "lock", "chunks": "shards/chunk-*.json", "shards": "shards/shard-*.json", "publish": "shards/manifest.json"}  # known by
PART, PART_SAMPLES, SHARD_SAMPLES = "drawn_image_edit", 3000, 60
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


def start_build(root: Path, log: Path) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(root)}
    command = [str(root / ".venv" / "bin" / "python"), "-m", "data", "shards", PART]
    return subprocess.Popen(command, cwd=root, stdout=log.open("a"), stderr=subprocess.STDOUT, env=environment)


def reached(root: Path, phase: str) -> bool:
    return any((root / "outputs" / "runs" / "shards" / PART).glob(f"*/{PHASES[phase]}"))


def phase_seconds(root: Path, build: subprocess.Popen) -> dict[str, float]:
    """Seconds that each phase of an undisturbed build lasts."""
    entered: dict[str, float] = {}
    end = 0.0
    while build.poll() is None:
        for phase in PHASES:
            if phase not in entered and reached(root, phase):
                entered[phase] = time.monotonic()
        if not end and len(entered) == len(PHASES) and not any((root / "outputs" / "runs" / "shards" / PART).glob("*/shards")):
            end = time.monotonic()  # published; what follows is pictures
        time.sleep(0.001)
    return {phase: after - begin for (phase, begin), after in zip(entered.items(), [*list(entered.values())[1:], end], strict=True)}


def kill_build(root: Path, phase: str, victim: str, wait: float, log: Path) -> Row:
    """Kill the build, or one of its workers, `wait` seconds into a phase; nothing of it may live on."""
    build = start_build(root, log)
    workers: list[psutil.Process] = []
    began = None
    while build.poll() is None and (began is None or time.monotonic() - began < wait):
        began = began or (time.monotonic() if reached(root, phase) else None)
        time.sleep(0.001)
    with contextlib.suppress(psutil.Error):
        children = psutil.Process(build.pid).children()
        workers = [child for child in children if "spawn_main" in " ".join(child.cmdline())]
    hit = workers[0] if victim == "worker" and workers else psutil.Process(build.pid)
    delivered = build.poll() is None
    if delivered:
        with contextlib.suppress(psutil.Error):
            hit.kill()
    began = time.monotonic()
    with contextlib.suppress(subprocess.TimeoutExpired):
        build.wait(timeout=GRACE)
    while left_running(root) and time.monotonic() - began < GRACE:
        time.sleep(0.05)
    gone = None if left_running(root) else round(time.monotonic() - began, 1)
    return Row("kill worker" if hit.pid != build.pid else "kill build", phase, round(wait, 2), build.poll(), gone, delivered)


def files_of(root: Path) -> dict[str, str]:
    """Every file below outputs by name, and the sha256 of what is published."""
    shards = root / "outputs" / "shards"
    return {
        str(file.relative_to(root)): hashlib.sha256(file.read_bytes()).hexdigest() if file.is_relative_to(shards) else ""
        for file in sorted((root / "outputs").rglob("*"))
        if file.is_file()
    }


def build_stops(root: Path, moments: int, rng: random.Random, log: Path) -> list[Row]:
    params = yaml.safe_load((root / "params.yaml").read_text())
    params["data"]["shard_samples"] = SHARD_SAMPLES
    params["data"]["parts"][PART]["samples"] = PART_SAMPLES
    (root / "params.yaml").write_text(yaml.safe_dump(params))
    build = start_build(root, log)
    lasted = phase_seconds(root, build)
    if build.returncode != 0:
        sys.exit(f"the undisturbed build failed:\n{log.read_text()[-2000:]}")
    expected = files_of(root)
    print("seconds a phase: " + "  ".join(f"{phase} {seconds:.2f}" for phase, seconds in lasted.items()), flush=True)
    rows: list[Row] = []
    for turn in range(moments):
        phase, victim = list(PHASES)[turn % len(PHASES)], "worker" if turn % 3 == 2 else "build"
        shutil.rmtree(root / "outputs" / "runs")
        if turn % 2:
            shutil.rmtree(root / "outputs" / "shards" / PART)
        row = kill_build(root, phase, victim, rng.uniform(0.0, 0.9) * lasted[phase], log)
        code = start_build(root, log).wait()
        found = files_of(root)
        row.survived = row.delivered and row.gone_s is not None and code == 0 and found == expected
        if not row.survived:
            differ = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
            print(f"after {row}: exit code {code}; files that differ: {differ[:10]}", flush=True)
        rows.append(row)
        print_rows([row], head=turn == 0)
    return rows


def outputs_of(root: Path) -> dict:
    lock = yaml.safe_load((root / "dvc.lock").read_text())["stages"]
    return {name: [(out["path"], out["md5"]) for out in stage["outs"]] for name, stage in lock.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--stages", nargs="+", default=list(STAGES), choices=STAGES)
    parser.add_argument("--moments", type=int, default=20, help="at which the build of a part is killed")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as scratch:
        if ways := [way for way in arguments.ways if way != "build"]:
            rows += recipe_stops(Path(scratch), ways, arguments.stages, rng)
        if "build" in arguments.ways:
            rows += build_stops(clone(Path(scratch) / "build"), arguments.moments, rng, Path(scratch) / "build.log")
    survived, stops = sum(row.survived for row in rows), sum(row.delivered for row in rows)
    print(f"{survived} of {stops} stops survived with the same bytes; {len(rows) - stops} came too late; goal: all")
    if arguments.json:
        arguments.json.write_text(json.dumps([vars(row) for row in rows], indent=1))
    sys.exit(0 if survived == stops else 1)


def recipe_stops(scratch: Path, ways: list[str], stages: list[str], rng: random.Random) -> list[Row]:
    rows: list[Row] = []
    base = clone(scratch / "base")
    run = start(base, scratch / "base.log")
    lives = lifetimes(base, run)
    if run.returncode != 0:
        sys.exit(f"the undisturbed run failed:\n{(scratch / 'base.log').read_text()[-2000:]}")
    expected = outputs_of(base)
    print("seconds a process: " + "  ".join(f"{stage} {life:.1f}" for stage, life in lives.items()), flush=True)
    for way in ways:
        root, log = clone(scratch / way), scratch / f"{way}.log"
        mine = [stop_in(root, stage, way, rng.uniform(0.0, 0.8) * lives[stage], log) for stage in stages]
        code = start(root, log).wait()
        same = code == 0 and outputs_of(root) == expected
        for row in mine:
            row.survived = same and row.delivered and row.gone_s is not None
        rows += mine
        print_rows(mine)
        if not same:
            print(f"{way}: exit code {code}; outputs {'equal' if code == 0 else 'incomplete'}\n{log.read_text()[-1500:]}", flush=True)
    return rows


def print_rows(rows: list[Row], head: bool = True) -> None:
    if head:
        print(f"{'way':<13} {'stage':<11} {'after s':>7} {'exit':>5} {'gone s':>7}  survived")
    for row in rows:
        gone = "-" if row.gone_s is None else f"{row.gone_s:.1f}"
        verdict = "yes" if row.survived else "NO" if row.delivered else "too late"
        print(f"{row.way:<13} {row.stage:<11} {row.after_s:>7.2f} {row.exit_code!s:>5} {gone:>7}  {verdict}", flush=True)


if __name__ == "__main__":
    main()
