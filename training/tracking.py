"""One MLflow run per stage and fingerprint: params, inputs by digest, curves, pictures. Silent on other ranks than the first."""

import json
import logging
import os
import platform
import shutil
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from runtime.environment import git_state, installed_packages, instructions, packages_digest
from runtime.exits import Interrupted
from runtime.files import sha256_file, tensors_digest
from runtime.run_folder import claimed, step_of
from runtime.stage import DAGSTER_RUN, EXPERIMENT, StageRun, rank
from training.spool import Event, Sender, Spool
from training.stages import parent_of

ROWS, EVERY_S = 50, 30.0  # waiting rows that are written, and seconds after which fewer are
PAUSE_S, LONGEST_PAUSE_S = 30.0, 600.0  # after a failed attempt, doubled by each further one
SYSTEM_EVERY_S = 30.0
logger = logging.getLogger(__name__)


class Tracker:
    """What a stage tells MLflow. Everything goes to the run folder's spool first, and from there to the store when it answers.

    A store that can't be reached stops nothing: it costs the training one short attempt now and then. A resumed process goes on with the
    spool that its folder holds, and what was logged before is not logged twice: a metric's steps only rise.
    """

    def __init__(self, run: StageRun) -> None:
        self.run, self.active = run, rank() == 0
        if not self.active:
            return
        self.rows: list[Event] = []
        self.lock = threading.Lock()  # system metrics come from a thread of their own
        self.spool = Spool(run.folder)
        self.sender = Sender(run.root, run.folder, self.spool)
        self.last_step: dict[str, int] = {}
        self.tags: dict[str, str] = {}
        self.checkpoints_told: set[str] = set()
        self.measured: dict[int, int] = {}  # step -> time of its held-out row
        for event, _ in self.spool.read():
            self._remember(event)
        self.written, self.next_attempt, self.pause = time.monotonic(), 0.0, PAUSE_S
        self.waiting = False
        if self.spool.size == 0:
            self._describe()
        self.tag(**environment_tags(run), **caller_tags())
        self._add("status", status="RUNNING")
        self.flush()

    @property
    def run_id(self) -> str | None:
        """None until the store has once answered."""
        return self.sender.run_id if self.active else None

    @property
    def experiment_id(self) -> str | None:
        """None likewise."""
        return (self.sender.experiment_id or None) if self.active else None

    def _remember(self, event: Event) -> None:
        if event["kind"] == "metrics":
            self.last_step |= dict.fromkeys(event["values"], event["step"])
            if any(name.startswith("held_out/") for name in event["values"]):
                self.measured[event["step"]] = event["time"]
        elif event["kind"] == "tags":
            self.tags |= event["texts"]
        elif event["kind"] == "checkpoint":
            self.checkpoints_told.add(event["name"])

    def _add(self, kind: str, **facts: Any) -> None:
        event = {"kind": kind, "time": int(time.time() * 1000), **facts}
        with self.lock:
            self.rows.append(event)
            self._remember(event)

    def _describe(self) -> None:
        """The run itself, params of the stage, and its inputs by digest."""
        run = self.run
        sections = {key: run.values[key.split(".")[0]] for key in run.stage.params}
        inputs = {name.removeprefix("input "): digest for name, digest in run.digests.items() if name.startswith("input ")}
        name = f"{run.name} {run.fingerprint[:6]}"
        self._add("run", experiment=run.params.registry.experiment, name=name, token=uuid.uuid4().hex)
        self._add("params", texts={key: str(value)[:5000] for key, value in _flatten(sections)})
        self._add("inputs", digests=inputs)
        self.tag(
            stage=run.name,
            preset=run.params.preset,
            fingerprint=run.fingerprint,
            run_folder=str(run.folder.relative_to(run.root)),
            **{f"digest.{name}": digest for name, digest in run.digests.items()},
            **parent_tags(run),
            **{"mlflow.source.name": run.stage.cmd, "mlflow.source.type": "LOCAL", "mlflow.note.content": run.stage.desc},
        )

    def log(self, step: int, **values: float) -> None:
        """Metrics at optimizer step `step`; those that an earlier process logged for it are left out."""
        if not self.active:
            return
        fresh = {name: value for name, value in values.items() if step > self.last_step.get(name, -1)}
        if fresh:
            self._add("metrics", step=step, values=fresh)
        if len(self.rows) >= ROWS or time.monotonic() - self.written >= EVERY_S:
            self.flush()

    def back_to(self, step: int) -> None:
        """The training was rolled back to `step`: those after it are logged anew, and MLflow shows the newest last."""
        if self.active:
            self.last_step = {name: min(last, step) if not name.startswith("system/") else last for name, last in self.last_step.items()}

    def flush(self, now: bool = False) -> None:
        """Write what waits to the spool, on disk when this returns, and send the spool if the store answers.

        now: also where the pause after a failed attempt is not over.
        """
        if not self.active:
            return
        self.written = time.monotonic()
        with self.lock:
            rows, self.rows = self.rows, []
        try:
            if rows:
                self.spool.append(rows)
        except OSError as error:
            logger.warning("%s can't be written (%s): %d rows wait in memory", self.spool.path.name, error, len(rows))
            with self.lock:
                self.rows = rows + self.rows
            return
        if now or self.written >= self.next_attempt:
            self._send()

    def _send(self) -> None:
        try:
            self.sender.send()
        except Exception as error:  # whatever a store, a driver or a proxy raises: tracking is no reason to stop
            if not self.waiting:
                logger.warning("MLflow can't be reached (%s): what is logged waits in %s", error, self._place())
            self.waiting = True
            self.next_attempt, self.pause = time.monotonic() + self.pause, min(2 * self.pause, LONGEST_PAUSE_S)
            return
        if self.waiting:
            logger.warning("MLflow answers again: what waited is sent")
        self.waiting, self.next_attempt, self.pause = False, 0.0, PAUSE_S

    def _place(self) -> Path:
        return self.spool.path.relative_to(self.run.root)

    def picture(self, path: Path, folder: str = "pictures") -> None:
        """A PNG, kept beside the spool under its own name: `path` may move before the store answers."""
        if self.active:
            kept = self.run.folder / "pictures" / path.name
            kept.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, kept)
            self._add("picture", path=f"pictures/{path.name}", folder=folder)

    def checkpoints(self, folders: Sequence[Path], history: Sequence[dict[str, float]]) -> None:
        """Checkpoints that are not told yet, as logged models, with the held-out numbers of their step in `history`."""
        if not self.active:
            return
        for folder in folders:
            name, step = f"{self.run.name}-{folder.name}", step_of(folder)
            if name in self.checkpoints_told:
                continue
            row = next((row for row in reversed(history) if row["step"] == step), {})
            held_out = {key: value for key, value in row.items() if key.startswith("held_out/")}
            digest, uri = sha256_file(folder / "complete.json"), str(folder.relative_to(self.run.root))
            measured = self.measured.get(step, 0)  # with the time of the run's own row MLflow keeps one for both
            self._add("checkpoint", name=name, step=step, uri=uri, sha256=digest, values=held_out, measured=measured)

    def result(self, **values: float) -> None:
        """Final numbers, as metrics without a step."""
        self.log(0, **values)

    def tag(self, **texts: str) -> None:
        if self.active and (new := {name: text for name, text in texts.items() if self.tags.get(name) != text}):
            self._add("tags", texts=new)

    def end(self, status: str) -> None:
        if self.active:
            self._add("status", status=status)
            self.flush(now=True)
            if self.waiting:
                logger.warning(
                    "MLflow can't be reached: what was logged waits in %s; `python -m training replay` sends it once the store answers",
                    self._place(),
                )


