"""Asset checks, each on what it should let pass and on what it should not; a value that is no number never passes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orchestration import data_checks, model_checks
from orchestration.checks import CHECKS, ERROR, FINAL_CHECKS, build_checks
from orchestration.journal import append_row
from orchestration.promotion_log import HISTORY
from runtime.files import read_json, sha256_file, tensors_digest
from tests.orchestration.conftest import Toy
from tests.orchestration.toy import write_weights

NAN = float("nan")
Measure = Callable[..., data_checks.Outcome]


def rewrite(path: Path, change: Callable[[Any], Any]) -> None:
    """As a hand or a bug might: NaN included, which our own writer refuses."""
    value = read_json(path)
    change(value)
    path.write_text(json.dumps(value))


def problems(toy: Toy, measure: Measure, stage: str) -> list[str]:
    return measure(toy.root, toy.stages[stage])[0]


DATA = [
    (data_checks.check_decoded, {"decoded": 3}, "3 of 64 samples were decoded"),
    (data_checks.check_decoded, {"decoded": NAN}, "nan of 64"),
    (data_checks.check_counts, {"samples": 63}, "64 records, 64 of them ended somewhere, 63 in its shards"),
    (data_checks.check_counts, {"counts": {"input": 64, "written": 64, "deduplicated": 1, "dropped": 0, "quarantined": 0}}, "65 of them"),
]


@pytest.mark.parametrize(("measure", "change", "said"), DATA)
def test_a_manifest_that_does_not_add_up_fails(with_shards: Toy, measure: Measure, change: dict[str, Any], said: str):
    assert problems(with_shards, measure, "shards@drawn_image_edit") == []
    manifest = with_shards.root / "outputs" / "shards" / "drawn_image_edit" / "manifest.json"
    rewrite(manifest, lambda value: value.update(change))
    (problem,) = problems(with_shards, measure, "shards@drawn_image_edit")
    assert problem.startswith("drawn_image_edit: ") and said in problem


def test_one_data_set_under_two_names_fails(with_shards: Toy):
    shards = with_shards.root / "outputs" / "shards"
    identity = read_json(shards / "drawn_image_edit" / "manifest.json")["dataset_id"]
    rewrite(shards / "evaluation_image_edit" / "manifest.json", lambda value: value.update(dataset_id=identity))
    said = problems(with_shards, data_checks.check_counts, "shards@drawn_image_edit")
    assert said == ["drawn_image_edit and evaluation_image_edit hold the same samples"]


@pytest.mark.parametrize("count", [97, NAN])
def test_a_part_that_is_not_drawn_as_its_weight_asks_fails(with_shards: Toy, count: float):
    mixture = with_shards.root / "outputs" / "mixture" / "alignment.json"
    assert problems(with_shards, data_checks.check_shares, "mixture@alignment") == []
    rewrite(mixture, lambda value: value["realised"]["parts"]["image_edit"].update(drawn_image_edit=count))
    (problem,) = problems(with_shards, data_checks.check_shares, "mixture@alignment")
    assert "its weight asks for 1.000" in problem


def test_an_evaluation_set_in_a_mixture_fails_and_what_was_not_looked_for_is_told(with_shards: Toy):
    stage, mixture = with_shards.stages["mixture@alignment"], with_shards.root / "outputs" / "mixture" / "alignment.json"
    found, measured = data_checks.check_leaks(with_shards.root, stage)
    assert not found and "not looked for" in measured["leaks of drawn_image_edit"]
    identity = read_json(with_shards.root / "outputs" / "shards" / "evaluation_image_edit" / "manifest.json")["dataset_id"]
    rewrite(mixture, lambda value: value["tasks"]["image_edit"][0].update(dataset_id=identity))
    (problem,) = problems(with_shards, data_checks.check_leaks, "mixture@alignment")
    assert problem == "drawn_image_edit holds the samples of the evaluation part evaluation_image_edit"


def trained(toy: Toy, **change: Any) -> Toy:
    """With the metrics of an alignment stage of 4 steps, changed."""
    (toy.root / "outputs" / "alignment").mkdir(parents=True, exist_ok=True)
    metrics = {"steps": 4, "steps_skipped": 0, "samples_seen": 4 * batch(toy), "loss_first": 1.0, "loss_last": 0.5}
    metrics["samples_by_task"] = {"text_to_image": 3 * batch(toy), "image_edit": batch(toy)}  # its mixture asks for 3 to 1
    (toy.root / "outputs" / "alignment" / "metrics.json").write_text(json.dumps(metrics | change))
    return toy


def batch(toy: Toy) -> int:
    return toy.params.alignment.batch_size


def test_samples_seen_are_steps_times_batch(with_shards: Toy):
    assert problems(trained(with_shards), model_checks.check_samples, "alignment") == []
    planned = 4 * batch(with_shards)
    for seen, skipped in ((planned - 1, 0), (planned + 1, 0), (NAN, 0), (planned - 1, 1)):
        found = problems(trained(with_shards, samples_seen=seen, steps_skipped=skipped), model_checks.check_samples, "alignment")
        assert f"saw {seen} samples" in found[0]
    fifth = {"text_to_image": 15 * batch(with_shards) // 4, "image_edit": 5 * batch(with_shards) // 4}
    more = trained(with_shards, samples_seen=planned + batch(with_shards), samples_by_task=fifth, steps_skipped=1)
    assert problems(more, model_checks.check_samples, "alignment") == [], "the samples of a skipped step are left behind"


def test_a_task_that_was_not_seen_in_its_share_fails(with_shards: Toy):
    lopsided = trained(with_shards, samples_by_task=dict.fromkeys(("text_to_image", "image_edit"), 2 * batch(with_shards)))
    found = problems(lopsided, model_checks.check_samples, "alignment")
    assert found[0].startswith("image_edit: 0.500") and found[1].startswith("text_to_image: 0.500")


def test_a_stage_that_stopped_early_took_all_its_steps(with_shards: Toy):
    assert problems(trained(with_shards, steps=3, stopped_early_at=3), model_checks.check_finite, "alignment") == []
    assert problems(trained(with_shards, steps=3), model_checks.check_finite, "alignment") == ["trained 3 steps of 4"]


def evaluated(toy: Toy, value: float) -> Toy:
    folder = toy.root / "outputs" / "evaluation" / "mr_grpo"
    folder.mkdir(parents=True, exist_ok=True)
    gates = [{"name": name, "value": value, "passed": True} for name in toy.params.gates.floors]
    (folder / "gates.json").write_text(json.dumps({"model_digest": "a", "evaluation_set_digest": "set", "gates": gates}))
    return toy


def test_a_metric_below_its_floor_or_no_number_is_told(toy: Toy):
    lowest = min(toy.params.gates.floors.values())
    assert problems(evaluated(toy, 1.0), model_checks.check_floors, "evaluation@mr_grpo") == []
    assert any(
        "below its floor" in found for found in problems(evaluated(toy, lowest - 0.1), model_checks.check_floors, "evaluation@mr_grpo")
    )
    assert problems(evaluated(toy, NAN), model_checks.check_floors, "evaluation@mr_grpo")


@pytest.mark.parametrize(
    ("value", "measured_set", "own", "worse"),
    [
        (0.9, "set", {}, False),
        (0.8, "set", {}, True),
        (NAN, "set", {}, True),
        (0.8, "another set", {}, False),
        (0.8, "set", {"all": 0.3}, False),
    ],
)
def test_a_model_that_is_worse_than_the_champion_by_more_than_the_tolerance_is_told(
    toy: Toy, value: float, measured_set: str, own: dict[str, float], worse: bool
):
    if own:
        toy.edit("tolerances: {}", "tolerances: {text_to_image: 0.3, image_edit: 0.3}")
    toy.edit(f"regression_tolerance: {toy.params.gates.regression_tolerance}", "regression_tolerance: 0.05")
    best = [{"name": name, "value": 0.91} for name in toy.params.gates.floors]
    append_row(toy.root / HISTORY, {"event": "promotion", "version": "3", "evaluation_set_digest": measured_set, "gates": best})
    found, measured = model_checks.check_regression(toy.root, evaluated(toy, value).stages["evaluation@mr_grpo"])
    assert bool(found) is worse
    if measured_set == "set":
        assert measured["text_to_image of champion 3"] == 0.91


def exported(toy: Toy) -> Path:
    """An export of the evaluated weights, proven and licensed."""
    folder = toy.root / "outputs" / "exports" / "diffusers"
    write_weights(folder / "dit" / "model.safetensors", [1.0, 2.0])
    digest = tensors_digest(folder)
    for name, facts in {
        "proof": {"model_digest": digest, "network": "off", "process": "fresh", "seed": 7, "largest_pixel_difference": 0},
        "provenance": {"licences": ["CC0-1.0"], "upstream": [{"name": "vlm", "repo": "a/b", "revision": "c", "licence": "MIT"}]},
    }.items():
        (folder / f"{name}.json").write_text(json.dumps(facts))
    files = {str(file.relative_to(folder)): sha256_file(file) for file in folder.rglob("*") if file.is_file()}
    (folder / "files.json").write_text(json.dumps(files))
    evaluation = toy.root / "outputs" / "evaluation" / "mr_grpo"
    evaluation.mkdir(parents=True)
    (evaluation / "gates.json").write_text(json.dumps({"model_digest": digest}))
    return folder


EXPORTS = [
    (model_checks.check_proof, "proof", {"largest_pixel_difference": 1}, "differs by up to 1 of 255"),
    (model_checks.check_proof, "proof", {"largest_pixel_difference": NAN}, "differs by up to nan"),
    (model_checks.check_proof, "proof", {"network": "on"}, "network on"),
    (model_checks.check_proof, "proof", {"model_digest": "f" * 64}, "proven of weights ffffffffffff"),
    (model_checks.check_licences, "provenance", {"upstream": [{"name": "vlm", "repo": "a/b", "licence": None}]}, "vlm (a/b): no licence"),
    (model_checks.check_licences, "provenance", {"licences": []}, "CC0-1.0, of training data, is not named"),
    (model_checks.check_export, "provenance", {"licences": ["MIT"]}, "provenance.json is not the file that was exported"),
]


@pytest.mark.parametrize(("measure", "file", "change", "said"), EXPORTS)
def test_an_export_that_is_not_proven_whole_or_licensed_fails(toy: Toy, measure: Measure, file: str, change: dict[str, Any], said: str):
    folder = exported(toy)
    assert problems(toy, measure, "export_diffusers") == []
    rewrite(folder / f"{file}.json", lambda value: value.update(change))
    (problem,) = problems(toy, measure, "export_diffusers")
    assert said in problem


def test_what_can_not_be_measured_fails(toy: Toy):
    for definition in build_checks(toy.root, toy.stages):
        result = definition.node_def.compute_fn.decorated_fn()
        assert not result.passed and result.description.startswith("can't be measured: ") or "no part has been built" in result.description


def test_only_warnings_let_pass_what_comes_after(toy: Toy):
    severities = {name: severity for rows in [*CHECKS.values(), FINAL_CHECKS] for name, _, _, severity in rows}
    for definition in build_checks(toy.root, toy.stages):
        for spec in definition.check_specs:
            assert spec.blocking is (severities[spec.name] == ERROR)
