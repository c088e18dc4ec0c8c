"""The databases under outputs/: made once, by whoever comes first, and at home wherever the clone lies."""

import os
import shutil
from pathlib import Path

import pytest

from benchmarks.cold_start import open_at_once, problems_of
from runtime.mlflow_store import open_store, owner


@pytest.mark.slow
def test_four_processes_on_a_fresh_home_all_succeed_and_leave_it_usable(tmp_path: Path):
    assert open_at_once(tmp_path, 4) == [""] * 4
    assert open_at_once(tmp_path, 1) == [""]
    assert problems_of(tmp_path, runs=5) == []


@pytest.mark.slow
def test_moving_the_clone_breaks_nothing(tmp_path: Path):
    from mlflow import MlflowClient
    from mlflow.artifacts import download_artifacts

    old, new = tmp_path / "old place", tmp_path / "new place" / "clone"
    client = MlflowClient(open_store(old), open_store(old))
    run = client.create_run(client.get_experiment_by_name("deepgen").experiment_id).info.run_id
    (tmp_path / "note.txt").write_text("kept")
    client.log_artifact(run, str(tmp_path / "note.txt"))
    new.parent.mkdir()
    shutil.move(old, new)
    uri = open_store(new)
    moved = MlflowClient(uri, uri)
    assert moved.get_run(run).info.artifact_uri.startswith(new.as_uri())
    assert Path(download_artifacts(run_id=run, artifact_path="note.txt", tracking_uri=uri)).read_text() == "kept"
    assert moved.get_experiment_by_name("deepgen").artifact_location.startswith(new.as_uri())
    assert not old.exists(), "nothing is written to the old place"


def test_a_tracking_server_of_your_own_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    assert open_store(tmp_path) == "http://127.0.0.1:9"
    assert os.listdir(tmp_path) == []


def test_a_copy_that_dvc_made_for_an_experiment_uses_the_store_of_its_clone(tmp_path: Path):
    clone = tmp_path / "clone"
    assert owner(clone / ".dvc" / "tmp" / "exps" / "tmp1a2b") == owner(clone) == clone
