"""A stage's own command, run as a process through Dagster Pipes: its lines streamed, its exit code put into words."""

import os
import shlex
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from subprocess import PIPE, STDOUT, Popen, TimeoutExpired
from typing import IO, Any

import dagster as dg
from dagster._core.errors import DagsterExecutionInterruptedError

from orchestration.console import say
from orchestration.tail import Context, tailing
from runtime import exits
from runtime.recipe import Stage
from runtime.run_folder import command_for, last_whole_checkpoint
from runtime.stage import DAGSTER_RUN

LAST_LINES = 20
LAST_BYTES = 4000
SAVE_SECONDS = 120  # a checkpoint may take a while to write

MEANINGS = {
    exits.BAD_PARAMS: "params.yaml can't be used",
    exits.INPUTS_CHANGED: "params, inputs or code changed while it ran; what it made is kept, and not recorded",
    exits.LOCKED: "another process is running this stage",
    exits.INTERRUPTED: "interrupted; its state is saved",
    exits.HUNG: "a rank took no step for launch.hang_seconds; its stacks are in hang-rank*.txt of the run folder",
    exits.UNREACHABLE: "a store did not answer",
    -signal.SIGKILL: "killed (SIGKILL): often the machine ran out of memory",
    128 + signal.SIGKILL: "killed (SIGKILL): often the machine ran out of memory",
}
PASSING = {exits.HUNG, exits.UNREACHABLE, -signal.SIGKILL, 128 + signal.SIGKILL}  # the same command may go through the next time


class StageFailed(Exception):
    """A stage command ended with a code other than 0. `checkpoint` is the last whole one of its run folder, if it has any."""

    def __init__(self, stage: Stage, code: int, lines: list[str], checkpoint: Path | None = None) -> None:
        self.stage, self.code, self.lines, self.checkpoint = stage, code, lines, checkpoint
        verb = "goes on from there" if code == exits.INTERRUPTED else "tries again, from its last checkpoint if it has one"
        meaning = MEANINGS.get(code, f"failed with exit code {code}")
        super().__init__(f"{stage.name}: {meaning}. `deepgen run` {verb}; alone: `dvc repro --single-item {stage.name}`.")

    @property
    def tail(self) -> str:
        return "\n".join(self.lines)[-LAST_BYTES:]

    @property
    def metadata(self) -> dict[str, Any]:
        """What the page of the failed run shows."""
        return {
            "exit_code": self.code,
            "last_lines": dg.MetadataValue.md(f"```\n{self.tail}\n```"),
            "last_checkpoint": dg.MetadataValue.path(str(self.checkpoint)) if self.checkpoint else "none",
            "command": command_for(self.stage.name),
        }


def command_of(stage: Stage) -> list[str]:
    """The stage's command, with `python` meaning this interpreter, whatever PATH says."""
    first, *rest = shlex.split(stage.cmd)
    return [sys.executable if first in ("python", "python3") else first, *rest]


class StageProcess(dg.PipesSubprocessClient):
    """PipesSubprocessClient that keeps the last lines, and stops the stage gracefully.

    The stage gets a session of its own, so that Ctrl-C at the terminal reaches it once, from here, and not twice. It is started by the
    calling thread: when that thread dies, by SIGKILL too, the kernel tells the stage (`runtime.exits.exit_with_parent`).
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        super().__init__(cwd=str(root), forward_termination=True, termination_timeout_seconds=SAVE_SECONDS)

    def run_stage(self, context: dg.AssetExecutionContext, stage: Stage) -> dict[str, Any]:
        """Run to the end and return the metadata that the stage reported, as Dagster metadata values.

        Raises:
            StageFailed: exit code other than 0.
        """
        with dg.open_pipes_session(context, self.context_injector, self.message_reader, extras={"stage": stage.name}) as session:
            self.run_plainly(context, stage, session.get_bootstrap_env_vars())
        return {name: value for result in session.get_results() for name, value in (result.metadata or {}).items()}

    def run_plainly(self, context: Context, stage: Stage, environment: Mapping[str, str]) -> None:
        """Run to the end, with more in its environment; of what it reports nothing is kept.

        Raises:
            StageFailed: exit code other than 0.
        """
        process = Popen(
            command_of(stage),
            cwd=self.cwd,
            env=os.environ | environment | {"PYTHONUNBUFFERED": "1", "PATH": _path(), DAGSTER_RUN: context.run_id},
            stdout=PIPE,
            stderr=STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        lines: deque[str] = deque(maxlen=LAST_LINES)
        assert process.stdout is not None, "stdout is a pipe"
        pump = threading.Thread(target=_pump, args=(process.stdout, lines), daemon=True, name=f"{stage.name}-lines")
        pump.start()
        with tailing(context, self.root, stage, process.pid) as tail:
            try:
                code = process.wait()
            except DagsterExecutionInterruptedError:
                _mark_canceling(context)
                self._stop(process, stage)
                raise
            finally:
                pump.join(timeout=5)
        if code != exits.DONE:
            raise StageFailed(stage, code, list(lines), last_whole_checkpoint(tail.folder) if tail.folder else None)

    def _stop(self, process: "Popen[str]", stage: Stage) -> None:
        say(f"{stage.name}: stopping; it finishes its step and saves (up to {SAVE_SECONDS} s)")
        process.send_signal(signal.SIGINT)
        try:
            process.wait(timeout=self.termination_timeout_seconds)
        except (TimeoutExpired, DagsterExecutionInterruptedError):
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _pump(stream: IO[str], lines: deque[str]) -> None:
    for line in stream:
        lines.append(line.rstrip("\n"))
        say(lines[-1])


def pause(context: Context, seconds: float) -> None:
    """Wait inside the step: there Ctrl-C and the UI's Terminate are heard. Dagster's own wait before a retry is deaf to them."""
    try:
        time.sleep(seconds)
    except DagsterExecutionInterruptedError:
        _mark_canceling(context)
        raise


def _mark_canceling(context: Context) -> None:
    """So that Dagster calls an interrupted run canceled, not failed."""
    run = context.instance.get_run_by_id(context.run_id)
    if run is not None and run.status == dg.DagsterRunStatus.STARTED:
        context.instance.report_run_canceling(run)


def _path() -> str:
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
