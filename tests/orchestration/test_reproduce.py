"""A recorded run is built again apart from the user's own files, and what is not as recorded is named."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

import pytest
import yaml

from orchestration import reproduce
from orchestration.lineage import Record
from orchestration.pipeline_run import AlreadyRunning
from orchestration.provenance import read_environment
from orchestration.registry import EXPORT, Registry, register_export
from orchestration.reproduce import CannotReproduce, check_reproducible, choose_stages, compare, describe, left_out_warning
from runtime import exits
from runtime.run_folder import claimed
from tests.orchestration.conftest import Toy, stage_processes, stop
from tests.orchestration.test_lineage import git
from tests.orchestration.toy import write_weights

SHARDS = "shards@drawn_image_edit"


def entry(out: str, md5: str, deps: dict[str, str] | None = None, **params: Any) -> dict[str, Any]:
    """A stage in dvc.lock."""
    rows = [{"path": path, "md5": digest} for path, digest in (deps or {}).items()]
    return {"outs": [{"path": out, "md5": md5}], "deps": rows, "params": {"params.yaml": params}}


def recorded(toy: Toy, lock: dict[str, Any] | None = None, edits: Any = None, **tags: str) -> Record:
    """What a registration of the toy's present commit would have left."""
    lock = lock if lock is not None else {SHARDS: entry("outputs/shards/drawn_image_edit", "aa")}
    tags = {"git_commit": git(toy.root, "rev-parse", "HEAD"), "git_dirty": "false"} | tags
    files = {
        "params.yaml": (toy.root / "params.yaml").read_bytes(),
        "dvc.lock": yaml.safe_dump({"stages": lock}).encode(),
        "edits.json": json.dumps(edits or {"files": [], "left_out": []}).encode(),
        "environment.json": json.dumps(read_environment()).encode(),
    }
    return Record("0" * 32, tags, files)


def refused(toy: Toy, record: Record, *words: str, with_diff: bool = False) -> None:
    with pytest.raises(CannotReproduce) as error:
        check_reproducible(toy.root, record, with_diff)
    for word in words:
        assert word in str(error.value)


def test_a_commit_that_this_repository_has_not_is_refused_with_the_command_that_brings_it(toy: Toy):
    check_reproducible(toy.root, recorded(toy), False)
    refused(toy, recorded(toy, git_commit="f" * 40), "f" * 40, "git fetch REMOTE")
    refused(toy, recorded(toy, git_commit="none"), "its commit was not recorded")


def test_edits_are_applied_only_when_asked_and_are_named(toy: Toy):
    edited = recorded(toy, edits={"files": ["params.yaml", "toy.py"], "left_out": []}, git_dirty="true")
    refused(toy, edited, "toy.py", "--with-diff")
    check_reproducible(toy.root, edited, True)
    check_reproducible(toy.root, recorded(toy, edits={"files": ["params.yaml"], "left_out": []}, git_dirty="true"), False)
    too_large = recorded(toy, edits={"files": [], "left_out": ["big.bin"]})
    check_reproducible(toy.root, too_large, False)
    assert "big.bin" in "".join(left_out_warning(too_large)), "it may be no more than a log"


def test_a_run_whose_edits_or_files_were_not_recorded_is_refused(toy: Toy):
    old = recorded(toy, git_dirty="true")
    del old.files["edits.json"]
    refused(toy, old, "its code is lost", with_diff=True)
    training = Record("1" * 32, {"stage": "sft", "git_commit": "f" * 40}, {})
    refused(toy, training, "holds no params.yaml and dvc.lock", "stage sft")


