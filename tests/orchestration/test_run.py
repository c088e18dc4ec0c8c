"""`deepgen run` as a person meets it: to the end, again, interrupted, killed, refused."""

import json
import os
import signal
import subprocess
import time
from types import SimpleNamespace

import dagster as dg
import pytest

from orchestration.pipeline_run import Outcome, _add_failure
from runtime import exits
from tests.orchestration.conftest import Toy, stage_processes, stop, wait_until

pytestmark = pytest.mark.slow


def test_a_run_goes_from_data_to_champion_and_closes_with_what_was_reached(finished: Toy):
    said = (finished.root / "first_run.txt").read_text()
    assert "alignment: step 4" in said, "the stage's own lines reach the terminal"
    assert "champion: version 1 is champion" in said
    for words in ("loss 1 -> 0.5", "0.500 [0.200, 0.800] n 8", "make ui", "deepgen generate"):
        assert words in said
    assert "STEP_START" not in said, "Dagster's own chatter stays in its log"


def test_after_a_run_dvc_and_a_second_run_find_nothing_to_do(copy: Toy):
    status = subprocess.run([os.environ["DVC_BIN"], "status", "--json"], cwd=copy.root, capture_output=True, text=True, check=True)
    assert json.loads(status.stdout or "{}") == {}
    done = copy.deepgen("run")
    assert done.returncode == exits.DONE and "nothing to do" in done.stdout
    assert "version 1 is champion already" in done.stdout


def test_a_run_is_shown_by_the_dagster_instance_of_the_clone(finished: Toy):
    with dg.DagsterInstance.from_config(str(finished.root / "outputs" / "dagster")) as instance:
        (run,) = instance.get_runs()
        assert run.job_name == "pipeline" and run.status == dg.DagsterRunStatus.SUCCESS
        assert instance.get_materialized_partitions(dg.AssetKey("shards")) == set(finished.params.data.parts)
        event = instance.get_latest_materialization_event(dg.AssetKey("sft"))
        assert event is not None and event.asset_materialization is not None
        assert event.asset_materialization.tags["dagster/data_version"] == finished.dvc.recorded()["sft"]


def test_ctrl_c_saves_and_the_same_command_goes_on_and_a_second_one_is_refused_meanwhile(with_shards: Toy):
    toy = with_shards
    toy.edit("steps: 4\n", "steps: 40\n")
    first = toy.start("run", TOY_SECONDS="1")
    toy.wait_for("alignment: step 2")
    second = toy.deepgen("run")
    assert second.returncode == exits.LOCKED and f"process {first.pid}" in second.stderr
    assert stop(first) == exits.INTERRUPTED
    assert "interrupted; finished parts are kept" in toy.log and not stage_processes(toy.root)
    steps = saved_step(toy)
    assert steps >= 2 and f"stopped at step {steps} of 40" in toy.log
    (toy.root / "run.log").unlink()
    again = toy.start("run", TOY_SECONDS="1")
    toy.wait_for(f"alignment: from step {steps}\n")
    assert stop(again, signal.SIGTERM) == exits.INTERRUPTED


def test_sigkill_of_the_run_leaves_no_orphan_and_the_next_run_goes_on(with_shards: Toy):
    toy = with_shards
    toy.edit("steps: 4\n", "steps: 40\n")
    killed = toy.start("run", TOY_SECONDS="2.5")  # longer than the watch of the parent takes to notice
    toy.wait_for("alignment: step 2")
    assert len(stage_processes(toy.root)) == 1
    killed.kill()
    killed.wait()
    began = time.monotonic()
    wait_until(lambda: not stage_processes(toy.root), 8, "the stage to notice that its parent is gone")
    assert time.monotonic() - began < 5
    steps = saved_step(toy)
    assert steps >= 2, "though nobody read its lines any more, it saved before it ended"
    again = toy.start("run", TOY_SECONDS="0.4")
    toy.wait_for(f"alignment: from step {steps}\n")
    with dg.DagsterInstance.from_config(str(toy.root / "outputs" / "dagster")) as instance:
        states = [run.status for run in instance.get_runs()]  # newest first
    assert states == [dg.DagsterRunStatus.STARTED, dg.DagsterRunStatus.FAILURE], "the killed run is not shown as running for ever"
    assert stop(again) == exits.INTERRUPTED


def test_ctrl_c_is_heard_while_a_killed_stage_waits_for_its_next_try(with_shards: Toy):
    toy = with_shards
    run = toy.start("run", TOY_KILL="alignment")
    toy.wait_for("Tried again in 30 s, 1 of 2.", 240)
    assert stop(run) == exits.INTERRUPTED
    assert "interrupted; finished parts are kept" in toy.log
    assert "alignment: from step 2" not in toy.log, "there was no next try"


def saved_step(toy: Toy) -> int:
    """What the interrupted alignment stage saved."""
    (state,) = (toy.root / "outputs" / "runs" / "alignment").glob("*/step.json")
    return int(json.loads(state.read_text())["step"])


def test_a_failed_stage_is_told_at_the_end_and_the_exit_code_says_so(with_shards: Toy):
    done = with_shards.deepgen("run", TOY_FAIL="alignment")
    assert done.returncode == exits.FAILED
    assert "failed: alignment" in done.stderr and "exit code 7" in done.stderr and "the last words of a failing stage" in done.stderr


def test_impossible_params_stop_before_anything_is_touched(toy: Toy):
    toy.edit("steps: 4\n", "steps: -4\n")
    done = toy.deepgen("run")
    assert done.returncode == exits.BAD_PARAMS
    assert "alignment.steps" in done.stderr and "Traceback" not in done.stderr
    assert not (toy.root / "outputs").exists()


def test_ctrl_c_outside_of_a_stage_is_an_interruption_and_no_failure():
    error = SimpleNamespace(cls_name="DagsterExecutionInterruptedError", cause=None, message="")
    outcome = Outcome("run", interrupted=False)
    _add_failure(outcome, SimpleNamespace(step_key="challenger", step_failure_data=SimpleNamespace(user_failure_data=None, error=error)))
    assert outcome.exit_code == exits.INTERRUPTED
    assert not outcome.failures
