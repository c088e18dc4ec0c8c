"""What the page of a run shows while a stage runs and when it fails, and which failures are tried again."""

import base64
import io
import os
import random
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from PIL import Image

from orchestration import assets, tail
from orchestration.tail import Pace, folder_of, numbers_of
from runtime import exits
from runtime.stage import picture_markdown
from tests.orchestration.conftest import Toy, failure_text


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every look tells what is new, a step takes long enough to be seen, and a retry comes at once."""
    for name, value in {"LOOK_SECONDS": 0.05, "LINE_SECONDS": 0.0, "NUMBERS_SECONDS": 0.0, "PICTURE_SECONDS": 0.0}.items():
        monkeypatch.setattr(tail, name, value)
    monkeypatch.setattr(assets, "RETRY_SECONDS", 0.0)
    monkeypatch.setenv("TOY_SECONDS", "0.3")


def observed(instance: dg.DagsterInstance, asset: str) -> list[dict[str, Any]]:
    """Metadata of an asset's observations, oldest first."""
    records = instance.fetch_observations(dg.AssetKey(asset), limit=100).records
    return [{name: value.value for name, value in record.asset_observation.metadata.items()} for record in reversed(records)]


def test_while_a_stage_runs_its_page_gets_lines_numbers_and_the_board(with_shards: Toy, quick: None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TOY_BOARD", "alignment")
    with dg.DagsterInstance.ephemeral() as instance:
        result = with_shards.materialize("alignment", instance=instance)
        rows = observed(instance, "alignment")
        lines = [record.event_log_entry.user_message for record in instance.get_records_for_run(result.run_id).records]
        events = instance.all_logs(result.run_id)
    assert result.success
    steps = [row["step"] for row in rows if "total" in row]
    assert steps == sorted(set(steps)) and steps[-1] == 4 and len(steps) >= 2
    last = [row for row in rows if "total" in row][-1]
    assert last["total"] == 4 and last["loss"] == 0.25 and last["rate"] > 0 and last["eta_s"] == 0
    (board,) = [row for row in rows if "board" in row]
    assert board["board"].startswith("![step-000002](data:image/png;base64,") and board["step"] == 2
    assert any(line.startswith("alignment: 4/4  ") and "loss 0.25" in line for line in lines)
    order = [event.dagster_event.event_type_value for event in events if event.is_dagster_event]
    assert order.index("ASSET_OBSERVATION") < order.index("ASSET_MATERIALIZATION")


def test_a_tail_that_fails_says_so_once_and_the_stage_goes_on(
    with_shards: Toy, quick: None, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    def full(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(tail.Tail, "_observe", full)
    assert with_shards.materialize("alignment").success
    assert capfd.readouterr().out.count("its progress can't be shown (OSError: no space left on device)") == 1


def test_a_run_of_a_week_leaves_a_page_that_can_be_read(monkeypatch: pytest.MonkeyPatch):
    now = 0.0
    monkeypatch.setattr(tail.time, "monotonic", lambda: now)
    pace, told = Pace(60.0, 0.1), 0
    while now < 7 * 24 * 3600:
        told += pace.due()
        now += 30
    assert 30 < told < 120


def test_the_run_folder_is_the_one_that_this_very_process_holds(toy: Toy):
    stage = toy.stages["alignment"]
    runs = toy.root / "outputs" / "runs" / "alignment"
    for name, writer in {"mine": str(os.getpid()), "other": "1", "old": ""}.items():
        (runs / name).mkdir(parents=True)
        (runs / name / "lock").write_text(writer)
    assert folder_of(toy.root, stage, os.getpid()) == runs / "mine"
    assert folder_of(toy.root, stage, os.getppid()) == runs / "mine", "a rank is a child of the command"
    (runs / "mine" / "lock").write_text("")
    assert folder_of(toy.root, stage, os.getpid()) is None


def test_a_loss_that_is_no_number_is_shown_as_a_word():
    assert numbers_of({"time": 1.0, "step": 3, "loss": float("nan")}) == {"step": 3, "loss": "nan"}


def test_a_stage_that_is_killed_once_is_finished_by_the_same_materialization(
    with_shards: Toy, quick: None, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("TOY_KILL", "alignment")
    result = with_shards.materialize("alignment")
    assert result.success and len(result.asset_materializations_for_node("alignment")) == 1
    said = capfd.readouterr().out
    assert "alignment: killed (SIGKILL)" in said and "Tried again in 0 s, 1 of 2." in said
    assert "alignment: from step 2\n" in said, "it went on from what it had saved"
    assert with_shards.dvc.is_clean("alignment")


def test_what_would_fail_again_is_not_tried_again(with_shards: Toy, quick: None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TOY_FAIL", "alignment")
    result = with_shards.materialize("alignment")
    assert not any(event.is_step_up_for_retry for event in result.all_events)
    assert "failed with exit code 7" in failure_text(result, "alignment")


@pytest.mark.parametrize("code", [exits.FAILED, exits.BAD_PARAMS, exits.INPUTS_CHANGED, exits.LOCKED, exits.INTERRUPTED])
def test_no_code_that_a_person_must_answer_is_tried_again(code: int):
    assert code not in assets.PASSING


def test_the_page_of_a_failure_names_the_checkpoint_and_the_command(with_shards: Toy, quick: None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TOY_KILL", "alignment")
    monkeypatch.setattr(assets, "RETRIES", 0)
    result = with_shards.materialize("alignment")
    metadata = result.failure_data_for_node("alignment").user_failure_data.metadata
    assert Path(metadata["last_checkpoint"].value).name == "step-000002"
    assert metadata["command"].value == "deepgen run (this stage alone: dvc repro --single-item alignment)"
    assert metadata["exit_code"].value == -9


def test_a_large_picture_is_made_smaller_for_the_page_and_says_where_it_is_whole(tmp_path: Path):
    noise = Image.frombytes("RGB", (600, 600), random.Random(0).randbytes(600 * 600 * 3))
    noise.save(tmp_path / "board.png")
    shown = picture_markdown(tmp_path / "board.png")
    png = base64.b64decode(shown.partition("base64,")[2].partition(")")[0])
    assert len(png) <= 150_000 < (tmp_path / "board.png").stat().st_size
    assert 100 < Image.open(io.BytesIO(png)).width < 600 and f"in `{tmp_path / 'board.png'}`" in shown


def test_dagster_and_mlflow_name_each_others_run(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    reported = {"mlflow_run_id": dg.MetadataValue.text("abc"), "mlflow_experiment_id": dg.MetadataValue.text("1")}
    assert assets.mlflow_link(reported)["MLflow"].value == "http://127.0.0.1:5000/#/experiments/1/runs/abc?workflowType=machine_learning"
    monkeypatch.setenv("DEEPGEN_MLFLOW_ADDRESS", "http://127.0.0.1:5050")
    assert ":5050/#/" in assets.mlflow_link(reported)["MLflow"].value
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://mlflow.example.org/")
    assert assets.mlflow_link(reported)["MLflow"].value.startswith("https://mlflow.example.org/#/experiments/")
    assert assets.mlflow_link({}) == {}, "a data stage has no run in MLflow"


def test_a_stage_command_knows_which_run_of_dagster_started_it(with_shards: Toy, quick: None, capfd: pytest.CaptureFixture[str]):
    with_shards.edit(
        '    print(f"{stage}: from step', '    print("by", os.environ["DEEPGEN_DAGSTER_RUN"])\n    print(f"{stage}: from step', "toy.py"
    )
    result = with_shards.materialize("alignment")
    assert f"by {result.run_id}\n" in capfd.readouterr().out