def test_stages_that_the_run_did_not_bring_up_to_date_are_left_out_with_the_reason(toy: Toy):
    lock = {
        SHARDS: entry("outputs/shards/drawn_image_edit", "aa", **{"data.image_size": 64}),
        "alignment": entry("outputs/alignment", "bb", **{"data.image_size": 1}),
        "sft": entry("outputs/sft", "cc", {"outputs/alignment": "an older one"}),
        "shards@gone": entry("outputs/shards/gone", "dd"),
        "mr_grpo": entry("outputs/mr_grpo", "ee", {"outputs/sft": "cc", "toy.py": "ff"}),
    }
    targets, left_out = choose_stages(toy.root, recorded(toy, lock), [])
    assert targets == [SHARDS, "mr_grpo"]
    assert left_out == [
        "left out: alignment, recorded with another data.image_size",
        "left out: sft, recorded from another outputs/alignment",
        "left out: shards@gone, which is no stage of its dvc.yaml any more",
    ]
    assert choose_stages(toy.root, recorded(toy, lock), ["mr_grpo"]) == (["mr_grpo"], [])
    with pytest.raises(CannotReproduce, match=f"sft: not recorded by run 0*; allowed: mr_grpo, {SHARDS}"):
        choose_stages(toy.root, recorded(toy, lock), ["sft"])
    with pytest.raises(CannotReproduce, match="brought no stage up to date: shards@gone"):
        choose_stages(toy.root, recorded(toy, {"shards@gone": lock["shards@gone"]}), [])


def test_an_output_that_differs_is_told_with_the_inputs_that_differ_already(toy: Toy, monkeypatch: pytest.MonkeyPatch):
    lock = {"sft": entry("outputs/sft", "cc", {"toy.py": "1"}), "mr_grpo": entry("outputs/mr_grpo", "ee", {"outputs/sft": "cc"})}
    rebuilt = {"sft": entry("outputs/sft", "xx", {"toy.py": "1"}), "mr_grpo": entry("outputs/mr_grpo", "yy", {"outputs/sft": "xx"})}
    (toy.root / "dvc.lock").write_text(yaml.safe_dump({"stages": rebuilt}))
    record = recorded(toy, lock)
    outputs = compare(record, toy.root, ["sft", "mr_grpo"])
    assert [output.same for output in outputs] == [False, False]
    text = describe(record, outputs)
    assert "  sft: outputs/sft, from the same inputs" in text
    assert "  mr_grpo: outputs/mr_grpo, its inputs differ (outputs/sft)" in text
    assert text[-1] == "the environment is the recorded one"
    monkeypatch.setattr(reproduce, "differing_packages", lambda _: ["torch: 0.1 then, 2.0 now"])
    assert describe(record, outputs)[-1] == "  torch: 0.1 then, 2.0 now"
    (toy.root / "dvc.lock").unlink()
    assert [output.rebuilt for output in compare(record, toy.root, ["sft", "mr_grpo"])] == [None, None]


def own_files(toy: Toy) -> dict[str, bytes]:
    """Everything of the user's: the working tree, what DVC keeps, and git's own state."""
    files = {path.relative_to(toy.root): path for path in toy.root.rglob("*") if path.is_file()}
    ours = {name: path.read_bytes() for name, path in files.items() if not {"outputs", "tmp"} & set(name.parts) and name.name != "index"}
    assert Path("params.yaml") in ours and any(name.is_relative_to(".dvc/cache") for name in ours), "it looks where something lies"
    return {str(name): content for name, content in ours.items()}


def artifact(toy: Toy, run_id: str, name: str) -> Path:
    """Where the store keeps a file of a run."""
    run = Registry.open(toy.root, toy.params).client.get_run(run_id)
    return Path(unquote(urlparse(run.info.artifact_uri).path)) / name


def again(toy: Toy, what: str, capfd: pytest.CaptureFixture[str], **how: Any) -> tuple[int, str]:
    """Exit code of a rebuild in this process, and all that was printed, by DVC and the stages too."""
    options: dict[str, Any] = {"with_diff": False, "cached": False, "only": ()} | how
    code = reproduce.reproduce(toy.root, Registry.open(toy.root, toy.params), what, print, **options)
    return code, capfd.readouterr().out


