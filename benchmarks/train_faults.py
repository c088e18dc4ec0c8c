"""The ways of faults.py that stop a training stage's own command, `python -m training STAGE`, in a project whose other stages are made.

train: SIGKILL at random moments of its life, of its steps, of a save and of its publication.
save: SIGKILL at each named point of a save.
term: SIGTERM at random moments; it must end with 75, or with 0 after its last step.
ranks: SIGKILL of one of two ranks, or of the launcher above them, or SIGTERM to it; all end in bounded time.
injected: a loss, gradient or input that is no number, on one rank of two: no weight changes, both act alike and log the samples.
worker: SIGKILL of the Dagster run above it. `deepgen run` executes its stages' assets in its own process: it is the worker.
disk: RLIMIT_FSIZE lets the middle of a save fail; it must say so, leave no half and keep what is before it.
mlflow: the MLflow server is killed while it trains and started again; every row must be there once.
damage: each file of the newest checkpoint is cut, flipped or deleted; it must name the bad one and go on from the one before.
twice: it is started twice at once; the second must be refused.

A process is seconds of imports, so one run is stopped several times in a row, each time further on, and then ends undisturbed: weights and
history must be, bit for bit, those of a run that was never stopped, and nothing half may be left beside them.
"""

import contextlib
import json
import os
import random
import resource
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import yaml

from benchmarks.stops import GRACE, Row, State, clone, left_running, log_end, process_of, seconds_until_gone, start, start_run
from runtime.exits import FAILED, INTERRUPTED, LOCKED
from runtime.files import read_json, tensors_digest

STAGES = ("alignment", "sft", "mr_grpo")
WAYS = ("train", "save", "term", "ranks", "injected", "worker", "disk", "mlflow", "damage", "twice")
POINTS = ("before_write", "after_files", "before_rename", "after_rename")
AIMS = ("life", "steps", "save", "life", "publish")  # what a moment is drawn from, in the order of a chain
SAVE_SPREAD = 0.05  # seconds after a save has begun, in which it is hit
LONGEST = 300.0  # seconds that an undisturbed process may take
BEFORE = (
    *(f"data shards {part}_{task}" for part in ("drawn", "evaluation") for task in ("text_to_image", "image_edit")),
    *(f"data mixture {stage}" for stage in STAGES),
    "training foundation",
    "training latents",
)
RECORDED = ("shards", "mixture", "foundation", "latents")  # what these are in dvc.lock


def settings(params: dict[str, Any]) -> None:
    """Short steps, more saves than the smoke preset has, and all that a checkpoint may hold: an average, dropout's generator."""
    for stage in ("alignment", "sft"):
        params["mixture"][stage]["ratio"] = {"image_edit": 1, "text_to_image": 1}
    params["alignment"] |= {"steps": 6, "batch_size": 4, "checkpoint_every": 2, "ema_decay": 0.9, "validate_every": 0}
    params["sft"] |= {"steps": 4, "batch_size": 4, "checkpoint_every": 1, "validate_every": 0}
    params["sft"]["lora"]["dropout"] = 0.1
    params["mr_grpo"] |= {"steps": 3, "group_size": 2, "checkpoint_every": 1}
    for task in ("image_edit", "text_to_image"):
        params["data"]["parts"][f"evaluation_{task}"]["samples"] = 2
    params["launch"]["threads"] = 1  # so narrow a model is no faster on two


def on_two_ranks(params: dict[str, Any]) -> None:
    params["launch"] |= {"processes": 2, "hang_seconds": 60}
    for stage in ("alignment", "sft"):
        params[stage]["micro_batch_size"] = 1
    params["mr_grpo"]["micro_batch_size"] = 2


