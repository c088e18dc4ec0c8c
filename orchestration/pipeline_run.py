"""`deepgen run`: the whole pipeline without a browser, through the same job and the same Dagster instance that the UI shows."""

import fcntl
import os
import signal
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestration.alerts import tell_failures
from orchestration.budget import check_budget, describe
from orchestration.catalogue import check_catalogue
from orchestration.console import terminal_for_us
from orchestration.dvc import DvcCommand
from orchestration.stores import init_stores
from runtime import exits
from runtime.params import Params, load_params
from runtime.run_folder import holder_of, run_folders, writer_of

if TYPE_CHECKING:
    import dagster as dg

PIPELINE = "pipeline"
PROCESS_TAG = "deepgen/process"
LOG = Path("outputs/dagster/deepgen-run.log")


class AlreadyRunning(Exception):
    """Another `deepgen run` works on this clone."""


@dataclass
class Outcome:
    """How a run of the pipeline ended."""

    run_id: str
    interrupted: bool
    made: list[str] = field(default_factory=list)
    cached: list[str] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)

    @property
    def exit_code(self) -> int:
        if self.interrupted:
            return exits.INTERRUPTED
        return exits.FAILED if self.failures else exits.DONE


def run_pipeline(root: Path) -> Outcome:
    """Check params.yaml, then bring everything up to date.

    Raises:
        ParamsError: before anything is touched; of a part that the catalogue contradicts or refuses as well.
        AlreadyRunning: another one holds the lock.
        OverBudget: it would take more than params.yaml allows, or than the disk holds.
    """
    params = load_params(root / "params.yaml")
    check_catalogue(root, params)
    with only_one(root), own_instance(root, params) as instance:
        dvc = DvcCommand(root)
        if told := describe(check_budget(root, params, dvc)):
            print(told, flush=True)
        return execute(root, instance, dvc, PIPELINE, {})


@contextmanager
def own_instance(root: Path, params: Params) -> "Iterator[dg.DagsterInstance]":
    """The Dagster instance of this clone, made if need be, without runs whose process is gone."""
    init_stores(root, params.registry.experiment)
    import dagster as dg

    with dg.DagsterInstance.get() as instance:
        bury_dead_runs(instance)
        yield instance


def execute(root: Path, instance: "dg.DagsterInstance", dvc: DvcCommand, name: str, tags: Mapping[str, str]) -> Outcome:
    """Run a job of this project in this process, to its end."""
    from orchestration.definitions import build_definitions

    job = build_definitions(root, dvc).resolve_job_def(name)
    signal.signal(signal.SIGHUP, lambda *_: os.kill(os.getpid(), signal.SIGINT))  # a closed terminal is an interruption as well
    all_tags = {**tags, **partition_tags(job), PROCESS_TAG: process_name()}
    with terminal_for_us(root / LOG):
        result = job.execute_in_process(instance=instance, raise_on_error=False, tags=all_tags)
    outcome = read_outcome(result)
    tell_failures(root, instance, outcome)
    return outcome


def partition_tags(job: Any) -> dict[str, str]:
    """All parts of the data in this one run."""
    from dagster._core.storage.tags import ASSET_PARTITION_RANGE_END_TAG, ASSET_PARTITION_RANGE_START_TAG

    if job.partitions_def is None:
        return {}
    keys = job.partitions_def.get_partition_keys()
    return {ASSET_PARTITION_RANGE_START_TAG: keys[0], ASSET_PARTITION_RANGE_END_TAG: keys[-1]}


def read_outcome(result: "dg.ExecuteInProcessResult") -> Outcome:
    """What was made, what was up to date, and what failed in the words of whoever failed."""
    import dagster as dg

    interrupted = result.dagster_run.status in (dg.DagsterRunStatus.CANCELED, dg.DagsterRunStatus.CANCELING)
    outcome = Outcome(result.run_id, interrupted)
    read_events(outcome, result.all_events)
    if not result.success and not outcome.failures and not interrupted:
        outcome.interrupted = _ended_by_signal(result)
        if not outcome.interrupted:
            outcome.failures["run"] = f"failed; its log is {LOG}"
    return outcome


