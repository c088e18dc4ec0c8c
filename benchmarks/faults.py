"""Stop the smoke recipe at some moment of each stage, in each way, and show that it ends with the same bytes.

    python benchmarks/faults.py [--ways WAY ...] [--stages STAGE ...] [--moments N] [--seed N] [--state FOLDER] [--json FILE]

SIGINT, SIGTERM, SIGKILL, orchestrator: a clone runs once undisturbed, which also says how long each stage's process lives. Then, for each
way, another clone is stopped once in every stage, at a random moment of that life: the stage's own process gets the signal, or the
orchestrator above it gets SIGKILL. After the last, every output in dvc.lock must be the undisturbed run's.
build: the build of one larger part, with two workers, is killed at `--moments` random moments of its start, its chunks, its shards and its
publication: every third time one of its workers, else itself, and every other time over an older version that is published. After each
kill it runs to its end: every sha256 must be the undisturbed build's, and no file may be left over.
train, save, term, ranks, injected, worker, disk, mlflow, damage, twice: a training stage's own command, see train_faults.py.

After each stop nothing of the project may be left running. What is done is kept in `--state`, in a folder named by the code: the same
command started again goes on, with the same moments.
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
import time
from dataclasses import asdict
from pathlib import Path

import psutil
import yaml

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # not this folder, whose data.py would hide a room
from benchmarks import train_faults
from benchmarks.stops import (
    GRACE,
    REPO,
    Row,
    State,
    clone,
    left_running,
    log_end,
    print_counts,
    print_rows,
    process_of,
    seconds_until_gone,
    start,
    start_run,
)
from runtime.files import sha256_json, sha256_path

STAGES = ("foundation", "shards", "mixture", "alignment", "sft", "mr_grpo", "evaluation", "export")
RECIPE_WAYS = ("SIGINT", "SIGTERM", "SIGKILL", "orchestrator")
WAYS = (*RECIPE_WAYS, "build", *train_faults.WAYS)
CODE = ("data", "model", "training", "orchestration", "runtime", "presets/smoke.yaml", "dvc.yaml")
PHASES = {"start": "lock", "chunks": "shards/chunk-*.json", "shards": "shards/shard-*.json", "publish": "shards/manifest.json"}  # known by
PART, PART_SAMPLES, SHARD_SAMPLES = "drawn_image_edit", 3000, 60


def stage_process(root: Path, stage: str) -> psutil.Process | None:
    """The process of a stage's own command in `root`, if it runs."""
    words = {"export": "training export", "shards": "data shards", "mixture": "data mixture", "evaluation": "training evaluate"}
    return process_of(root, f"-m {words.get(stage, f'training {stage}')}")


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
    run = start_run(root, log)
    while (process := stage_process(root, stage)) is None:
        if run.poll() is not None:
            return Row(way, stage, "life", wait, run.returncode, 0.0, delivered=False)
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
    return Row(way, stage, "life", round(wait, 2), run.returncode, gone, delivered)


def outputs_of(root: Path) -> dict:
    lock = yaml.safe_load((root / "dvc.lock").read_text())["stages"]
    return {name: [[out["path"], out["md5"]] for out in stage["outs"]] for name, stage in lock.items()}


def undisturbed_recipe(state: State) -> dict:
    root, log = clone(state.empty("base")), state.folder / "base.log"
    run = start_run(root, log)
    lives = lifetimes(root, run)
    if run.returncode != 0:
        sys.exit(f"the undisturbed run failed:\n{log_end(log, 2000)}")
    return {"lives": lives, "outputs": outputs_of(root)}


