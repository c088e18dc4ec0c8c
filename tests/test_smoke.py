"""The whole recipe on a clone of its own, smallest preset: one command from nothing to a champion that draws."""

import base64
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from runtime.files import read_json, tensors_digest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("data", "model", "orchestration", "runtime", "training", "presets", "foundation")
DEEPGEN = str(Path(sys.executable).parent / "deepgen")
PNG = b"\x89PNG\r\n"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

# Loads the champion where the project can't be imported: a serving machine has MLflow's copy of the code and nothing else.
ELSEWHERE = """
import base64, json, sys
sys.path = [entry for entry in sys.path if entry not in ("", sys.argv[2])]
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
try:
    import model
    sys.exit("the project can be imported here, so this proves nothing")
except ImportError:
    pass
import mlflow, pandas as pd
mlflow.set_tracking_uri(sys.argv[1])
champion = mlflow.pyfunc.load_model("models:/deepgen@champion")
drawn = champion.predict(pd.DataFrame([{"prompt": "a red circle"}]), params={"seed": 3, "steps": 2})
again = champion.predict(pd.DataFrame([{"prompt": "a red circle"}]), params={"seed": 3, "steps": 2})
edited = champion.predict(pd.DataFrame([{"prompt": "make it blue", "image": drawn[0]}]), params={"steps": 2})
print(json.dumps({"drawn": drawn[0], "again": again[0], "edited": edited[0]}))
"""


def call(root: Path, *command: str) -> "subprocess.CompletedProcess[str]":
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    environment = os.environ | {"PATH": path, "DVC_BIN": str(ROOT / ".venv-dvc" / "bin" / "dvc")}
    environment.pop("MLFLOW_TRACKING_URI", None)
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone that `deepgen preset use smoke` and `deepgen run` have gone through."""
    root = tmp_path_factory.mktemp("smoke") / "clone"
    for room in ROOMS:
        if (ROOT / room).exists():
            shutil.copytree(ROOT / room, root / room, ignore=shutil.ignore_patterns("__pycache__", "work"))
    for file in ("dvc.yaml", "params.yaml", "pyproject.toml", ".gitignore", ".dvcignore", ".dvc/config", ".dvc/.gitignore"):
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / file, root / file)
    git = ["git", "-c", "user.name=smoke", "-c", "user.email=smoke@example.org"]
    for arguments in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "smoke"]):
        assert call(root, *git, *arguments).returncode == 0
    assert call(root, DEEPGEN, "preset", "use", "smoke").returncode == 0
    done = call(root, DEEPGEN, "run")
    assert done.returncode == 0, done.stdout + done.stderr
    (root / "first_run.txt").write_text(done.stdout)
    return root


def test_one_command_goes_from_nothing_to_a_champion(clone: Path):
    said = (clone / "first_run.txt").read_text()
    assert "is champion" in said and "right on the evaluation set" in said
    for stage in ("alignment", "sft", "mr_grpo"):
        assert (clone / "outputs" / stage / "grid.png").read_bytes().startswith(PNG)


def test_the_exported_weights_are_the_evaluated_ones(clone: Path):
    gates = read_json(clone / "outputs" / "evaluation" / "mr_grpo" / "gates.json")
    assert tensors_digest(clone / "outputs" / "exports" / "diffusers") == gates["model_digest"]


def test_dvc_repro_has_nothing_to_do_after_it(clone: Path):
    done = call(clone, str(ROOT / ".venv-dvc" / "bin" / "dvc"), "repro")
    assert done.returncode == 0 and "Running stage" not in done.stdout and "up to date" in done.stdout


def test_the_champion_draws_and_edits_from_the_command_line(clone: Path, tmp_path: Path):
    picture, changed = tmp_path / "a.png", tmp_path / "b.png"
    assert call(clone, DEEPGEN, "generate", "a red circle", "--out", str(picture), "--seed", "3").returncode == 0
    assert call(clone, DEEPGEN, "edit", str(picture), "make the circle blue", "--out", str(changed)).returncode == 0
    assert picture.read_bytes().startswith(PNG) and changed.read_bytes().startswith(PNG)


def test_the_champion_loads_from_the_registry_where_the_project_is_not(clone: Path, tmp_path: Path):
    store = f"sqlite:///{clone / 'outputs' / 'mlflow' / 'mlflow.db'}"
    done = call(tmp_path, sys.executable, "-c", ELSEWHERE, store, str(ROOT))
    assert done.returncode == 0, done.stderr
    pictures = json.loads(done.stdout.splitlines()[-1])
    assert all(base64.b64decode(picture).startswith(PNG) for picture in pictures.values())
    assert pictures["drawn"] == pictures["again"] != pictures["edited"]


def test_a_registered_model_holds_no_pickle(clone: Path):
    names = {file.suffix for file in (clone / "outputs" / "mlflow" / "artifacts" / "models").rglob("*") if file.is_file()}
    assert names.isdisjoint({".pkl", ".pickle", ".pt", ".pth", ".bin"})
