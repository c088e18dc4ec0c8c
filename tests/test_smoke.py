"""The smoke recipe in a clone: killed on the way, finished, reproduced by DVC elsewhere, and served, all without a network."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from benchmarks.faults import clone, outputs_of, stop_in
from runtime.mlflow_store import open_store

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]  # a whole run: about six minutes of two quiet cores


def run(root: Path, *command: str, **environment: str) -> subprocess.CompletedProcess:
    """A command of the clone's environment, in a network namespace without interfaces where the machine allows one."""
    path = f"{root / '.venv' / 'bin'}:{os.environ['PATH']}"
    offline = (
        ["unshare", "--map-root-user", "--net"] if subprocess.run(["unshare", "-rn", "true"], capture_output=True).returncode == 0 else []
    )
    return subprocess.run(
        [*offline, *command],
        cwd=root,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(root), "PATH": path} | environment,
    )


DEEPGEN = ("python", "-c", "import sys; from orchestration.cli import main; sys.argv[0] = 'deepgen'; main()")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone whose run lost its orchestrator, in SFT, to SIGKILL, and was then run to the end."""
    root = clone(tmp_path_factory.mktemp("smoke") / "clone")
    row = stop_in(root, "sft", "orchestrator", 6.0, root.parent / "run.log")
    assert row.exit_code != 0, "a killed run must not look like success"
    assert row.gone_s is not None, "a killed run left something running"
    done = run(root, *DEEPGEN, "run")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (root.parent / "said.txt").write_text(done.stdout)
    return root


def test_the_run_ends_with_a_summary_of_scores_pictures_and_next_commands(finished: Path):
    said = (finished.parent / "said.txt").read_text()
    for words in (
        "alignment",
        "image_edit",
        "text_to_image",
        "pictures",
        "outputs/report/index.html",
        "make ui",
        "deepgen generate",
        "version 1 is champion",
    ):
        assert words in said


def test_dvc_has_nothing_to_do_after_the_run(finished: Path):
    status = run(finished, "dvc", "status", "--json")
    assert json.loads(status.stdout or "{}") == {}, status.stdout


def test_dvc_shows_scores_losses_rewards_and_pictures(finished: Path, tmp_path: Path):
    shown = json.loads(run(finished, "dvc", "metrics", "show", "--json").stdout)[""]["data"]
    for stage in ("alignment", "sft", "mr_grpo"):
        assert shown[f"outputs/evaluation/{stage}/metrics.json"]["data"]["text_to_image"]["n"] > 0
        assert shown[f"outputs/{stage}/metrics.json"]["data"]["steps"] > 0
    done = run(finished, "dvc", "plots", "show", "--out", str(tmp_path))
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr
    page = (tmp_path / "index.html").read_text()
    assert "loss by step" in page and "reward by step" in page
    assert any("accuracy" in picture.name for picture in (tmp_path / "static").iterdir())


def test_dvc_repro_in_another_clone_gives_the_same_bytes_everywhere(finished: Path, tmp_path: Path):
    other = clone(tmp_path / "other")
    done = run(other, "dvc", "repro")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert outputs_of(other) == outputs_of(finished)
    locks = [yaml.safe_load((root / "dvc.lock").read_text()) for root in (other, finished)]
    assert locks[0] == locks[1], "the same but for the order in which the stages ran"


def test_the_champion_draws_edits_and_is_the_registered_model_loaded_elsewhere(finished: Path, tmp_path: Path):
    drawn = run(finished, *DEEPGEN, "generate", "a red circle", "--out", "drawn.png", "--seed", "3", "--steps", "2")
    assert drawn.returncode == 0, drawn.stderr
    edited = run(finished, *DEEPGEN, "edit", "drawn.png", "make the circle green", "--out", "edited.png", "--steps", "2")
    assert edited.returncode == 0, edited.stderr
    assert (finished / "edited.png").read_bytes()[:4] == b"\x89PNG"
    code = (
        "import base64, mlflow, pandas, sys; from runtime.mlflow_store import open_store; from pathlib import Path;"
        "mlflow.set_tracking_uri(open_store(Path(sys.argv[1])));"
        "model = mlflow.pyfunc.load_model('models:/deepgen@champion');"
        "made = model.predict(pandas.DataFrame({'prompt': ['a red circle']}), params={'seed': 3, 'steps': 2, 'guidance': 1.0});"
        "Path(sys.argv[2]).write_bytes(base64.b64decode(list(made)[0]))"
    )
    served = run(finished, "python", "-c", code, str(finished), str(tmp_path / "served.png"))
    assert served.returncode == 0, served.stderr[-3000:]
    import numpy as np
    from PIL import Image

    images = [np.asarray(Image.open(path)) for path in (tmp_path / "served.png", finished / "drawn.png")]
    assert np.array_equal(*images), "one seed, one image, whoever loads the model"


def test_runs_are_tied_to_their_inputs_by_digest_in_mlflow(finished: Path):
    from mlflow import MlflowClient

    from runtime.files import sha256_path

    client = MlflowClient(open_store(finished))
    runs = client.search_runs([e.experiment_id for e in client.search_experiments()], filter_string="tags.stage = 'sft'")
    digests = {dataset.dataset.name: dataset.dataset.digest for dataset in runs[0].inputs.dataset_inputs}
    assert digests["outputs/alignment"] == sha256_path(finished / "outputs" / "alignment")[:32]
    assert digests["outputs/mixture/sft.json"] == sha256_path(finished / "outputs" / "mixture" / "sft.json")[:32]


def test_a_sweep_of_dvc_lands_in_this_clones_mlflow_and_leaves_its_outputs(finished: Path, tmp_path: Path):
    from mlflow import MlflowClient

    root = tmp_path / "sweep"
    shutil.copytree(finished, root, symlinks=True)
    git = ["git", "-c", "user.name=smoke", "-c", "user.email=smoke@example.org"]
    assert run(root, *git, "add", "-A").returncode == run(root, *git, "commit", "-qm", "ran").returncode == 0
    identity = {f"GIT_{who}_{what}": "smoke" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    swept = run(root, "dvc", "exp", "run", "--temp", "--name", "three", "--set-param", "mr_grpo.steps=3", "mr_grpo", **identity)
    assert swept.returncode == 0, swept.stdout[-3000:] + swept.stderr[-3000:]
    client = MlflowClient(open_store(root))
    (found,) = client.search_runs([client.get_experiment_by_name("deepgen").experiment_id], "tags.`dvc.experiment` = 'three'")
    assert found.info.status == "FINISHED" and found.data.params["mr_grpo.steps"] == "3"
    assert json.loads((root / "outputs" / "mr_grpo" / "metrics.json").read_text())["steps"] == 2


def test_a_second_run_in_a_moved_clone_finds_everything_done_and_in_place(finished: Path, tmp_path: Path):
    moved = tmp_path / "moved"
    shutil.copytree(finished, moved, symlinks=True)
    again = run(moved, *DEEPGEN, "run")
    assert again.returncode == 0 and "nothing to do" in again.stdout, again.stdout[-2000:] + again.stderr[-2000:]
    drawn = run(moved, *DEEPGEN, "generate", "a red circle", "--out", "moved.png", "--steps", "2")
    assert drawn.returncode == 0, drawn.stderr


def test_wrong_params_stop_a_run_before_any_work(finished: Path, tmp_path: Path):
    root = clone(tmp_path / "wrong")
    params = root / "params.yaml"
    params.write_text(params.read_text().replace("steps: 4", "steps: -4", 1))
    refused = run(root, *DEEPGEN, "run")
    assert refused.returncode == 2
    assert "alignment.steps: -4 given; input should be greater than 0" in refused.stderr + refused.stdout
    assert not (root / "outputs" / "shards").exists()
