"""What a run will take: from what was measured, told before it starts, and refused above the budget."""

import json
import shutil
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from orchestration.budget import (
    AROUND_SECONDS,
    OverBudget,
    Prediction,
    StagePrediction,
    check_budget,
    describe,
    over_budget,
    predict,
    stages_to_make,
)
from orchestration.dvc import DvcCommand
from runtime import exits
from runtime.files import write_json
from runtime.params import check_params, load_params, parse_params
from runtime.recipe import load_stages
from runtime.run_folder import ending_of
from tests.orchestration.conftest import PROJECT, Toy, failure_text

ROW = StagePrediction("sft", 100, 2.0, 16.0, 5e9, "as before")


class Known(DvcCommand):
    """A DVC that was asked already: `clean` are up to date."""

    def __init__(self, root: Path, clean: set[str]) -> None:
        super().__init__(root)
        self.clean = clean

    def clean_stages(self) -> set[str]:
        return self.clean


def ran(toy: Toy, stage: str, seconds: float, state: str = "finished", **params: Any) -> Path:
    """A run folder as a stage leaves it, of the params as they are but for `params`."""
    folder = toy.root / "outputs" / "runs" / stage.replace("@", "/") / f"{stage}-{seconds:g}"
    values = parse_params((toy.root / "params.yaml").read_text())
    write_json(folder / "run.json", {"stage": stage, "fingerprint": folder.name, "digests": {}, "params": values | params})
    write_json(folder / "ended.json", {"state": state, "error": None, "time": 0.0, "seconds": seconds})
    return folder


def hours_of(toy: Toy, stage: str) -> float | None:
    (row,) = predict(toy.root, toy.params, [toy.stages[stage]]).stages
    return row.hours


@pytest.mark.parametrize(
    ("key", "allowed", "predicted"), [("max_hours", 1.5, "2.00"), ("max_gpu_hours", 15, "16.00"), ("max_cost", 40, "48.00")]
)
def test_what_is_above_a_limit_is_told_with_key_predicted_allowed_and_what_to_do(toy: Toy, key: str, allowed: float, predicted: str):
    prediction = Prediction((ROW,), free_bytes=10**12, price=3.0)
    assert over_budget(prediction, toy.params) == []
    toy.edit(f"{key}: null", f"{key}: {allowed}")
    (problem,) = over_budget(prediction, toy.params)
    assert problem.startswith(f"budget.{key}: predicted {predicted}, allowed {allowed:g}.") and "params.yaml" in problem


def test_more_than_the_disk_holds_is_refused_without_any_limit(toy: Toy):
    (problem,) = over_budget(Prediction((ROW,), free_bytes=4 * 10**9, price=None), toy.params)
    assert "predicted 5 GB, free are 4 GB" in problem and "deepgen gc" in problem


def test_what_nobody_measured_makes_the_sum_a_least_one():
    unknown = StagePrediction("report", 0, None, 0.0, None, "not measured yet")
    assert Prediction((ROW, unknown), 10**12, None).total.startswith("at least 2.00 h")
    assert describe(Prediction((ROW,), 10**12, None)).startswith("predicted: 2.00 h, 5 GB of 1 TB free, 100 samples\n  sft ")


def test_many_parts_are_one_line_of_the_table():
    rows = tuple(StagePrediction(f"shards@{number}", 10, 0.5, 0.0, 1e6, "as before") for number in range(2000))
    told = describe(Prediction((*rows, ROW), 10**12, None)).splitlines()
    assert len(told) == 3 and told[1].split()[:4] == ["shards", "x", "2,000", "20,000"] and "1,000 h" in told[1]


def test_time_goes_with_the_steps_of_the_last_run_here(toy: Toy):
    assert hours_of(toy, "alignment") is None
    ran(toy, "alignment", 3600)
    assert hours_of(toy, "alignment") == pytest.approx(1 + AROUND_SECONDS / 3600)
    steps = toy.params.alignment.steps
    toy.edit(f"alignment:\n  steps: {steps}\n", f"alignment:\n  steps: {3 * steps}\n")
    assert hours_of(toy, "alignment") == pytest.approx(3 + AROUND_SECONDS / 3600)


def test_a_run_of_another_model_or_one_that_did_not_finish_says_nothing(toy: Toy):
    ran(toy, "alignment", 50, state="interrupted")
    launch = parse_params((toy.root / "params.yaml").read_text())["launch"]
    ran(toy, "alignment", 100, launch=launch | {"threads": 7})
    ran(toy, "alignment", 150, launch={"of": "another time"})
    assert hours_of(toy, "alignment") is None


def test_of_a_run_that_went_on_from_a_checkpoint_all_steps_count(toy: Toy):
    folder = ran(toy, "alignment", 60)
    (folder / "progress.jsonl").write_text(json.dumps({"time": 0, "step": 4, "total": 4, "rate": 4 / 7200, "eta_s": 0}) + "\n")
    assert hours_of(toy, "alignment") == pytest.approx(2 + AROUND_SECONDS / 3600)


def test_a_stage_that_never_ran_is_measured_by_another_of_its_group(toy: Toy):
    ran(toy, "evaluation@sft", 3600)
    (row,) = predict(toy.root, toy.params, [toy.stages["evaluation@mr_grpo"]]).stages
    assert row.basis.startswith("as evaluation@sft here") and row.hours == pytest.approx(1 + AROUND_SECONDS / 3600)


