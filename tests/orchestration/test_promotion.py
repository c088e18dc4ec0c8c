"""Promotion measures for itself: whatever is missing, stale, edited, swapped or not a number, the champion stays."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from orchestration.config import GatesConfig
from orchestration.promotion import GateFailed, check_gates, promote, read_history, rollback
from orchestration.registry import CHALLENGER, CHAMPION, EXPORT, GATES, PREVIOUS, Registry, register_export
from runtime.files import read_json, tensors_digest
from tests.orchestration.conftest import Toy
from tests.orchestration.toy import write_weights

FLOORS = GatesConfig(floors={"text_to_image": 0.4}, regression_tolerance=0.05)


def gate(value: Any, name: str = "text_to_image", passed: bool = True) -> dict[str, Any]:
    return {"name": name, "value": value, "floor": 0.0, "passed": passed}


@pytest.mark.parametrize("value", [0.39, -1, None, "0.9", True, math.nan, math.inf, -math.inf])
def test_a_value_below_its_floor_or_no_finite_number_fails(value: Any):
    problems, _ = check_gates([gate(value)], FLOORS, None)
    assert len(problems) == 1 and "text_to_image" in problems[0]


def test_a_gate_that_was_not_measured_fails_and_so_does_one_that_failed_in_the_file():
    assert check_gates([], FLOORS, None)[0] == ["text_to_image: measured None, floor 0.4"]
    assert check_gates([gate(0.9, passed=False)], FLOORS, None)[0] == ["text_to_image: the evaluation itself says failed"]


def test_floors_are_those_of_params_whatever_the_file_says():
    assert check_gates([gate(0.4)], FLOORS, None)[0] == []
    assert "floor 0.4" in check_gates([gate(0.2)], FLOORS, None)[0][0]


def test_a_challenger_may_lie_below_the_champion_by_the_tolerance_and_no_more():
    assert check_gates([gate(0.56)], FLOORS, {"text_to_image": 0.6})[0] == []
    assert "champion's 0.6" in check_gates([gate(0.54)], FLOORS, {"text_to_image": 0.6})[0][0]
    assert check_gates([gate(0.9)], FLOORS, {"image_edit": 0.5})[0] == ["image_edit: measured None, the champion has 0.5"]


def second_model(toy: Toy, strict: float = 0.5, seed: float = 9.0) -> str:
    """Other weights, evaluated, exported and recorded, as a second run would leave them; their digest."""
    for folder in (toy.root / "outputs" / "mr_grpo" / "model", toy.root / EXPORT):
        write_weights(folder / "dit" / "model.safetensors", [seed])
    edit_gates(toy, model_digest=tensors_digest(toy.root / EXPORT), strict=strict)
    record(toy)
    return tensors_digest(toy.root / EXPORT)


def edit_gates(toy: Toy, strict: float | None = None, **changes: Any) -> None:
    evidence = read_json(toy.root / GATES) | changes
    if strict is not None:
        evidence["gates"] = [row | {"value": strict} for row in evidence["gates"]]
    (toy.root / GATES).write_text(json.dumps(evidence))


def record(toy: Toy) -> None:
    toy.dvc.commit(toy.stages["evaluation@mr_grpo"])


def challenge(toy: Toy) -> Registry:
    register_export(toy.root, toy.params, toy.dvc)
    return Registry.open(toy.root, toy.params)


def refused(toy: Toy, words: str) -> None:
    """Promotion refuses in these words, and nothing has moved."""
    registry = Registry.open(toy.root, toy.params)
    before, rows = registry.by_alias(CHAMPION), read_history(toy.root)
    with pytest.raises(GateFailed, match=words):
        promote(toy.root, toy.params, toy.dvc)
    after = registry.by_alias(CHAMPION)
    assert (before and before.version) == (after and after.version) and read_history(toy.root) == rows


@pytest.mark.slow
class TestWithARegistry:
    def test_the_same_weights_are_promoted_once(self, copy: Toy):
        done = promote(copy.root, copy.params, copy.dvc)
        assert not done.changed and "champion already" in done.message
        assert len(read_history(copy.root)) == 1

    def test_a_better_model_becomes_champion_and_a_rollback_returns(self, copy: Toy):
        digest = second_model(copy, strict=0.6)
        registry = challenge(copy)
        done = promote(copy.root, copy.params, copy.dvc)
        assert done.changed and done.model_digest == digest
        assert (str(registry.by_alias(CHAMPION).version), str(registry.by_alias(PREVIOUS).version)) == ("2", "1")
        assert [row["version"] for row in read_history(copy.root)] == ["1", "2"]
        assert rollback(copy.root, copy.params).version == "1"
        assert (str(registry.by_alias(CHAMPION).version), str(registry.by_alias(PREVIOUS).version)) == ("1", "2")
        assert read_history(copy.root)[-1]["event"] == "rollback"

    def test_a_worse_model_stays_challenger(self, copy: Toy):
        second_model(copy, strict=0.3)
        challenge(copy)
        refused(copy, "text_to_image: 0.3 is more than 0.05 below the champion's 0.5")

    def test_a_value_below_a_floor_names_metric_value_and_floor(self, copy: Toy):
        copy.edit("text_to_image: 0.0, image_edit: 0.0", "text_to_image: 0.7, image_edit: 0.0")
        refused(copy, "text_to_image: 0.5 is below its floor 0.7")

    def test_missing_gates_are_no_pass(self, copy: Toy):
        (copy.root / GATES).unlink()
        refused(copy, "gates.json is missing")

    def test_unreadable_gates_are_no_pass(self, copy: Toy):
        (copy.root / GATES).write_text('{"gates": 1}')
        refused(copy, "can't be read")

    def test_edited_gates_are_noticed(self, copy: Toy):
        edit_gates(copy, strict=0.99)
        refused(copy, "is not what dvc.lock recorded")

    def test_nan_that_was_recorded_is_no_pass(self, copy: Toy):
        edit_gates(copy, strict=math.nan)
        record(copy)
        refused(copy, "measured nan")

    def test_gates_of_other_weights_are_no_pass(self, copy: Toy):
        edit_gates(copy, model_digest="0" * 64)
        record(copy)
        refused(copy, "measured on weights 000000000000")

    def test_swapped_weights_are_noticed_in_the_registry_and_in_the_check(self, copy: Toy):
        registry = Registry.open(copy.root, copy.params)
        write_weights(registry.pipeline_folder(registry.by_alias(CHALLENGER)) / "dit" / "model.safetensors", [1.0, 2.0])
        refused(copy, "its files were changed")

    def test_another_evaluation_set_than_the_measured_one_is_no_pass(self, copy: Toy):
        copy.edit("parts: [evaluation_text_to_image, evaluation_image_edit]", "parts: [evaluation_text_to_image]")
        refused(copy, "on evaluation set")

    def test_a_damaged_evaluation_shard_is_no_pass(self, copy: Toy):
        shard = copy.root / "outputs" / "shards" / "evaluation_image_edit" / "shard-000000.tar"
        shard.write_bytes(shard.read_bytes()[:-1])
        refused(copy, "can't be trusted")

    def test_without_a_challenger_there_is_nothing_to_promote(self, copy: Toy):
        Registry.open(copy.root, copy.params).client.delete_registered_model_alias("deepgen", CHALLENGER)
        refused(copy, "there is no challenger")

    def test_an_alias_moved_by_hand_shows_as_a_failing_check(self, copy: Toy):
        from orchestration.model_assets import champion_was_gated

        assert champion_was_gated(copy.root).passed
        second_model(copy)
        registry = challenge(copy)
        registry.client.set_registered_model_alias("deepgen", CHAMPION, "2")
        assert not champion_was_gated(copy.root).passed

    def test_a_version_says_what_made_it(self, finished: Toy):
        version = Registry.open(finished.root, finished.params).by_alias(CHAMPION)
        assert version.tags["model_digest"] == tensors_digest(finished.root / EXPORT)
        assert version.tags["evaluation_set_digest"] == read_json(finished.root / GATES)["evaluation_set_digest"]
        assert version.tags["dvc.sft"] == finished.dvc.recorded()["sft"]
        assert len(version.tags["git_commit"]) == 40 and version.tags["git_dirty"] in ("true", "false")

    def test_six_racers_make_one_version_and_one_promotion(self, copy: Toy):
        second_model(copy, strict=0.6)
        code = (
            "import sys, time; from pathlib import Path; root = Path(sys.argv[1])\n"
            "from orchestration.dvc import DvcCommand; from orchestration.promotion import promote\n"
            "from orchestration.registry import register_export; from runtime.params import load_params; import mlflow\n"
            "(root / sys.argv[2]).touch()\n"
            "while not (root / 'go').exists(): time.sleep(0.01)\n"
            "params, dvc = load_params(root / 'params.yaml'), DvcCommand(root)\n"
            "register_export(root, params, dvc); print(promote(root, params, dvc).changed)\n"
        )
        racers = [
            subprocess.Popen(
                [sys.executable, "-c", code, str(copy.root), f"ready{i}"],
                env=copy.environment(),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for i in range(6)
        ]
        wait_for_files([copy.root / f"ready{i}" for i in range(6)])
        (copy.root / "go").touch()
        results = [racer.communicate(timeout=180) for racer in racers]
        assert [racer.returncode for racer in racers] == [0] * 6, "\n".join(error for _, error in results)
        assert sorted(out.strip() for out, _ in results) == ["False"] * 5 + ["True"]
        assert [str(version.version) for version in Registry.open(copy.root, copy.params).versions()] == ["2", "1"]
        assert [row["version"] for row in read_history(copy.root)] == ["1", "2"]


def wait_for_files(paths: list[Path]) -> None:
    from tests.orchestration.conftest import wait_until

    wait_until(lambda: all(path.exists() for path in paths), 120, "the racers")