@contextmanager
def track(run: StageRun) -> Iterator[Tracker]:
    """The stage's MLflow run: FINISHED, or KILLED and FAILED where the body raises."""
    tracker = Tracker(run)
    status = "FAILED"
    try:
        with system_metrics(tracker):
            yield tracker
        status = "FINISHED"
    except Interrupted:
        status = "KILLED"
        raise
    finally:
        tracker.end(status)
    run.report({"mlflow_run_id": tracker.run_id, "mlflow_experiment_id": tracker.experiment_id})


@contextmanager
def system_metrics(tracker: Tracker, every_s: float = SYSTEM_EVERY_S) -> Iterator[None]:
    """Log the machine's CPU, memory, disk, network and GPU now and then, under the names that MLflow's page of system metrics shows.

    MLflow's own thread writes to the store directly and ends at its first outage; here its monitors are read and the spool is written.
    """
    if not tracker.active:
        yield
        return
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

    monitors: list[Any] = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
    try:
        monitors.append(GPUMonitor())
    except Exception:  # no NVIDIA driver, or no package that reads it
        logger.debug("no GPU metrics", exc_info=True)
    over = threading.Event()

    def sample() -> None:
        step = 1 + max((step for name, step in list(tracker.last_step.items()) if name.startswith("system/")), default=-1)
        values: dict[str, float] = {}
        for monitor in monitors:
            monitor.collect_metrics()
            values |= {f"system/{name}": value for name, value in monitor.aggregate_metrics().items()}
            monitor.clear_metrics()
        tracker._add("metrics", step=step, values=values)

    def watch() -> None:
        try:
            while not over.wait(every_s):
                sample()
            sample()  # so that a short stage has one
        except Exception as error:
            logger.warning("system metrics end here: %s", error)

    thread = threading.Thread(target=watch, daemon=True, name="system-metrics")
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(5)


