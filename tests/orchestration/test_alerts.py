"""A failed run is told once: by the stage that failed, or else for the run."""

import json
from typing import Any

import dagster as dg
import pytest

from orchestration.definitions import build_definitions
from runtime import exits
from tests.orchestration.conftest import Toy
from tests.runtime.test_notices import server, web


def fail(toy: Toy, asset: str, instance: dg.DagsterInstance) -> dg.DagsterRun:
    """A run of one asset, as the UI starts it."""
    job = dg.define_asset_job("alone", dg.AssetSelection.assets(asset))
    definitions = dg.Definitions.merge(build_definitions(toy.root), dg.Definitions(jobs=[job]))
    result = definitions.resolve_job_def("alone").execute_in_process(instance=instance, raise_on_error=False)
    assert not result.success
    return result.dagster_run


def sense(toy: Toy, instance: dg.DagsterInstance, run: dg.DagsterRun) -> None:
    """The sensor's turn after a failed run."""
    (event,) = [entry.dagster_event for entry in instance.all_logs(run.run_id, of_type=dg.DagsterEventType.RUN_FAILURE)]
    assert event is not None
    sensor = build_definitions(toy.root).resolve_sensor_def("run_failed")
    sensor(dg.build_run_status_sensor_context("run_failed", event, instance, run).for_run_failure())


def told(seen: list[Any]) -> list[str]:
    return [json.loads(body)["stage"] for _, _, body in seen]


def test_what_fails_outside_of_a_stage_is_told_once_for_the_run(toy: Toy):
    handler, seen = web()
    with server(handler) as port, dg.DagsterInstance.ephemeral() as instance:
        toy.edit("webhook: null", f"webhook: http://127.0.0.1:{port}/hook")
        run = fail(toy, "champion", instance)  # there is no challenger
        for _ in range(2):
            sense(toy, instance, run)
    assert told(seen) == [f"run {run.run_id[:8]} of alone"]
    assert "there is no challenger" in json.loads(seen[0][2])["message"]


def test_a_stage_that_told_of_itself_is_not_told_again_and_one_that_was_killed_is(with_shards: Toy, monkeypatch: pytest.MonkeyPatch):
    toy = with_shards
    handler, seen = web()
    with server(handler) as port, dg.DagsterInstance.ephemeral() as instance:
        toy.edit("webhook: null", f"webhook: http://127.0.0.1:{port}/hook")
        monkeypatch.setenv("TOY_FAIL", "alignment")
        run = fail(toy, "alignment", instance)
        sense(toy, instance, run)
        assert told(seen) == ["alignment"]
        toy.edit("        sys.exit(7)", "        os.kill(os.getpid(), 9)", file="toy.py")
        run = fail(toy, "alignment", instance)
        sense(toy, instance, run)
        assert told(seen)[1:] == [f"run {run.run_id[:8]} of alone"]
        message = json.loads(seen[1][2])["message"]
        assert "killed (SIGKILL)" in message and "the last words of a failing stage" not in message


def test_without_an_address_nothing_is_sent_and_the_sensor_may_stay_on(toy: Toy):
    sensor = build_definitions(toy.root).resolve_sensor_def("run_failed")
    assert sensor.default_status == dg.DefaultSensorStatus.RUNNING
    with dg.DagsterInstance.ephemeral() as instance:
        run = fail(toy, "champion", instance)
        sense(toy, instance, run)
        found = instance.get_run_by_id(run.run_id)
        assert found is not None and "deepgen/told" not in found.tags


@pytest.mark.slow
def test_deepgen_run_tells_of_what_fails_and_the_sensor_does_not_again(toy: Toy):
    handler, seen = web()
    (toy.root / "toy.py").unlink()  # no stage gets as far as to tell
    with server(handler) as port:
        toy.edit("webhook: null", f"webhook: http://127.0.0.1:{port}/hook")
        assert toy.deepgen("run").returncode == exits.FAILED
        with dg.DagsterInstance.from_config(str(toy.root / "outputs" / "dagster")) as instance:
            (run,) = instance.get_runs()
            sense(toy, instance, run)
    assert told(seen) == [f"run {run.run_id[:8]} of pipeline"]