def edit(root: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    params = yaml.safe_load((root / "params.yaml").read_text())
    change(params)
    (root / "params.yaml").write_text(yaml.safe_dump(params))
    return root


class Trials:
    """Copies of one prepared project, and what an undisturbed run of each stage gave."""

    def __init__(self, state: State) -> None:
        self.state, self.log = state, state.folder / "train.log"
        self.prepared = state.folder / "prepared"
        self.undisturbed: dict[str, Any] = state.remember("prepared", self._prepare)
        self.on_ranks: dict[str, Any] = {}

    def _prepare(self) -> dict[str, Any]:
        root = edit(clone(self.state.empty("prepared")), settings)
        for command in BEFORE:
            self._must(start(root, ["-m", *command.split()], self.log).wait(), command)
        return {stage: self._measure(root, stage) for stage in STAGES}

    def _must(self, code: int, what: str) -> None:
        if code != 0:
            sys.exit(f"{what}: exit code {code}\n{log_end(self.log, 3000)}")

    def _measure(self, root: Path, stage: str) -> dict[str, Any]:
        """What a stage gives that nobody stops, and when its steps, its publication and its end come, in seconds."""
        process = self.start(root, stage)
        began, wall = time.monotonic(), time.time()
        entered: dict[str, float] = {}
        while process.poll() is None:
            for aim in ("steps", "publish"):
                if aim not in entered and shows(root, stage, aim, process.pid, wall):
                    entered[aim] = time.monotonic() - began
            time.sleep(0.05)
        self._must(process.returncode, f"undisturbed {stage}")
        return {"life": time.monotonic() - began, **entered, "result": result_of(root, stage)}

    def two_ranks(self, stage: str) -> dict[str, Any]:
        def measure() -> dict[str, Any]:
            return self._measure(edit(self.copy(stage), on_two_ranks), stage)

        return self.state.remember(f"two_ranks_{stage}", measure)

    def copy(self, stage: str) -> Path:
        """The prepared project as it was before `stage` first ran."""
        root = self.state.empty("work")
        shutil.copytree(self.prepared, root, symlinks=True, ignore=shutil.ignore_patterns("runs"))
        for later in STAGES[STAGES.index(stage) :]:
            shutil.rmtree(root / "outputs" / later)
        return root

    def start(self, root: Path, stage: str, **more: Any) -> subprocess.Popen:
        return start(root, ["-m", "training", stage], self.log, **more)

    def ends_the_same(self, root: Path, stage: str, undisturbed: dict[str, Any] | None = None) -> str:
        """Run `stage` to its end; empty where it ends as the undisturbed run did, else how it does not."""
        process = self.start(root, stage)
        try:
            code = process.wait(timeout=LONGEST)
        except subprocess.TimeoutExpired:
            process.kill()
            return f"still running after {LONGEST:.0f} s"
        if code != 0:
            return f"exit code {code} at the end: {log_end(self.log, 300)!r}"
        return self.is_the_same(root, stage, undisturbed)

    def is_the_same(self, root: Path, stage: str, undisturbed: dict[str, Any] | None = None) -> str:
        if result_of(root, stage) != (undisturbed or self.undisturbed[stage])["result"]:
            return "ended with other weights or another history"
        if left := [*leftovers(root), *left_running(root)]:
            return f"left {left[:3]}"
        return ""


def result_of(root: Path, stage: str) -> list[str]:
    folder = root / "outputs" / stage
    return [tensors_digest(folder / "model"), (folder / "history.json").read_text()]


def leftovers(root: Path) -> list[str]:
    """Halves of files and folders that no process will finish."""
    return [str(path.relative_to(root)) for pattern in (".*.tmp", ".*.old") for path in (root / "outputs").rglob(pattern)]


def run_folder(root: Path, stage: str) -> Path | None:
    return next((root / "outputs" / "runs" / stage).glob("*/"), None)


def steps_saved(root: Path, stage: str) -> list[str]:
    folder = run_folder(root, stage)
    return sorted(path.name for path in folder.glob("step-*")) if folder else []


def ranks_of(launcher: int) -> list[psutil.Process]:
    with contextlib.suppress(psutil.Error):
        return sorted(
            (child for child in psutil.Process(launcher).children() if "RANK" in child.environ()),
            key=lambda child: int(child.environ()["RANK"]),
        )
    return []


def shows(root: Path, stage: str, aim: str, pid: int, wall: float) -> bool:
    """Whether process `pid` (with several ranks, the first of its children), started at `wall`, has come to its steps, a save, its end."""
    folder = run_folder(root, stage)
    if folder is None:
        return False
    if aim == "save":
        return any(folder.glob(".step-*.tmp"))
    if aim == "publish":
        return (folder / "out").is_dir() and (folder / "out").stat().st_mtime > wall
    with contextlib.suppress(psutil.Error):
        writer = next(iter(ranks_of(pid)), psutil.Process(pid))
        return any(file.path.endswith("progress.jsonl") for file in writer.open_files())
    return False


def wait_for(root: Path, stage: str, aim: str, share: float, process: subprocess.Popen, lasts: dict[str, Any]) -> float:
    """Wait until a moment of `process`, `share` of the way through what `aim` names; the seconds that this took."""
    began, wall = time.monotonic(), time.time()
    spans = {
        "life": lasts["life"],
        "steps": lasts["publish"] - lasts["steps"],
        "save": SAVE_SPREAD,
        "publish": lasts["life"] - lasts["publish"],
    }
    while aim != "life" and process.poll() is None and not shows(root, stage, aim, process.pid, wall):
        time.sleep(0.001 if aim == "save" else 0.01)
    end = time.monotonic() + share * spans[aim]
    while process.poll() is None and time.monotonic() < end:
        time.sleep(max(0.0, min(0.02, end - time.monotonic())))
    return time.monotonic() - began


def stop_once(trials: Trials, root: Path, stage: str, way: str, turn: int) -> Row:
    """Start the stage and kill it, or for `term` ask it to end, at the moment that `turn` names."""
    rng = random.Random(f"{trials.state.seed} {way} {stage} {turn}")
    aim, share = AIMS[turn % len(AIMS)], rng.uniform(0.0, 1.0 if turn % len(AIMS) else 0.9)
    process = trials.start(root, stage)
    after = wait_for(root, stage, aim, share, process, trials.undisturbed[stage])
    delivered = process.poll() is None
    process.send_signal(signal.SIGTERM if way == "term" else signal.SIGKILL)
    gone = seconds_until_gone(root, process)
    row = Row(way, stage, f"{turn} {aim} {share:.2f}", round(after, 2), process.returncode, gone, delivered)
    if gone is None:
        row.why = f"{left_running(root)} still there after {GRACE:.0f} s"
    elif way == "term" and not ended_as_asked(root, stage, process):
        row.why = f"exit code {process.returncode} after SIGTERM"
    return row


def ended_as_asked(root: Path, stage: str, process: subprocess.Popen) -> bool:
    """75 or, after the last step, 0; while it still imports, and has nothing to save, as any process ends."""
    folder = run_folder(root, stage)
    opened = folder is not None and (folder / "lock").exists() and (folder / "lock").read_text() == str(process.pid)
    return process.returncode in (0, INTERRUPTED) or (process.returncode == -signal.SIGTERM and not opened)


def chains(trials: Trials, way: str, stage: str, moments: int, length: int) -> None:
    """Stop a run up to `length` times, let it end, and again, until `moments` stops came before it ended."""
    state = trials.state
    while (met := sum(row.delivered for row in state.done(way, stage))) < moments and len(state.done(way, stage)) < 2 * moments:
        root, rows, first = trials.copy(stage), [], len(state.done(way, stage))
        while len(rows) < min(length, moments - met) and (not rows or rows[-1].exit_code != 0):
            rows.append(stop_once(trials, root, stage, way, first + len(rows)))
        finish(trials, root, stage, rows)


def finish(trials: Trials, root: Path, stage: str, rows: list[Row], undisturbed: dict[str, Any] | None = None) -> None:
    """The verdict over stops of one run: each was gone in time and ended as it should, and the rest ends the same."""
    wrong = trials.ends_the_same(root, stage, undisturbed)
    for row in rows:
        row.why = row.why or wrong
        row.survived = row.delivered and not row.why
    trials.state.add(rows)


def save_points(trials: Trials, stage: str) -> None:
    root, rows = trials.copy(stage), []
    for point in POINTS:
        began = time.monotonic()
        process = trials.start(root, stage, env={"DEEPGEN_FAULT": f"save:{point}"})
        code = process.wait(timeout=LONGEST)
        row = Row(
            "save", stage, point, round(time.monotonic() - began, 2), code, seconds_until_gone(root, process), code == -signal.SIGKILL
        )
        row.why = "" if row.delivered else f"exit code {code}"
        rows.append(row)
    finish(trials, root, stage, rows)


def lost_ranks(trials: Trials, stage: str) -> None:
    """Kill rank 0, rank 1 and the launcher in turn, then ask the launcher to end, each while they train."""
    undisturbed = trials.two_ranks(stage)
    root, rows = edit(trials.copy(stage), on_two_ranks), []
    for turn, what in enumerate(("kill rank 0", "kill rank 1", "kill launcher", "SIGTERM to launcher")):
        rng = random.Random(f"{trials.state.seed} ranks {stage} {turn}")
        process = trials.start(root, stage)
        after = wait_for(root, stage, "steps", rng.uniform(0.0, 0.3), process, undisturbed)
        ranks = ranks_of(process.pid)
        delivered = len(ranks) == 2 and process.poll() is None
        if delivered and "launcher" in what:
            process.send_signal(signal.SIGTERM if "SIGTERM" in what else signal.SIGKILL)
        elif delivered:
            ranks[turn].kill()
        gone = seconds_until_gone(root, process)
        ended = process.returncode in (0, INTERRUPTED) if "SIGTERM" in what else process.returncode != 0
        why = "" if gone is not None and ended else f"exit code {process.returncode}, {left_running(root)} still there"
        rows.append(Row("ranks", stage, what, round(after, 2), process.returncode, gone, delivered, why=why))
    finish(trials, root, stage, rows, undisturbed)


FAULTS = ("nan", "inf", "gradient nan", "gradient inf", "latents")  # each skipped once, and rolled back once
MICRO = 2  # micro-batches a step of alignment on two ranks


def injections(trials: Trials) -> None:
    """One fault in every second step on the second rank, then the same on the first with a rollback after each; at last one that stays."""
    for wrong_rank, rollback_after in ((1, 3), (0, 1)):
        root = edit(trials.copy("alignment"), lambda params, after=rollback_after: with_guard(params, rollback_after=after))
        # bad steps don't count: the n-th try of a step reads micro-batches n * MICRO to (n + 1) * MICRO - 1
        tries = [2 * index + 1 for index in range(len(FAULTS))]
        words = [f"{fault}:{wrong_rank}:{n * MICRO}:{(n + 1) * MICRO - 1}" for fault, n in zip(FAULTS, tries, strict=True)]
        code, gone, after = inject(trials, root, words)
        for fault, n in zip(FAULTS, tries, strict=True):
            why = f"exit code {code}" if code else judge(root, n * MICRO, wrong_rank, rollback_after == 1)
            moment = f"{fault}, rank {wrong_rank}{', rolled back' if rollback_after == 1 else ''}"
            trials.state.add([Row("injected", "alignment", moment, after, code, gone, True, not why, why)])
    root = edit(trials.copy("alignment"), lambda params: with_guard(params, stop_after=3))
    code, gone, after = inject(trials, root, ["nan:1:0:1000000"])
    ends = [read_json(root / f"end-rank{number}.json") for number in (0, 1)]
    told = "NonFiniteLoss: alignment: 3 bad steps in all" in log_end(trials.log, 20_000)
    why = "" if code and told and ends[0] == ends[1] and ends[0]["step"] == 0 else f"exit code {code}, {ends}"
    trials.state.add([Row("injected", "alignment", "nan that stays, rank 1", after, code, gone, True, not why, why)])


def with_guard(params: dict[str, Any], **guard: int) -> None:
    on_two_ranks(params)
    params["alignment"]["guard"] |= guard


def inject(trials: Trials, root: Path, faults: list[str]) -> tuple[int, float | None, float]:
    began = time.monotonic()
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "tests.training.faulty_rank"]
    process = start(root, [*launcher, *faults], trials.log, env={"OMP_NUM_THREADS": "1"})
    code = process.wait(timeout=LONGEST)
    return code, seconds_until_gone(root, process), round(time.monotonic() - began, 2)


