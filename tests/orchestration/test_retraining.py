"""The decision to train again: once for each pair of data and params, never silently not, and never twice at once."""

import subprocess
import sys
from dataclasses import replace
from typing import Any

import dagster as dg
import pytest

from orchestration.config import RetrainConfig
from orchestration.datasets import recipe_digest
from orchestration.definitions import build_definitions
from orchestration.pipeline_run import in_progress, only_one
from orchestration.retraining import CLAIM_SECONDS, RETRAIN_KEY, Launch, Made, Situation, Skip, ask, ask_only, decide, look
from orchestration.stores import init_stores
from runtime import exits
from runtime.files import read_json, write_json
from tests.orchestration.conftest import Toy

CHAMPION = Made("3", "data", "params", samples=50_000, age_days=2.0)
SAME = Situation("data", "params", 50_000, CHAMPION, RetrainConfig(min_new_samples=1000, max_age_days=30.0))


def with_champion(**change: Any) -> Situation:
    return replace(SAME, data_digest="new data", champion=replace(CHAMPION, **change))


@pytest.mark.parametrize(
    ("now", "words"),
    [
        (replace(SAME, champion=None), "there is no champion yet"),
        (replace(SAME, params_digest="other"), "params changed: the champion (version 3) was made with params, now other"),
        (replace(SAME, data_digest="new data", samples=51_000), "data changed from data to new data: 1,000 new samples"),
        (with_champion(age_days=30.0), "30.0 days old (retrain.max_age_days 30)"),
        (with_champion(samples=None), "does not say of how many samples"),
        (replace(SAME, data_digest="new data", samples=9, config=RetrainConfig(min_new_samples=0)), "0 new samples"),
    ],
)
def test_a_launch_says_why_with_the_numbers_and_digests_compared(now: Situation, words: str):
    decision = decide(now)
    assert isinstance(decision, Launch) and words in decision.reason and decision.key == now.key


@pytest.mark.parametrize(
    ("now", "words"),
    [
        (replace(SAME, samples=0), "no training shards have been built"),
        (SAME, "nothing changed: the champion (version 3) was made from data data and params params"),
        (replace(SAME, champion=replace(CHAMPION, age_days=400.0)), "nothing changed"),
        (replace(SAME, data_digest="new data", samples=50_999), "999 new samples (retrain.min_new_samples 1,000), and the champion"),
        (replace(SAME, data_digest="new data", samples=40_000), "0 new samples"),
        (replace(SAME, params_digest="other", earlier="run 1234 failed"), "params changed"),
        (replace(SAME, params_digest="other", earlier="run 1234 failed"), "but run 1234 failed"),
        (replace(SAME, params_digest="other", busy="run 5678 is started"), "but run 5678 is started"),
        (replace(SAME, params_digest="other", over_budget=("budget.max_hours: predicted 9",)), "budget.max_hours: predicted 9"),
    ],
)
def test_a_skip_says_why_with_the_numbers_and_digests_compared(now: Situation, words: str):
    decision = decide(now)
    assert isinstance(decision, Skip) and words in decision.reason


def test_schedule_and_sensor_are_off_until_someone_turns_them_on(toy: Toy):
    definitions = build_definitions(toy.root)
    assert [schedule.default_status for schedule in definitions.schedules] == [dg.DefaultScheduleStatus.STOPPED]
    sensors = {sensor.name: sensor.default_status for sensor in definitions.sensors}
    assert sensors.pop("run_failed") == dg.DefaultSensorStatus.RUNNING, "it tells, and starts nothing"
    assert set(sensors.values()) == {dg.DefaultSensorStatus.STOPPED}


def test_the_retrain_job_begins_after_the_shards(toy: Toy):
    job = build_definitions(toy.root).resolve_job_def("retrain")
    names = {key.to_user_string() for key in job.asset_layer.executable_asset_keys}
    assert "shards" not in names and {"mixture_sft", "alignment", "mr_grpo", "challenger", "champion"} <= names


def test_params_that_make_no_other_model_are_no_reason(toy: Toy):
    before = recipe_digest(toy.root)
    toy.edit("max_hours: null", "max_hours: 3")
    toy.edit("samples: 64, seed: 1,", "samples: 96, seed: 1,")  # told by the dataset id, once it is built
    assert recipe_digest(toy.root) == before
    toy.edit("seed: 12", "seed: 1212")
    assert recipe_digest(toy.root) != before