@pytest.mark.slow
class TestOnAFinishedToy:
    def test_a_version_is_built_again_to_the_byte_and_a_changed_record_is_said_to_differ(
        self, copy: Toy, capfd: pytest.CaptureFixture[str]
    ):
        before = own_files(copy)
        code, said = again(copy, "1", capfd)
        assert code == exits.DONE, said
        assert "alignment: step 4" in said, "the stages' own lines are the progress"
        assert f"all {len(copy.dvc.recorded())} outputs are the recorded ones" in said
        assert own_files(copy) == before, "the user's own files are not touched"
        run_id = Registry.open(copy.root, copy.params).resolve("models:/deepgen/1").run_id
        lock = artifact(copy, run_id, "dvc.lock")
        changed = yaml.safe_load(lock.read_text())
        (out,) = changed["stages"]["export_diffusers"]["outs"]
        out["md5"] = ("1" if out["md5"].startswith("0") else "0") + out["md5"][1:]
        lock.write_text(yaml.safe_dump(changed))
        code, said = again(copy, run_id, capfd)
        assert code == exits.FAILED and "alignment: step" not in said, "what was built is not built twice"
        assert "export_diffusers: outputs/exports/diffusers, from the same inputs" in said
        assert "1 of 14 outputs differ" in said and "the environment is the recorded one" in said
        code, said = again(copy, run_id, capfd, cached=True, only=["alignment"])
        assert code == exits.DONE and "Stage 'alignment' is cached" in said and "alignment: step" not in said

    def test_ctrl_c_saves_and_the_same_command_goes_on(self, copy: Toy, capfd: pytest.CaptureFixture[str]):
        command = ("reproduce", "@champion", "--stage", "alignment")
        first = copy.start(*command, TOY_SECONDS="10")
        copy.wait_for("alignment: from step 0", 300)
        assert stop(first) == exits.INTERRUPTED and "Go on with the same command" in copy.log
        (clone,) = (copy.root / "outputs" / "reproduce").glob("*/clone")
        assert not stage_processes(clone)
        (state,) = (clone / "outputs" / "runs" / "alignment").glob("*/step.json")
        step = json.loads(state.read_text())["step"]
        code, said = again(copy, "@champion", capfd, only=["alignment"])
        assert code == exits.DONE and f"alignment: from step {step}\n" in said, said
        assert "Running stage 'shards" not in said, "finished stages stay"

    def test_a_run_with_edits_is_built_with_them(self, copy: Toy, capfd: pytest.CaptureFixture[str]):
        copy.edit('f"{part} {config.seed} {config.samples}\\n"', 'f"{part} edited {config.samples}\\n"', "toy.py")
        subprocess.run(
            [os.environ["DVC_BIN"], "repro", "--force", "--single-item", SHARDS], cwd=copy.root, env=copy.environment(), check=True
        )
        write_weights(copy.root / EXPORT / "dit" / "model.safetensors", [7.0])
        register_export(copy.root, copy.params, copy.dvc)
        git(copy.root, "checkout", "toy.py")
        before = own_files(copy)
        with pytest.raises(CannotReproduce, match="uncommitted changes in .*toy.py"):
            again(copy, "2", capfd, only=[SHARDS])
        folder = copy.root / reproduce.PLACE / Registry.open(copy.root, copy.params).resolve("models:/deepgen/2").run_id
        folder.mkdir(parents=True)
        with claimed(folder), pytest.raises(AlreadyRunning, match="another `deepgen reproduce`"):
            again(copy, "2", capfd, only=[SHARDS], with_diff=True)
        code, said = again(copy, "2", capfd, only=[SHARDS], with_diff=True)
        assert code == exits.DONE and "all 1 outputs are the recorded ones" in said, said
        assert f"Running stage '{SHARDS}'" in said and own_files(copy) == before, "not even DVC's cache has learnt of it"