def attach(root: Path, folder: Path, files: Sequence[Path], place: str) -> None:
    """Files for the MLflow run of a finished run folder, as its artifacts under `place`. They wait in its spool where the store is away."""
    with claimed(folder) as free:
        if not free:
            logger.warning("%s: its stage is running, so %s is not logged to MLflow", folder.relative_to(root), place)
            return
        kept = folder / place
        kept.mkdir(exist_ok=True)
        for file in files:
            shutil.copyfile(file, kept / file.name)
        spool = Spool(folder)
        now = int(time.time() * 1000)
        spool.append([{"kind": "picture", "time": now, "path": f"{place}/{file.name}", "folder": place} for file in files])
        try:
            Sender(root, folder, spool).send()
        except Exception as error:  # as in Tracker: no reason to fail
            logger.warning("MLflow can't be reached (%s): %s waits in %s", error, place, spool.path.relative_to(root))


def caller_tags() -> dict[str, str]:
    """Who started this stage, where it was no person: the run of Dagster, its experiment, the experiment of DVC."""
    names = {"dagster.run_id": DAGSTER_RUN, "experimental": EXPERIMENT, "dvc.experiment": "DVC_EXP_NAME"}
    return {tag: os.environ[name] for tag, name in names.items() if os.environ.get(name)}


def environment_tags(run: StageRun) -> dict[str, str]:
    """Which commit, which packages, which of the CPU's instructions: the lock's sha256, the versions that decide numbers, and the digest of
    all that is installed."""
    import torch

    lock = run.root / "constraints.txt"
    facts = {
        "constraints": sha256_file(lock) if lock.exists() else "none",
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "instructions": instructions(),
    }
    return git_state(run.root) | facts | {"environment_digest": packages_digest(installed_packages())}


def parent_tags(run: StageRun) -> dict[str, str]:
    """The stage whose weights this one starts from, by the digest of its output and of its tensors; of no other stage anything."""
    parent = parent_of(run.name, run.params)
    if parent is None:
        return {}
    folder = f"outputs/{parent}"
    return {
        "parent_stage": parent,
        "parent_digest": run.digests[f"input {folder}"],
        "parent_model_digest": tensors_digest(run.root / folder / "model"),
    }


def _flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flatten(inner, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, json.dumps(value) if isinstance(value, list) else value
