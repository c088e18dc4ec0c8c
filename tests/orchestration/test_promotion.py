"""Promotion measures for itself: whatever is missing, stale, edited, swapped or not a number, the champion stays."""

import math
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from typer.testing import CliRunner

from orchestration.approval import APPROVALS, approve
from orchestration.cli import app
from orchestration.config import GatesConfig
from orchestration.evidence import GateFailed, check_gates
from orchestration.journal import append_row, read_rows
from orchestration.model_assets import build_rollback_job
from orchestration.promotion import promote, rollback
from orchestration.promotion_log import read_history
from orchestration.registry import CHALLENGER, CHAMPION, EXPORT, GATES, PREVIOUS, NotRegistered, Untrusted, find_pickle
from runtime.files import read_json, tensors_digest
from tests.orchestration.conftest import Toy
from tests.orchestration.promoting import NothingChanged, aliases, challenge, open_registry, refused, second_model, weights_of
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


def test_a_metric_may_have_a_tolerance_of_its_own_if_it_has_a_floor():
    own = GatesConfig(floors=FLOORS.floors, regression_tolerance=0.05, tolerances={"text_to_image": 0.2})
    assert check_gates([gate(0.41)], own, {"text_to_image": 0.6})[0] == []
    assert "more than 0.2 below" in check_gates([gate(0.4)], own, {"text_to_image": 0.61})[0][0]
    with pytest.raises(ValidationError, match="names 'text_to_imge', which has no floor"):
        GatesConfig(floors=FLOORS.floors, tolerances={"text_to_imge": 0.2})


def test_no_floors_are_no_gates():
    with pytest.raises(ValidationError, match="floors"):
        GatesConfig(floors={})


@pytest.mark.parametrize("value", [math.nan, None, "0.1"])
def test_a_champion_whose_value_is_no_number_is_no_low_bar(value: Any):
    assert "the champion has" in check_gates([gate(0.9)], FLOORS, {"text_to_image": value})[0][0]


def test_a_gate_without_a_floor_is_a_finite_number_as_well():
    assert check_gates([gate(0.9), gate(math.nan, "image_edit")], FLOORS, None)[0] == ["image_edit: measured nan, no finite number"]


class TestJournal:
    def test_rows_are_appended_and_what_was_written_is_never_touched(self, tmp_path: Path):
        path = tmp_path / "journal.jsonl"
        append_row(path, {"n": 1})
        before = path.read_bytes()
        append_row(path, {"n": 2})
        assert path.read_bytes().startswith(before) and read_rows(path) == ([{"n": 1}, {"n": 2}], [])

    def test_a_line_cut_by_a_kill_is_noticed_and_takes_no_later_row_with_it(self, tmp_path: Path):
        path = tmp_path / "journal.jsonl"
        append_row(path, {"n": 1})
        torn = path.read_bytes() + b'{"n": 2, "x'
        path.write_bytes(torn)
        assert read_rows(path) == ([{"n": 1}], [2])
        append_row(path, {"n": 3})
        assert path.read_bytes().startswith(torn) and read_rows(path) == ([{"n": 1}, {"n": 3}], [2])

    def test_a_number_that_json_has_no_name_for_is_not_written(self, tmp_path: Path):
        with pytest.raises(ValueError):
            append_row(tmp_path / "journal.jsonl", {"value": math.nan})
        assert not (tmp_path / "journal.jsonl").exists()


class TestPickles:
    @pytest.mark.parametrize(
        ("name", "content"),
        [
            ("unet.bin", b""),
            ("optimizer.pt", b""),
            ("python_model.pkl", b""),
            ("last.ckpt", b""),
            ("harmless.json", b"\x80\x05\x95"),
            ("harmless.txt", b"PK\x03\x04"),
            ("MLmodel", b"flavors: {python_function: {loader_module: mlflow.pyfunc.model, python_model: python_model.pkl}}"),
            ("MLmodel", b"flavors: {python_function: {loader_module: mlflow.pyfunc.loaders.code_model, python_model: x.dat}}"),
            ("MLmodel", b"flavors: {sklearn: {pickled_model: model.dat, serialization_format: cloudpickle}}"),
            ("MLmodel", b"flavors: ["),
        ],
    )
    def test_a_pickle_is_found_by_its_name_its_first_bytes_or_what_mlflow_is_told_to_load(self, tmp_path: Path, name: str, content: bytes):
        (tmp_path / "inside").mkdir()
        (tmp_path / "config.json").write_text("{}")
        assert find_pickle(tmp_path) is None
        (tmp_path / "inside" / name).write_bytes(content)
        assert find_pickle(tmp_path) == f"inside/{name}"

    def test_weights_whose_header_begins_as_a_pickle_does_are_none(self, tmp_path: Path):
        (tmp_path / "model.safetensors").write_bytes(b"\x80\x02" + bytes(6))
        assert find_pickle(tmp_path) is None