def judge(root: Path, micro: int, wrong_rank: int, rolls_back: bool) -> str:
    """Whether the step that began with micro-batch `micro` was refused alike by both ranks, with its samples; empty where it was."""
    ends = [read_json(root / f"end-rank{number}.json") for number in (0, 1)]
    if ends[0] != ends[1]:
        return "the ranks ended differently"
    lines = [json.loads(line) for line in (run_folder(root, "alignment") / "guards.jsonl").read_text().splitlines()]
    mine = [line for line in lines if line["ranks"][0][0]["micro_batch"] == micro]
    if [line["decision"] for line in mine][:1] != ["skip"] or (rolls_back and mine[-1]["decision"] not in ("rollback", "no_rollback")):
        return f"decisions {[line['decision'] for line in mine]}"
    samples = [key for rank in mine[0]["ranks"] for row in rank for key in row["samples"]]
    if len(samples) != 2 * MICRO or not all(samples):
        return f"{len(samples)} samples in the log"
    trail = {entry["micro_batch"]: entry for entry in ends[0]["trail"]}  # the weights before each step
    before, after = trail[micro], trail[micro + MICRO]
    if after["step"] == before["step"]:
        return "" if after["weights"] == before["weights"] else "weights changed"
    earlier = [entry for entry in ends[0]["trail"] if entry["micro_batch"] <= micro and entry["step"] == after["step"]]
    return "" if rolls_back and earlier[-1]["weights"] == after["weights"] else "weights are not those of the step gone back to"