def test_only_what_will_run_counts_and_what_reads_it(toy: Toy):
    names = set(toy.stages)
    made = [stage.name for stage in stages_to_make(toy.root, Known(toy.root, names - {"sft"}))]
    assert made == ["sft", "mr_grpo", "evaluation@sft", "evaluation@mr_grpo", "export_diffusers"]
    assert stages_to_make(toy.root, Known(toy.root, names)) == []
    assert [stage.name for stage in stages_to_make(toy.root, Known(toy.root, set()), among=["sft"])] == ["sft"]


def test_a_part_that_is_read_whole_is_unknown_until_it_is_built(with_shards: Toy):
    toy = with_shards
    values = parse_params((toy.root / "params.yaml").read_text())
    values["data"]["parts"]["drawn_image_edit"] |= {"source": "folder", "path": "photos", "samples": None}
    params = check_params(values)
    (row,) = predict(toy.root, params, [toy.stages["shards@drawn_image_edit"]]).stages
    assert row.samples == 64, "as many as its last build found"
    shutil.rmtree(toy.root / "outputs" / "shards" / "drawn_image_edit")
    (row,) = predict(toy.root, params, [toy.stages["shards@drawn_image_edit"]]).stages
    assert row.hours is None and "nobody knows how many samples" in row.basis


def test_a_stage_leaves_its_seconds_and_the_params_it_ran_with(with_shards: Toy):
    (folder,) = (with_shards.root / "outputs" / "runs" / "shards" / "drawn_image_edit").glob("*")
    ending = ending_of(folder)
    assert ending is not None and 0 < ending["seconds"] < 600
    assert check_params(json.loads((folder / "run.json").read_text())["params"]) == with_shards.params
    (row,) = predict(with_shards.root, with_shards.params, [with_shards.stages["shards@drawn_image_edit"]]).stages
    assert row.basis.startswith("as shards@drawn_image_edit here") and row.disk_bytes


def test_the_first_run_of_the_tiny_preset_is_predicted_from_the_rates_that_come_with_it(tmp_path: Path):
    shutil.copytree(PROJECT / "presets", tmp_path / "presets")
    shutil.copy(PROJECT / "presets" / "tiny.yaml", tmp_path / "params.yaml")
    params, stages = load_params(tmp_path / "params.yaml"), load_stages(PROJECT, parse_params((tmp_path / "params.yaml").read_text()))
    shutil.copy(PROJECT / "dvc.yaml", tmp_path / "dvc.yaml")
    prediction = predict(tmp_path, params, list(stages.values()))
    assert prediction.is_complete and prediction.hours == pytest.approx(24 / 60, rel=0.25), "LOG.md: 24:17 and 23:27"
    assert prediction.disk_bytes == pytest.approx(600e6, rel=0.5) and prediction.price is None
    assert all("not measured yet here" in row.basis for row in prediction.stages)


def test_a_launch_of_assets_is_held_to_the_budget_by_what_it_will_run(toy: Toy):
    ran(toy, "mixture@alignment", 36_000)
    toy.edit("max_hours: null", "max_hours: 5")
    with dg.DagsterInstance.ephemeral() as instance:
        assert toy.materialize("shards", instance=instance).success, "the mixture was not asked for"
        (run,) = instance.get_runs()
        assert "144 samples" in run.tags["deepgen/predicted"]
    refused = toy.materialize("mixture_alignment")
    assert not refused.success
    said = failure_text(refused, "mixture_alignment")
    assert "budget.max_hours: predicted 10.00, allowed 5." in said
    assert not (toy.root / "outputs" / "mixture").exists()


def test_a_run_above_the_budget_is_refused_before_anything_is_built(toy: Toy):
    ran(toy, "sft", 7200)
    toy.edit("max_hours: null", "max_hours: 0.5")
    done = toy.deepgen("run")
    assert done.returncode == exits.FAILED
    assert "budget.max_hours: predicted 2.00, allowed 0.5." in done.stderr and "Traceback" not in done.stderr
    assert not (toy.root / "outputs" / "shards").exists()
    told = json.loads(toy.deepgen("predict", "--json").stdout)
    assert told["hours"] == pytest.approx(2.0, abs=0.01) and len(told["over_budget"]) == 1 and not told["is_complete"]


@pytest.mark.slow
def test_a_preset_for_gpus_is_estimated_in_gpu_hours_and_money_by_a_process_of_its_own(toy: Toy):
    toy.edit("precision: fp32", "precision: bf16")
    (toy.root / "rates.json").write_text('{"rates": {"price_per_gpu_hour": 7.0}}')
    toy.edit("gpu: h200, rates: null}", "gpu: h100, rates: rates.json}")
    names = ["alignment", "sft", "mr_grpo"]
    prediction = predict(toy.root, toy.params, [toy.stages[name] for name in names])
    assert prediction.price == 7.0 and prediction.is_complete
    assert prediction.gpu_hours == prediction.hours > 0 and prediction.cost == 7.0 * prediction.gpu_hours
    assert all("1 x h100 as published" in row.basis for row in prediction.stages)
    toy.edit("rates: rates.json", "rates: nowhere.json")
    with pytest.raises(OverBudget, match=r"can't be estimated.*nowhere\.json"):
        check_budget(toy.root, toy.params, Known(toy.root, set()))