@pytest.mark.slow
class TestWithARegistry:
    def test_the_same_weights_are_promoted_once(self, copy: Toy):
        done = promote(copy.root, copy.params, copy.dvc)
        assert not done.changed and "champion already" in done.message
        assert len(read_history(copy.root)) == 1

    def test_a_better_model_becomes_champion_and_a_rollback_returns(self, copy: Toy):
        digest = second_model(copy, strict=0.625)
        challenge(copy)
        done = promote(copy.root, copy.params, copy.dvc, reason="it counts better")
        assert done.changed and done.model_digest == digest
        assert aliases(copy) == {CHALLENGER: "2", CHAMPION: "2", PREVIOUS: "1"}
        assert rollback(copy.root, copy.params).version == "1"
        assert aliases(copy) == {CHALLENGER: "2", CHAMPION: "1", PREVIOUS: "2"}
        assert rollback(copy.root, copy.params).version == "2", "a second one takes the first one back"
        rows = read_history(copy.root)
        assert [(row["event"], row["version"], row["previous"]) for row in rows] == [
            ("promotion", "1", None),
            ("promotion", "2", "1"),
            ("rollback", "1", "2"),
            ("rollback", "2", "1"),
        ]
        assert rows[0]["via"].startswith("dagster run ") and rows[1]["reason"] == "it counts better"
        assert all(row["user"] and row["host"] and row["gates"] and row["files_digest"] for row in rows)

    def test_a_rollback_is_a_button_too(self, copy: Toy):
        second_model(copy)
        challenge(copy)
        promote(copy.root, copy.params, NothingChanged(copy.root))
        config = {"ops": {"roll_back": {"config": {"reason": "it draws worse"}}}}
        result = build_rollback_job(copy.root).execute_in_process(run_config=config)
        row = read_history(copy.root)[-1]
        assert (row["event"], row["version"], row["reason"]) == ("rollback", "1", "it draws worse") and row["via"].endswith(result.run_id)
        (shown,) = result.asset_materializations_for_node("roll_back")
        assert shown.asset_key.to_user_string() == CHAMPION and shown.metadata["version"].value == "1"

    def test_a_rollback_refuses_a_version_whose_files_were_changed(self, copy: Toy):
        second_model(copy)
        registry = challenge(copy)
        promote(copy.root, copy.params, NothingChanged(copy.root))
        write_weights(weights_of(registry, "1"), [1.0, 2.0])
        with pytest.raises(Untrusted, match="its files were changed"):
            rollback(copy.root, copy.params)
        registry.tag(registry.get("1"), {"model_digest": tensors_digest(weights_of(registry, "1").parent.parent)})
        with pytest.raises(GateFailed, match="is not what was promoted"):
            rollback(copy.root, copy.params)
        assert aliases(copy)[CHAMPION] == "2" and len(read_history(copy.root)) == 2

    def test_a_worse_model_stays_challenger(self, copy: Toy):
        second_model(copy, strict=0.375)
        challenge(copy)
        refused(copy, "text_to_image: 0.375 is more than 0.05 below the champion's 0.5")

    def test_a_value_below_a_floor_names_metric_value_and_floor(self, copy: Toy):
        copy.edit("text_to_image: 0.0, image_edit: 0.0", "text_to_image: 0.7, image_edit: 0.0")
        refused(copy, "text_to_image: 0.5 is below its floor 0.7")

    def test_without_a_challenger_there_is_nothing_to_promote(self, copy: Toy):
        open_registry(copy).client.delete_registered_model_alias("deepgen", CHALLENGER)
        refused(copy, "there is no challenger")

    def test_a_version_says_what_made_it(self, finished: Toy):
        version = open_registry(finished).by_alias(CHAMPION)
        assert version.tags["model_digest"] == tensors_digest(finished.root / EXPORT)
        assert version.tags["evaluation_set_digest"] == read_json(finished.root / GATES)["evaluation_set_digest"]
        assert version.tags["dvc.sft"] == finished.dvc.recorded()["sft"]
        assert len(version.tags["git_commit"]) == 40 and version.tags["git_dirty"] in ("true", "false")


@pytest.mark.slow
class TestApproval:
    @pytest.fixture
    def waiting(self, copy: Toy) -> Toy:
        """Version 2 passes every gate, and params.yaml asks for a person's word."""
        second_model(copy)
        challenge(copy)
        copy.edit("require_approval: false", "require_approval: true")
        return copy

    def test_without_one_nothing_is_promoted_and_with_one_the_log_says_whose(self, waiting: Toy, monkeypatch: pytest.MonkeyPatch):
        refused(waiting, "nobody approved weights .*deepgen approve 2 --by NAME")
        monkeypatch.chdir(waiting.root)
        done = CliRunner().invoke(app, ["approve", "2", "--by", "Ada", "--reason", "looked at all pictures"])
        assert done.exit_code == 0 and "approved by Ada" in done.output, done.output
        assert promote(waiting.root, waiting.params, waiting.dvc).version == "2"
        approval = read_history(waiting.root)[-1]["approval"]
        assert (approval["by"], approval["reason"]) == ("Ada", "looked at all pictures")

    def test_one_of_other_weights_or_of_another_evaluation_set_does_not_count(self, waiting: Toy):
        dvc = NothingChanged(waiting.root)
        approve(waiting.root, waiting.params, dvc, "2", by="Ada")
        (row,), _ = read_rows(waiting.root / APPROVALS)
        (waiting.root / APPROVALS).unlink()
        for other in ({"model_digest": "0" * 64}, {"evaluation_set_digest": "0" * 64}):
            append_row(waiting.root / APPROVALS, row | other)
        refused(waiting, "nobody approved", dvc)

    def test_what_was_not_measured_or_is_not_there_is_not_approved(self, waiting: Toy):
        dvc = NothingChanged(waiting.root)
        with pytest.raises(GateFailed, match="measured on weights"):
            approve(waiting.root, waiting.params, dvc, "1", by="Ada")
        with pytest.raises(NotRegistered, match="no version 7; there are: 1, 2"):
            approve(waiting.root, waiting.params, dvc, "7", by="Ada")
        assert not (waiting.root / APPROVALS).exists()


@pytest.mark.slow
def test_a_model_of_another_name_is_not_taken_for_this_ones(copy: Toy):
    registry = open_registry(copy)
    assert registry.resolve("models:/deepgen@champion").version == registry.resolve("models:/deepgen/1").version
    with pytest.raises(NotRegistered, match="models:/other@champion: the model of this project is deepgen"):
        registry.resolve("models:/other@champion")