def dead_worker(trials: Trials, stage: str) -> None:
    """Kill `deepgen run` once while its stage starts and once in its steps. The stage saves, or is sent home, by itself."""
    root, rows = trials.copy(stage), []
    done = [*RECORDED, *STAGES[: STAGES.index(stage)]]
    dvc = [str(root / ".venv-dvc" / "bin" / "dvc"), "commit", "--force", *done]
    with trials.log.open("a") as out:
        subprocess.run(
            dvc, cwd=root, stdout=out, stderr=out, check=True, env=os.environ | {"PATH": f"{root / '.venv/bin'}:{os.environ['PATH']}"}
        )
    for turn, (aim, high) in enumerate((("life", 0.3), ("steps", 0.8))):
        rng = random.Random(f"{trials.state.seed} worker {stage} {turn}")
        began, wall = time.monotonic(), time.time()
        run = start_run(root, trials.log)
        while (process := process_of(root, f"-m training {stage}")) is None and run.poll() is None:
            time.sleep(0.05)
        while aim == "steps" and process is not None and process.is_running() and not shows(root, stage, aim, process.pid, wall):
            time.sleep(0.01)
        lasts = trials.undisturbed[stage]
        time.sleep(rng.uniform(0.0, high) * (lasts["life"] if aim == "life" else lasts["publish"] - lasts["steps"]))
        delivered = run.poll() is None and process is not None and process.is_running()
        after = round(time.monotonic() - began, 2)
        run.kill()
        gone = seconds_until_gone(root, run)
        why = "" if gone is not None else f"{left_running(root)} still there"
        rows.append(Row("worker", stage, f"kill deepgen run, {aim}", after, run.returncode, gone, delivered, why=why))
    finish(trials, root, stage, rows)