def test_what_is_at_work_is_named_and_oneself_is_not(toy: Toy):
    holder = "from pathlib import Path; from orchestration.pipeline_run import only_one\n"
    holder += "with only_one(Path('.')): print('held', flush=True); input()"
    with dg.DagsterInstance.ephemeral() as instance:
        with only_one(toy.root):
            assert in_progress(toy.root, instance) is None
        process = subprocess.Popen([sys.executable, "-c", holder], cwd=toy.root, stdin=-1, stdout=-1, text=True)
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        assert in_progress(toy.root, instance) == f"`deepgen run` is at work (process {process.pid})"
        process.communicate("\n")
        assert in_progress(toy.root, instance) is None
        job = build_definitions(toy.root).resolve_job_def("retrain")
        run = instance.create_run_for_job(job, status=dg.DagsterRunStatus.STARTED)
        assert in_progress(toy.root, instance) == f"run {run.run_id[:8]} of retrain is started"


ASKER = """
import sys, time
from pathlib import Path
import dagster as dg
from orchestration.definitions import build_definitions
from orchestration.stores import init_stores
root = Path(".").resolve()
init_stores(root)
definitions = build_definitions(root)
with dg.DagsterInstance.get() as instance:
    print("ready", flush=True)
    input()
    if sys.argv[1] == "schedule":
        (schedule,) = definitions.schedules
        found = schedule(dg.build_schedule_context(instance))
    else:
        found = definitions.resolve_sensor_def("data_changed")(dg.build_sensor_context(instance))
    print(type(found).__name__, getattr(found, "skip_message", ""), flush=True)
"""


@pytest.mark.slow
def test_of_two_sensors_and_a_schedule_that_ask_at_once_one_gets_the_launch(with_shards: Toy):
    toy = with_shards
    init_stores(toy.root)
    askers = [
        subprocess.Popen([sys.executable, "-c", ASKER, kind], cwd=toy.root, env=toy.environment(), stdin=-1, stdout=-1, text=True)
        for kind in ("schedule", "sensor", "sensor")
    ]
    for asker in askers:
        assert asker.stdout is not None and asker.stdout.readline() == "ready\n"
    for asker in askers:
        assert asker.stdin is not None
        asker.stdin.write("\n")
        asker.stdin.flush()
    answers = [asker.communicate()[0].strip() for asker in askers]
    assert sorted(answer.split()[0] for answer in answers) == ["RunRequest", "SkipReason", "SkipReason"], answers
    assert all("launched it" in answer for answer in answers if answer.startswith("SkipReason"))
    with dg.DagsterInstance.from_config(str(toy.root / "outputs" / "dagster")) as instance:
        (claim,) = (toy.root / "outputs" / "retrain").glob("*.json")
        write_json(claim, read_json(claim) | {"time": read_json(claim)["time"] - CLAIM_SECONDS})
        assert isinstance(ask_only(toy.root, instance), Launch), "a launch that never came may be had by somebody else"
        assert isinstance(ask(toy.root, instance, "a person"), Launch) and isinstance(ask(toy.root, instance, "another"), Skip)


@pytest.mark.slow
def test_after_a_run_the_decision_follows_what_changed_and_a_failed_launch_is_not_repeated(copy: Toy):
    with dg.DagsterInstance.from_config(str(copy.root / "outputs" / "dagster")) as instance:
        sensor = build_definitions(copy.root).resolve_sensor_def("data_changed")
        quiet = sensor(dg.build_sensor_context(instance))
        assert isinstance(quiet, dg.SkipReason) and "nothing changed" in quiet.skip_message
        copy.edit("seed: 12", "seed: 1212")
        copy.edit("max_hours: null", "max_hours: 1.0e-9")
        dear = sensor(dg.build_sensor_context(instance))
        assert isinstance(dear, dg.SkipReason) and "params changed" in dear.skip_message and "budget.max_hours" in dear.skip_message
        copy.edit("max_hours: 1.0e-9", "max_hours: null")
        assert "launch: params changed" in copy.deepgen("retrain", "--dry-run").stdout
        wanted = sensor(dg.build_sensor_context(instance))
        assert isinstance(wanted, dg.RunRequest) and wanted.tags[RETRAIN_KEY] == look(copy.root, copy.params, instance).key
        job = build_definitions(copy.root).resolve_job_def("retrain")
        instance.create_run_for_job(job, tags=wanted.tags, status=dg.DagsterRunStatus.FAILURE)
        again = sensor(dg.build_sensor_context(instance))
        assert (
            isinstance(again, dg.SkipReason)
            and "(failure) was launched for this data and these params. Once more only by hand" in again.skip_message
        )
        copy.edit("mr_grpo:\n  steps: 2\n", "mr_grpo:\n  steps: 3\n")  # other weights
        done = copy.deepgen("retrain")
        assert done.returncode == exits.DONE, done.stdout + done.stderr
        assert "launch: params changed" in done.stdout and "version 2 is champion" in done.stdout
        assert "skip: nothing changed" in copy.deepgen("retrain").stdout