def recipe_stops(state: State, ways: list[str], stages: list[str]) -> None:
    todo = [(way, [stage for stage in stages if not state.done(way, stage)]) for way in ways]
    for way, left in todo:
        if not left:
            continue
        base = state.remember("base", lambda: undisturbed_recipe(state))
        lives, rng = base["lives"], random.Random(f"{state.seed} {way}")
        waits = {stage: rng.uniform(0.0, 0.8) * lives[stage] for stage in STAGES}
        root, log = clone(state.empty(way)), state.folder / f"{way}.log"
        mine = [stop_in(root, stage, way, waits[stage], log) for stage in left]
        code = start_run(root, log).wait()
        same = code == 0 and outputs_of(root) == base["outputs"]
        for row in mine:
            row.survived = same and row.delivered and row.gone_s is not None
            row.why = "" if row.survived else f"exit code {code} at the end, outputs {'equal' if same else 'not equal'}"
        state.add(mine)
        if not same:
            print(log_end(log), flush=True)


def start_build(root: Path, log: Path) -> subprocess.Popen:
    return start(root, ["-m", "data", "shards", PART], log)


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
    gone = seconds_until_gone(root, build)
    victim = "worker" if hit.pid != build.pid else "build"
    return Row("build", "shards", f"{phase}, kill {victim}", round(wait, 2), build.poll(), gone, delivered)


def files_of(root: Path) -> dict[str, str]:
    """Every file below outputs by name, and the sha256 of what is published."""
    shards = root / "outputs" / "shards"
    return {
        str(file.relative_to(root)): hashlib.sha256(file.read_bytes()).hexdigest() if file.is_relative_to(shards) else ""
        for file in sorted((root / "outputs").rglob("*"))
        if file.is_file()
    }


def undisturbed_build(state: State) -> dict:
    root, log = clone(state.empty("build")), state.folder / "build.log"
    params = yaml.safe_load((root / "params.yaml").read_text())
    params["data"]["shard_samples"] = SHARD_SAMPLES
    params["data"]["parts"][PART]["samples"] = PART_SAMPLES
    (root / "params.yaml").write_text(yaml.safe_dump(params))
    build = start_build(root, log)
    lasted = phase_seconds(root, build)
    if build.returncode != 0:
        sys.exit(f"the undisturbed build failed:\n{log_end(log, 2000)}")
    return {"lasted": lasted, "files": files_of(root)}


def build_stops(state: State, moments: int) -> None:
    root, log = state.folder / "build", state.folder / "build.log"
    for turn in range(len(state.done("build")), moments):
        undisturbed = state.remember("build", lambda: undisturbed_build(state))
        expected, rng = undisturbed["files"], random.Random(f"{state.seed} build {turn}")
        phase, victim = list(PHASES)[turn % len(PHASES)], "worker" if turn % 3 == 2 else "build"
        shutil.rmtree(root / "outputs" / "runs", ignore_errors=True)
        if turn % 2:
            shutil.rmtree(root / "outputs" / "shards" / PART, ignore_errors=True)
        row = kill_build(root, phase, victim, rng.uniform(0.0, 0.9) * undisturbed["lasted"][phase], log)
        code = start_build(root, log).wait()
        found = files_of(root)
        row.survived = row.delivered and row.gone_s is not None and code == 0 and found == expected
        if not row.survived:
            differ = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
            row.why = f"exit code {code}; files that differ: {differ[:10]}"
        state.add([row])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--stages", nargs="+", default=list(STAGES), choices=STAGES)
    parser.add_argument("--moments", type=int, default=20, help="at which a build and each training stage are killed; half as many SIGTERM")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--state", type=Path, default=REPO / "outputs" / "benchmarks" / "faults")
    arguments = parser.parse_args()
    code = sha256_json([sha256_path(REPO / name) for name in CODE])
    state = State(arguments.state.resolve() / code[:12], arguments.seed)
    print_rows([row for row in state.rows if row.way in arguments.ways], head=True)
    recipe_stops(state, [way for way in arguments.ways if way in RECIPE_WAYS], arguments.stages)
    if "build" in arguments.ways:
        build_stops(state, arguments.moments)
    train_faults.stops(state, [way for way in arguments.ways if way in train_faults.WAYS], arguments.stages, arguments.moments)
    rows = [row for row in state.rows if row.way in arguments.ways]
    survived = print_counts(rows)
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    sys.exit(0 if survived else 1)


if __name__ == "__main__":
    main()