def full_disk(trials: Trials, stage: str) -> None:
    """The first save goes well; then files may grow to half of a checkpoint's largest, so that a later save fails in its middle."""
    root = trials.copy(stage)
    first = trials.start(root, stage, env={"DEEPGEN_FAULT": "save:after_rename"})
    first.wait(timeout=LONGEST)
    before = steps_saved(root, stage)
    sizes = [file.stat().st_size for file in (run_folder(root, stage) / before[-1]).iterdir()]
    half = max(sizes) // 2

    began = time.monotonic()
    whole = {"PYTHONDONTWRITEBYTECODE": "1"}  # Python would leave cut .pyc files behind, and never look at their size
    process = trials.start(root, stage, env=whole, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (half, half)))
    code = process.wait(timeout=LONGEST)
    gone, said = seconds_until_gone(root, process), log_end(trials.log, 5000)
    row = Row("disk", stage, f"files up to {half // 1000} kB", round(time.monotonic() - began, 2), code, gone)
    if code != FAILED or "CannotSave: checkpoint step-" not in said or f"goes on from {before[-1]}" not in said:
        row.why = f"exit code {code}: {said[-300:]!r}"
    elif steps_saved(root, stage) != before or any(run_folder(root, stage).glob(".step-*")):
        row.why = f"left {sorted(path.name for path in run_folder(root, stage).iterdir())}"
    finish(trials, root, stage, [row])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def mlflow_server(folder: Path, port: int) -> Iterator[subprocess.Popen]:
    """MLflow's own server as `deepgen ui` starts it, answering."""
    flags = ["--host", "127.0.0.1", "--port", str(port), "--workers", "1", "--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}"]
    command = [sys.executable, "-m", "mlflow", "server", *flags, "--artifacts-destination", str(folder / "artifacts")]
    quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    with (folder / "server.log").open("a") as log:
        server = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, start_new_session=True, env=os.environ | quiet)
    try:
        for _ in range(600):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1).close()
                break
            time.sleep(0.1)
        else:
            sys.exit(f"MLflow does not answer:\n{log_end(folder / 'server.log')}")
        yield server
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def lost_server(trials: Trials, stage: str) -> None:
    """Kill the server while the stage is in its steps; it is back before or after the stage's end, and `replay` sends what waits."""
    root, folder, port = trials.copy(stage), trials.state.empty("mlflow"), free_port()
    folder.mkdir()
    address = {"MLFLOW_TRACKING_URI": f"http://127.0.0.1:{port}"}
    rng = random.Random(f"{trials.state.seed} mlflow {stage}")
    with mlflow_server(folder, port):
        process = trials.start(root, stage, env=address)
        after = wait_for(root, stage, "steps", rng.uniform(0.1, 0.8), process, trials.undisturbed[stage])
    with mlflow_server(folder, port):
        code = process.wait(timeout=LONGEST)
        gone = seconds_until_gone(root, process)
        replayed = start(root, ["-m", "training", "replay"], trials.log, env=address).wait(timeout=LONGEST)
    row = Row("mlflow", stage, "kill the server, start it", round(after, 2), code, gone)
    if code or replayed:
        row.why = f"exit code {code}, of replay {replayed}: {log_end(trials.log, 300)!r}"
    row.why = row.why or rows_that_differ(folder / "mlflow.db", root, stage) or trials.is_the_same(root, stage)
    row.survived = not row.why
    trials.state.add([row])


