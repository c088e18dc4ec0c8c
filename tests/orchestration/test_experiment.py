"""Runs with other settings, from the launchpad: typed by params.yaml's schema, in a folder of their own, leaving the project as it is."""

from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from orchestration.experiment import FOLDER, TAG, build_experiment_job
from orchestration.launchpad import config_of, flat, merged
from runtime.files import read_json, sha256_path
from runtime.params import Params, parse_params
from tests.orchestration.conftest import PROJECT, Toy
from tests.orchestration.test_budget import ran


def launch(toy: Toy, overrides: dict[str, Any], last: str = "sft", instance: dg.DagsterInstance | None = None) -> Any:
    job = build_experiment_job(toy.root, toy.stages)
    config = {"ops": {"try_settings": {"config": {"overrides": overrides, "last": last}}}}
    return job.execute_in_process(run_config=config, instance=instance, resources={"dvc": toy.dvc}, raise_on_error=False)


def why(result: Any) -> str:
    return str(result.failure_data_for_node("try_settings").user_failure_data.description)


def folders(toy: Toy) -> list[Path]:
    return sorted((toy.root / FOLDER).glob("*"))


def test_an_experiment_trains_beside_the_project_and_leaves_it_as_it_is(with_shards: Toy):
    kept = ("params.yaml", "dvc.lock", "outputs/shards", "outputs/mixture")
    before = {name: sha256_path(with_shards.root / name) for name in kept}
    with dg.DagsterInstance.ephemeral() as instance:
        result = launch(with_shards, {"sft": {"steps": 6}}, instance=instance)
        tags = instance.get_run_by_id(result.run_id).tags
    assert result.success
    (folder,) = folders(with_shards)
    assert read_json(folder / "outputs" / "sft" / "metrics.json")["steps"] == 6
    assert not (with_shards.root / "outputs" / "sft").exists()
    assert {name: sha256_path(with_shards.root / name) for name in kept} == before
    assert tags[TAG] == folder.name
    assert read_json(folder / "experiment.json")["overrides"] == {"sft.steps": 6}


def test_what_the_settings_do_not_touch_is_taken_and_not_made_again(with_shards: Toy, capfd: pytest.CaptureFixture[str]):
    assert launch(with_shards, {"sft": {"steps": 6}}).success
    said = capfd.readouterr().out
    assert "mixture@alignment: untouched, taken as it is" in said and "mixture@sft: python" in said
    (folder,) = folders(with_shards)
    name = "outputs/mixture/alignment.json"
    assert (folder / name).samefile(with_shards.root / name)


@pytest.mark.slow
def test_what_grows_from_a_changed_stage_is_made_again_and_shown_beside_the_clones_own(copy: Toy, capfd: pytest.CaptureFixture[str]):
    result = launch(copy, {"alignment": {"steps": 5}}, last="evaluation@sft")
    said = capfd.readouterr().out
    assert result.success
    assert all(f"{name}: python" in said for name in ("alignment", "sft", "evaluation@sft"))
    assert "mixture@sft: untouched, taken as it is" in said
    (output,) = [event for event in result.all_events if event.is_successful_output]
    shown = output.step_output_data.metadata
    assert shown["text_to_image strict"].value == 0.5
    assert shown["beside params.yaml: samples_text_to_image"].value.startswith("![samples_text_to_image](data:image/png")


def test_the_same_launch_goes_on_where_the_last_one_failed(
    with_shards: Toy, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("TOY_FAIL", "sft")
    result = launch(with_shards, {"sft": {"steps": 6}})
    assert "sft: failed with exit code 7" in why(result)
    monkeypatch.delenv("TOY_FAIL")
    capfd.readouterr()
    assert launch(with_shards, {"sft": {"steps": 6}}).success
    assert "alignment: done before" in capfd.readouterr().out
    assert len(folders(with_shards)) == 1


@pytest.mark.parametrize(
    "overrides, last, words",
    [
        ({"sft": {"batch_size": -1}}, "sft", "sft.batch_size"),
        ({"sft": {"steps": 4}}, "sft", "leave params.yaml as it is"),
        ({"mr_grpo": {"steps": 9}}, "alignment", "no stage up to alignment reads mr_grpo.steps"),
    ],
)
def test_what_can_not_be_tried_is_refused_before_anything_is_made(toy: Toy, overrides: dict[str, Any], last: str, words: str):
    assert words in why(launch(toy, overrides, last))
    assert folders(toy) == []


def test_an_experiment_above_the_budget_is_refused_and_can_not_raise_it(toy: Toy):
    ran(toy, "alignment", 3600)
    toy.edit("max_hours: null", "max_hours: 0.5")
    overrides = {"alignment": {"steps": 8}, "budget": {"max_hours": 100.0}}
    assert "budget.max_hours: predicted 2.0" in why(launch(toy, overrides, "alignment"))
    assert folders(toy) == []


def test_the_launchpad_knows_every_setting_of_every_preset_and_no_other():
    schema = config_of(Params, "params")

    @dg.op(config_schema=schema)
    def settings() -> None:
        return None

    @dg.job
    def job() -> None:
        settings()

    for preset in sorted((PROJECT / "presets").glob("*.yaml")):
        values = parse_params(preset.read_text())
        assert dg.validate_run_config(job, {"ops": {"settings": {"config": values}}})
    for wrong in ({"sft": {"optimiser": {}}}, {"sft": {"steps": "many"}}, {"sft": {"optimizer": {"decay": "sudden"}}}):
        with pytest.raises(dg.DagsterInvalidConfigError):
            dg.validate_run_config(job, {"ops": {"settings": {"config": wrong}}})


def test_overrides_replace_values_and_lists_and_keep_what_they_do_not_name():
    values = {"a": {"b": 1, "c": [1, 2]}, "d": {"e": 2}}
    overrides = {"a": {"c": [3]}, "d": None}
    assert merged(values, overrides) == {"a": {"b": 1, "c": [3]}, "d": None}
    assert values == {"a": {"b": 1, "c": [1, 2]}, "d": {"e": 2}}
    assert flat(overrides) == {"a.c": [3], "d": None}
