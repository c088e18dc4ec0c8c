"""`deepgen gc` says what may go and why, and takes nothing that is registered, recorded, running or young."""

import fcntl
import os
import shutil
import time
from pathlib import Path

import pytest
import yaml

from orchestration.gc import Garbage, find_garbage, remove_garbage, size_of
from orchestration.registry import Registry
from runtime.files import write_json
from runtime.recipe import load_stages
from runtime.run_folder import register_checkpoint, tell_score
from runtime.stage import stage_digests
from tests.orchestration.conftest import Toy, make_toy

STAGE = "shards@drawn_text_to_image"
OLD = time.time() - 40 * 86400


def run_folder(
    root: Path, fingerprint: str, digests: dict[str, str] | None = None, when: float = OLD, size: int = 1000, stage: str = STAGE
) -> Path:
    """A run of a stage, with other digests than the present ones if none are given."""
    folder = root / "outputs" / "runs" / stage.replace("@", "/") / fingerprint
    folder.mkdir(parents=True)
    (folder / "lock").touch()
    (folder / "weights").write_bytes(bytes(size))
    write_json(folder / "run.json", {"stage": stage, "fingerprint": fingerprint, "digests": digests or {"params": fingerprint}})
    age(folder, when)
    return folder


def age(folder: Path, when: float = OLD) -> None:
    for path in (*folder.rglob("*"), folder):
        os.utime(path, (when, when))


def mlflow_run(registry: Registry, folder: Path, ended: float = OLD) -> str:
    """An ended MLflow run that names a run folder, with a picture."""
    experiment = registry.client.get_experiment_by_name(registry.params.registry.experiment)
    run_id = registry.client.create_run(experiment.experiment_id, tags={"run_folder": str(folder.relative_to(registry.root))}).info.run_id
    registry.client.log_text(run_id, "x" * 500, "pictures/grid.txt")
    registry.client.set_terminated(run_id, end_time=int(ended * 1000))
    return run_id


def paths(found: list[Garbage], root: Path) -> set[str]:
    return {str(item.path.relative_to(root)) for item in found}


@pytest.fixture(scope="module")
def _once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    toy = make_toy(tmp_path_factory.mktemp("gc") / "toy")
    Registry.open(toy.root, toy.params)
    return toy.root


@pytest.fixture
def clean(_once: Path, tmp_path: Path) -> Toy:
    """A toy with an empty MLflow store and nothing else under outputs/."""
    shutil.copytree(_once, tmp_path / "toy", symlinks=True)
    return Toy((tmp_path / "toy").resolve())


def found(toy: Toy) -> set[str]:
    return paths(find_garbage(toy.root, toy.params), toy.root)