def rows_that_differ(database: Path, root: Path, stage: str) -> str:
    """Whether the store holds one finished run with the history's losses, each once; empty where it does."""
    with contextlib.closing(sqlite3.connect(database)) as store:
        runs = store.execute("SELECT run_uuid, status FROM runs").fetchall()
        losses = store.execute("SELECT step, value FROM metrics WHERE key = 'loss' ORDER BY step").fetchall()
    expected = [(row["step"], row["loss"]) for row in read_json(root / "outputs" / stage / "history.json")]
    if len(runs) != 1 or runs[0][1] != "FINISHED":
        return f"runs in the store: {runs}"
    return "" if losses == expected else f"losses in the store: {losses}, of the run: {expected}"


def damaged_files(trials: Trials) -> None:
    """Each file of the newest of two checkpoints, cut to half, with one byte flipped, deleted."""
    state, stage = trials.state, "alignment"
    stopped = state.folder / "stopped"

    def stop() -> list[str]:
        root = trials.copy(stage)
        trials.start(root, stage, env={"DEEPGEN_FAULT": "save:after_rename:4"}).wait(timeout=LONGEST)
        shutil.move(root, state.empty("stopped"))
        return sorted(file.name for file in (run_folder(stopped, stage) / "step-000004").iterdir())

    tried = {row.moment for row in state.done("damage")}
    for name in state.remember("stopped", stop):
        for how in ("cut", "flipped", "deleted"):
            if f"{name} {how}" in tried:
                continue
            root = state.empty("work")
            shutil.copytree(stopped, root, symlinks=True)
            newest = run_folder(root, stage) / "step-000004"
            harm(newest / name, how)
            before, began = trials.log.stat().st_size, time.monotonic()
            wrong = trials.ends_the_same(root, stage)
            said = trials.log.read_text(errors="replace")[before:]
            named = "checkpoint step-000004 is damaged" in said and "going on from step 2" in said
            named &= name in said or name == "complete.json"  # a changed hash in it looks like damage of the file it is of
            if not wrong and not (named and newest.with_name("step-000004.bad").is_dir()):
                wrong = f"the bad one is not named: {said[:300]!r}"
            state.add([Row("damage", stage, f"{name} {how}", round(time.monotonic() - began, 2), 0, 0.0, True, not wrong, wrong)])


