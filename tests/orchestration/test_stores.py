"""The databases under outputs/: made once, by whoever comes first, and at home wherever the clone lies."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from runtime.mlflow_store import open_store
from tests.orchestration.conftest import Toy

COLD_START = """
import sys, time
from pathlib import Path
root = Path(sys.argv[1])
while not (root / "go").exists():
    time.sleep(0.01)
from orchestration.stores import init_stores
init_stores(root)
import dagster as dg
from mlflow import MlflowClient
from runtime.mlflow_store import open_store
with dg.DagsterInstance.get() as instance:
    instance.get_runs()
    instance.event_log_storage.get_pool_limits()
client = MlflowClient(open_store(root))
client.log_metric(client.create_run(client.get_experiment_by_name("deepgen").experiment_id).info.run_id, "x", 1.0)
"""


@pytest.mark.slow
def test_four_processes_on_a_fresh_home_all_succeed_and_leave_it_usable(toy: Toy):
    processes = [
        subprocess.Popen([sys.executable, "-c", COLD_START, str(toy.root)], env=toy.environment(), stderr=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    (toy.root / "go").write_text("")
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * 4, "\n".join(errors)
    again = subprocess.run([sys.executable, "-c", COLD_START, str(toy.root)], env=toy.environment(), capture_output=True, text=True)
    assert again.returncode == 0, again.stderr


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