def test_an_old_run_of_other_params_goes_and_a_young_a_present_and_a_running_one_stay(clean: Toy):
    root = clean.root
    values = yaml.safe_load((root / "params.yaml").read_text())
    old, running = run_folder(root, "old"), run_folder(root, "running")
    run_folder(root, "young", when=time.time())
    run_folder(root, "present", stage_digests(root, load_stages(root, values)[STAGE], values))
    with open(running / "lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert found(clean) == {str(old.relative_to(root))}
        hasty = [Garbage(path, 0, "") for path in (old, running)]
        assert [item.path for item in remove_garbage(root, clean.params, hasty)] == [old], "one that started meanwhile stays"
        assert running.is_dir() and not old.exists()


def test_what_a_registered_version_came_from_stays_whatever_its_age(clean: Toy):
    root = clean.root
    registry = Registry.open(root, clean.params)
    parent, own, loose = (run_folder(root, name) for name in ("parent", "own", "loose"))
    for folder in (parent, own, loose):
        (folder / "step-000002.bad").mkdir()
        age(folder)
    parent_id, own_id, loose_id = (mlflow_run(registry, folder) for folder in (parent, own, loose))
    registry.client.create_registered_model("somebody_elses")
    registry.client.create_model_version("somebody_elses", str(root / "x"), run_id=own_id, tags={"parent_run.alignment": parent_id})
    left = found(clean)
    assert left == {str(loose.relative_to(root)), f"outputs/mlflow/artifacts/{loose_id}/artifacts"}
    hasty = [Garbage(path, 0, "") for path in (parent, own / "step-000002.bad", root / "outputs" / "runs")]
    assert remove_garbage(root, clean.params, hasty) == [], "nor by a list from before it was registered, nor with what holds it"


def test_artifacts_of_young_and_running_mlflow_runs_stay(clean: Toy):
    registry = Registry.open(clean.root, clean.params)
    folder = run_folder(clean.root, "young", when=time.time())
    mlflow_run(registry, folder, ended=time.time())
    running = mlflow_run(registry, folder)
    registry.client.update_run(running, status="RUNNING")
    assert found(clean) == set()


def test_damaged_checkpoints_those_before_the_last_of_a_finished_run_and_leftovers_of_the_dead_go(clean: Toy):
    root = clean.root
    folder = run_folder(root, "run", when=time.time())
    for name in ("step-000001", "step-000002", "step-000003", "step-000004", "step-000001.bad"):
        write_json(folder / name / "complete.json", {})
    tell_score(folder / "step-000001", 0.5)
    register_checkpoint(folder / "step-000003")
    assert found(clean) == {f"{folder.relative_to(root)}/step-000001.bad"}, "an unfinished run keeps what it may go back to"
    write_json(folder / "ended.json", {"state": "finished", "error": None, "time": time.time()})
    (root / "outputs" / ".sft.999999999.old").mkdir()
    (root / "outputs" / f".sft.{os.getpid()}.tmp").touch()
    (root / "outputs" / "added" / "mine").mkdir(parents=True)
    age(root / "outputs" / "added")
    here = str(folder.relative_to(root))
    expected = {f"{here}/step-000001.bad", f"{here}/step-000002", "outputs/.sft.999999999.old", "outputs/added/mine"}
    assert found(clean) == expected


@pytest.mark.parametrize("kind", ["experiments", "reproduce"])
def test_old_experiments_and_reproductions_go_and_what_they_link_to_stays(clean: Toy, kind: str):
    root = clean.root
    for name in ("old", "new"):
        folder = root / "outputs" / kind / name
        folder.mkdir(parents=True)
        (folder / "toy.py").symlink_to(root / "toy.py")
        (folder / "params.yaml").write_text("")
    for path in (root / "outputs" / kind / "old").iterdir():
        os.utime(path, (0, 0), follow_symlinks=False)
    os.utime(root / "outputs" / kind / "old", (0, 0))
    assert found(clean) == {f"outputs/{kind}/old"}
    remove_garbage(root, clean.params, find_garbage(root, clean.params))
    assert sorted(path.name for path in (root / "outputs" / kind).iterdir()) == ["new"] and (root / "toy.py").is_file()


def test_an_old_run_with_a_registered_checkpoint_stays(clean: Toy):
    folder = run_folder(clean.root, "old")
    write_json(folder / "step-000002" / "complete.json", {})
    age(folder)
    listed = find_garbage(clean.root, clean.params)
    register_checkpoint(folder / "step-000002")
    age(folder)
    assert remove_garbage(clean.root, clean.params, listed) == [] and found(clean) == set()


def test_an_old_run_stays_while_mlflow_has_not_got_all_of_it(clean: Toy):
    folder = run_folder(clean.root, "old")
    (folder / "tracking.jsonl").write_text('{"kind": "run"}\n')
    age(folder)
    assert found(clean) == set()
    write_json(folder / "mlflow.json", {"run_id": "x", "sent": (folder / "tracking.jsonl").stat().st_size})
    age(folder)
    assert found(clean) == {str(folder.relative_to(clean.root))}


def test_what_dvc_lock_names_stays(clean: Toy):
    (clean.root / "outputs" / "added" / "mine").mkdir(parents=True)
    age(clean.root / "outputs" / "added")
    assert found(clean) == {"outputs/added/mine"}
    lock = {"stages": {"other": {"outs": [{"path": "outputs/added/mine", "md5": "x"}]}}}
    (clean.root / "dvc.lock").write_text(yaml.safe_dump(lock))
    assert found(clean) == set()


def test_a_run_stays_while_it_cannot_be_told_which_one_is_present(clean: Toy):
    folder = run_folder(clean.root, "old", stage="sft")  # whose inputs are missing
    assert found(clean) == set() and folder.is_dir()


def test_sizes_are_what_the_disk_gets_back_and_nothing_is_counted_twice(clean: Toy):
    root = clean.root
    folder = run_folder(root, "old", size=1000)
    write_json(folder / "step-000002.bad" / "complete.json", {})
    (folder / "step-000002.bad" / "weights").write_bytes(bytes(300))
    (folder / "linked").hardlink_to(folder / "weights")
    (root / "outputs" / "elsewhere").hardlink_to(folder / "run.json")
    age(folder)
    (item,) = find_garbage(root, clean.params)
    assert item.path == folder and item.size == 1000 + 300 + (folder / "step-000002.bad" / "complete.json").stat().st_size
    assert item.size == size_of(folder)


def test_a_dry_run_and_a_no_remove_nothing_and_a_yes_all_of_it(clean: Toy, monkeypatch: pytest.MonkeyPatch):
    from typer.testing import CliRunner

    from orchestration.cli import app

    folder = run_folder(clean.root, "old")
    monkeypatch.chdir(clean.root)
    for arguments, answer in ((["--dry-run"], ""), ([], "n\n"), (["--keep-days", "50", "--yes"], "")):
        done = CliRunner().invoke(app, ["gc", *arguments], input=answer)
        assert done.exit_code == 0, done.output
        assert folder.is_dir()
    assert "nothing may go" in done.output
    done = CliRunner().invoke(app, ["gc"], input="y\n")
    assert "removed 1 of 1 places" in done.output and not folder.exists()


@pytest.mark.slow
def test_dvc_keeps_what_the_workspace_names_and_drops_the_rest(with_shards: Toy):
    cache = with_shards.root / ".dvc" / "cache" / "files" / "md5"
    stray = cache / "00" / ("0" * 30)
    stray.parent.mkdir(parents=True, exist_ok=True)
    stray.write_text("nobody's")
    before = sorted(cache.rglob("*"))
    with_shards.dvc.collect_garbage(dry=True)
    assert sorted(cache.rglob("*")) == before
    with_shards.dvc.collect_garbage(dry=False)
    assert not stray.exists() and with_shards.dvc.is_clean(STAGE)