def read_events(outcome: Outcome, events: "Iterable[dg.DagsterEvent]") -> None:
    """Add what the events of a run tell."""
    import dagster as dg

    for event in events:
        if event.is_step_materialization:
            materialization = event.step_materialization_data.materialization
            name = "/".join(filter(None, (materialization.asset_key.to_user_string(), materialization.partition)))
            cached = materialization.metadata.get("cached")
            (outcome.cached if cached is not None and cached.value else outcome.made).append(name)
        elif event.event_type == dg.DagsterEventType.ASSET_CHECK_EVALUATION:
            check = event.asset_check_evaluation_data
            if not check.passed and check.severity == dg.AssetCheckSeverity.ERROR:
                outcome.failures[f"{check.asset_key.to_user_string()}: check {check.check_name}"] = check.description or "failed"
        elif event.is_step_failure and event.step_key is not None:
            _add_failure(outcome, event)


def _add_failure(outcome: Outcome, event: Any) -> None:
    data = event.step_failure_data
    said = data.user_failure_data
    if said is not None:
        code = said.metadata.get("exit_code")
        outcome.interrupted = outcome.interrupted or (code is not None and code.value == exits.INTERRUPTED)
        lines = said.metadata.get("last_lines")
        outcome.failures[event.step_key] = "\n".join(filter(None, (said.description, lines.value if lines is not None else None)))
    elif data.error is not None and data.error.cls_name != "DagsterAssetCheckFailedError":
        cause = data.error.cause or data.error
        if "DagsterExecutionInterruptedError" in (cause.cls_name, data.error.cls_name):  # Ctrl-C in a check, or in the registry
            outcome.interrupted = True
            return
        outcome.failures[event.step_key] = f"{cause.message.strip()} (the whole trace is in {LOG})"


def _ended_by_signal(result: "dg.ExecuteInProcessResult") -> bool:
    """Dagster calls a run failed if the signal came between two steps."""
    return any("interrupted" in (event.message or "").lower() for event in result.all_events if event.is_failure)


@contextmanager
def only_one(root: Path) -> Iterator[None]:
    """Hold the clone's run lock; the kernel frees it if this process dies."""
    path = root / "outputs" / "run.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            handle.seek(0)
            raise AlreadyRunning(
                f"`deepgen run` works on this clone already (process {handle.read().strip() or 'unknown'}); wait or stop it."
            ) from None
        handle.truncate(0)
        handle.write(str(os.getpid()))
        handle.flush()
        yield


def in_progress(root: Path, instance: "dg.DagsterInstance") -> str | None:
    """What works on this clone, in words: another `deepgen run`, a run of Dagster, a stage that `dvc repro` started; None if none."""
    import dagster as dg

    pid = holder_of(root / "outputs" / "run.lock")
    if pid not in (None, os.getpid()):
        return f"`deepgen run` is at work (process {pid})"
    bury_dead_runs(instance)
    status = dg.DagsterRunStatus
    statuses = [status.QUEUED, status.STARTING, status.STARTED, status.CANCELING]
    for run in instance.get_runs(dg.RunsFilter(statuses=statuses), limit=1):
        return f"run {run.run_id[:8]} of {run.job_name} is {run.status.value.lower()}"
    for folder in run_folders(root):
        if (writer := writer_of(folder)) is not None:
            return f"process {writer} writes {folder.relative_to(root)}"
    return None


def process_name() -> str:
    """This process, told from a later one that got the same number."""
    return f"{os.getpid()}:{_born(os.getpid())}"


def is_alive(process: str) -> bool:
    """Whether the process of this `process_name` still runs."""
    pid, _, born = process.partition(":")
    return _born(int(pid)) == born


def _born(pid: int) -> str | None:
    """Start time of a process in clock ticks since boot; None if there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return None


def bury_dead_runs(instance: "dg.DagsterInstance") -> None:
    """A killed `deepgen run` stays "started" in Dagster and keeps its places in the pools: mark it failed, and free them."""
    import dagster as dg

    for run in instance.get_runs(
        dg.RunsFilter(statuses=[dg.DagsterRunStatus.STARTED, dg.DagsterRunStatus.STARTING, dg.DagsterRunStatus.CANCELING])
    ):
        process = run.tags.get(PROCESS_TAG)
        if process and not is_alive(process):
            instance.report_run_failed(run, f"its process {process.partition(':')[0]} was killed; noticed {time.strftime('%H:%M:%S')}")
            instance.event_log_storage.free_concurrency_slots_for_run(run.run_id)
