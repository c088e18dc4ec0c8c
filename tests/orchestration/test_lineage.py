"""A version says what made it, and what was not recorded is not guessed."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from orchestration.lineage import UNKNOWN, describe, differing_packages, find_version, read_lineage, read_record
from orchestration.provenance import DIFF, LARGEST_NEW_FILE, files_of_patch, read_edits, read_environment
from orchestration.registry import EXPORT, NotRegistered, Registry, register_export
from runtime import exits
from runtime.environment import git_state
from runtime.files import read_json, tensors_digest
from tests.orchestration.conftest import Toy
from tests.orchestration.test_promotion import second_model
from tests.orchestration.toy import write_weights


def git(root: Path, *arguments: str) -> str:
    command = ["git", "-c", "user.name=toy", "-c", "user.email=toy@example.org", *arguments]
    return subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout.strip()


def edit_everything(root: Path) -> None:
    """A changed file, a binary one, a deleted one, new ones with odd names, a link, and one too large to store."""
    with open(root / "toy.py", "a") as file:
        file.write("# an edit\n")
    (root / "presets" / "tiny.yaml").unlink()
    (root / "new folder").mkdir()
    (root / "new folder" / "é new.py").write_text("print('é')\n")
    (root / "picture.bin").write_bytes(bytes(range(256)) * 9)
    (root / "data set.bin").write_bytes(b"0" * (LARGEST_NEW_FILE + 1))
    (root / "link").symlink_to("nowhere")


def test_a_changed_dvc_lock_is_no_edit_and_any_other_file_is(toy: Toy):
    assert git_state(toy.root) == {"git_commit": git(toy.root, "rev-parse", "HEAD"), "git_dirty": "false"}
    (toy.root / "dvc.lock").write_text("schema: '2.0'\n")
    assert git_state(toy.root)["git_dirty"] == "false" and read_edits(toy.root).patch == b""
    git(toy.root, "add", "-f", "dvc.lock")
    git(toy.root, "commit", "-qm", "a lock")
    (toy.root / "dvc.lock").write_text("schema: '2.1'\n")
    assert git_state(toy.root)["git_dirty"] == "false" and read_edits(toy.root).patch == b""
    (toy.root / "new.py").write_text("")
    assert git_state(toy.root)["git_dirty"] == "true"


def test_the_stored_edits_turn_a_clone_of_the_commit_into_what_was_run(toy: Toy, tmp_path: Path):
    edit_everything(toy.root)
    edits = read_edits(toy.root)
    assert edits.left_out == ("data set.bin",)
    assert files_of_patch(edits.patch) == ["link", "new folder/é new.py", "picture.bin", "presets/tiny.yaml", "toy.py"]
    git(tmp_path, "clone", "-q", str(toy.root), "clone")
    (tmp_path / "edits").write_bytes(edits.patch)
    git(tmp_path / "clone", "apply", "--binary", str(tmp_path / "edits"))
    for name in ("new folder/é new.py", "picture.bin", "toy.py"):
        assert (tmp_path / "clone" / name).read_bytes() == (toy.root / name).read_bytes()
    assert not (tmp_path / "clone" / "presets" / "tiny.yaml").exists()
    assert (tmp_path / "clone" / "link").readlink() == Path("nowhere")


def test_reading_the_edits_leaves_the_clone_as_it_is(toy: Toy):
    edit_everything(toy.root)
    before = git(toy.root, "status", "--porcelain")
    read_edits(toy.root)
    assert git(toy.root, "status", "--porcelain") == before


def test_a_package_of_another_version_is_named_with_both():
    recorded = read_environment() | {"packages": read_environment()["packages"] | {"torch": "0.1", "gone": "2.0"}}
    assert differing_packages(read_environment()) == []
    torch = read_environment()["packages"]["torch"]
    assert differing_packages(recorded) == ["gone: 2.0 then, absent now", f"torch: 0.1 then, {torch} now"]


def test_other_instructions_of_the_cpu_are_named_with_both(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MKL_CBWR", "COMPATIBLE")
    recorded = read_environment()
    monkeypatch.setenv("MKL_CBWR", "AUTO")
    (line,) = differing_packages(recorded)
    before, after = line.removeprefix("instructions: ").split(" then, ")
    assert "MKL_CBWR=COMPATIBLE" in before and "MKL_CBWR=AUTO now" in after
    assert differing_packages({name: value for name, value in recorded.items() if name != "instructions"}) == []


def test_what_was_not_recorded_is_said_to_be_not_recorded():
    known: dict[str, Any] = {"model": "deepgen", "version": "1", "aliases": [], "registered": "then", "run_id": "r", "model_digest": "d"}
    nothing = dict.fromkeys(("git_commit", "git_dirty", "edits", "preset", "params", "dvc_lock", "data", "licences", "environment"))
    text = "\n".join(describe(known | nothing | {"parents": [], "promotions": [], "environment_differs": []}))
    for name in ("commit", "diff", "params", "dvc.lock", "data", "trained by", "environment", "licences"):
        assert f"  {name:<12} {UNKNOWN}" in text.splitlines()


@pytest.mark.slow
class TestWithARegistry:
    def test_a_version_and_its_exported_folder_give_the_same_answer(self, finished: Toy):
        done = finished.deepgen("lineage", "1", "--json")
        assert done.returncode == 0, done.stderr
        facts = json.loads(done.stdout)
        assert facts["git_commit"] == git(finished.root, "rev-parse", "HEAD") and facts["git_dirty"] is False
        assert facts["edits"] == {"files": [], "left_out": [], "bytes": 0}
        assert facts["model_digest"] == tensors_digest(finished.root / EXPORT) and facts["aliases"] == ["challenger", "champion"]
        assert facts["dvc_lock"]["sft"] == {"outputs/sft": finished.dvc.recorded()["sft"]}
        assert facts["params"]["preset"] == "smoke"
        for part, row in facts["data"].items():
            manifest = read_json(finished.root / "outputs" / "shards" / part / "manifest.json")
            assert (row["dataset_id"], row["samples"]) == (manifest["dataset_id"], manifest["samples"])
            assert facts["licences"]["data"][part] == row["licence"] == finished.params.data.parts[part].licence
        assert facts["environment"] == read_environment() and facts["environment_differs"] == []
        assert [row["event"] for row in facts["promotions"]] == ["promotion"]
        registry = Registry.open(finished.root, finished.params)
        for address in ("@champion", "models:/deepgen/1", str(finished.root / EXPORT)):
            version, _ = find_version(finished.root, registry, address)
            assert version is not None and read_lineage(finished.root, registry, version) == facts

    def test_the_edits_of_a_dirty_clone_and_the_parent_runs_are_told(self, copy: Toy):
        second_model(copy)
        edit_everything(copy.root)
        register_export(copy.root, copy.params, copy.dvc)
        registry = Registry.open(copy.root, copy.params)
        run = registry.client.create_run(
            registry.client.get_experiment_by_name("deepgen").experiment_id, tags={"parent_stage": "alignment"}
        )
        registry.client.log_metric(run.info.run_id, "loss", 0.25)
        version, _ = find_version(copy.root, registry, "2")
        assert version is not None
        registry.tag(version, {"parent_run.sft": run.info.run_id, "parent_run.mr_grpo": "0" * 32})
        version, _ = find_version(copy.root, registry, "2")
        assert version is not None
        facts = read_lineage(copy.root, registry, version)
        assert facts["git_dirty"] is True and "toy.py" in facts["edits"]["files"] and facts["edits"]["left_out"] == ["data set.bin"]
        text = "\n".join(describe(facts))
        assert f"sft        run {run.info.run_id} from alignment: loss 0.25" in text
        assert f"mr_grpo    run {'0' * 32}: MLflow no longer has it" in text
        assert "too large to be stored: data set.bin" in text
        assert read_record(registry, version.run_id).files[DIFF] == read_edits(copy.root).patch
        by_hand = registry.client.create_model_version(registry.name, source=str(copy.root / EXPORT))
        facts = read_lineage(copy.root, registry, by_hand)
        assert facts["run_id"] is facts["git_commit"] is facts["edits"] is facts["environment"] is facts["params"] is None
        assert f"MLflow run {UNKNOWN}" in "\n".join(describe(facts))

    def test_weights_that_were_never_registered_are_said_to_be_unknown(self, copy: Toy):
        write_weights(copy.root / EXPORT / "dit" / "model.safetensors", [5.0])
        done = copy.deepgen("lineage", "outputs/exports/diffusers")
        assert done.returncode == exits.FAILED and "knows no version with these weights" in done.stdout
        for wrong in ("7", "@nobody", "models:/other/1", "nowhere"):
            with pytest.raises(NotRegistered, match=wrong):
                find_version(copy.root, Registry.open(copy.root, copy.params), wrong)