def harm(file: Path, how: str) -> None:
    content = bytearray(file.read_bytes())
    if how == "deleted":
        file.unlink()
    elif how == "cut":
        file.write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 2] ^= 1
        file.write_bytes(content)


def second_writer(trials: Trials, stage: str) -> None:
    root = trials.copy(stage)
    began = time.monotonic()
    pair = [trials.start(root, stage), trials.start(root, stage)]
    codes = sorted(process.wait(timeout=LONGEST) for process in pair)
    row = Row("twice", stage, "both at once", round(time.monotonic() - began, 2), codes[-1], seconds_until_gone(root, pair[0]))
    row.why = trials.is_the_same(root, stage) if codes == [0, LOCKED] else f"exit codes {codes}"
    row.survived = not row.why
    trials.state.add([row])


def stops(state: State, ways: list[str], stages: list[str], moments: int) -> None:
    """Whatever of `ways` is not done yet, for those of `stages` that train."""
    if not ways:
        return
    trials, mine = Trials(state), [stage for stage in STAGES if stage in stages]
    per_stage = {
        "save": save_points,
        "ranks": lost_ranks,
        "worker": dead_worker,
        "disk": full_disk,
        "mlflow": lost_server,
        "twice": second_writer,
    }
    for way in ways:
        for stage in mine:
            if way in ("train", "term"):
                count, length = (moments, len(AIMS)) if way == "train" else ((moments + 1) // 2, 3)
                chains(trials, way, stage, count, length)
            elif way in per_stage and not state.done(way, stage) and not (way == "ranks" and stage == "mr_grpo"):
                per_stage[way](trials, stage)
        if way == "injected" and not state.done(way):
            injections(trials)
        if way == "damage":
            damaged_files(trials)
