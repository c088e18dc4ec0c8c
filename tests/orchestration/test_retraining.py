"""The decision to train again: once for each pair of data and params, and never silently not."""

import dagster as dg
import pytest

from orchestration.definitions import build_definitions
from orchestration.retraining import Situation, look, reason_to_skip
from tests.orchestration.conftest import Toy

SAME = Situation("data", "params", samples=10, champion_data="data", champion_params="params")


def test_nothing_changed_is_a_reason_that_names_the_digests():
    assert "data data and params params" in (reason_to_skip(SAME) or "")


@pytest.mark.parametrize("change", [{"data_digest": "new"}, {"params_digest": "new"}, {"champion_data": None}])
def test_other_data_other_params_or_no_champion_is_something_to_train(change):
    assert reason_to_skip(Situation(**(SAME.__dict__ | change))) is None


def test_without_shards_there_is_nothing_to_train():
    assert reason_to_skip(Situation("data", "params", 0, None, None)) == "no training shards have been built"


def test_schedule_and_sensor_are_off_until_someone_turns_them_on(toy: Toy):
    definitions = build_definitions(toy.root)
    assert [schedule.default_status for schedule in definitions.schedules] == [dg.DefaultScheduleStatus.STOPPED]
    assert [sensor.default_status for sensor in definitions.sensors] == [dg.DefaultSensorStatus.STOPPED]


def test_the_retrain_job_begins_after_the_shards(toy: Toy):
    job = build_definitions(toy.root).resolve_job_def("retrain")
    names = {key.to_user_string() for key in job.asset_layer.executable_asset_keys}
    assert "shards" not in names and {"mixture_sft", "alignment", "mr_grpo", "challenger", "champion"} <= names


@pytest.mark.slow
def test_the_sensor_skips_after_a_run_and_asks_for_one_once_when_params_change(copy: Toy):
    with dg.DagsterInstance.ephemeral() as instance:
        (sensor,) = build_definitions(copy.root).sensors
        skipped = sensor(dg.build_sensor_context(instance))
        assert isinstance(skipped, dg.SkipReason) and "nothing changed" in skipped.skip_message
        copy.edit("seed: 12", "seed: 1212")
        wanted = sensor(dg.build_sensor_context(instance))
        assert isinstance(wanted, dg.RunRequest) and wanted.run_key == look(copy.root, copy.params).key
        instance.create_run_for_job(build_definitions(copy.root).resolve_job_def("retrain"), tags=wanted.tags)
        again = sensor(dg.build_sensor_context(instance))
        assert isinstance(again, dg.SkipReason) and "was started for this data and params" in again.skip_message
