"""A stage command works from a snapshot, alone in its folder, and publishes only what still holds."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from data.stages import run_mixture, run_shards
from model.deepgen import DeepGen
from runtime.exits import Interrupted
from runtime.published import ShardMismatch
from runtime.stage import InputsChanged, Locked, StageRun, begin_stage, guard
from training import supervised
from training.foundation import run_foundation
from training.supervised import run_supervised

from .conftest import begin


def test_params_edited_while_a_stage_runs_are_refused_and_nothing_is_published(project: Path, edit_params):
    with pytest.raises(InputsChanged, match="alignment: params changed while it ran"):
        with begin(project, "alignment") as run:
            edit_params(project, lambda params: params["alignment"].update(seed=99))
            run_supervised(run, "alignment")
    assert not (project / "outputs" / "alignment").exists()


def test_what_a_stage_starts_from_is_measured_where_it_trains(project: Path, monkeypatch: pytest.MonkeyPatch):
    """Held-out losses of a large model take hours on the CPU beside an accelerator."""
    seen: list[torch.device] = []

    def measured(run: StageRun, model: DeepGen) -> None:
        seen.append(model.device)
        raise Interrupted("enough")

    monkeypatch.setattr(supervised, "build_accelerator", lambda _: SimpleNamespace(device=torch.device("meta")))
    monkeypatch.setattr(supervised, "remember_start", measured)
    with begin(project, "alignment") as run, pytest.raises(Interrupted):
        run_supervised(run, "alignment")
    assert seen == [torch.device("meta")]


def test_params_of_other_stages_may_be_edited_meanwhile(project: Path, edit_params):
    with begin(project, "foundation") as run:
        edit_params(project, lambda params: params["mr_grpo"].update(seed=99))
        run_foundation(run)
    assert (project / "outputs" / "foundation" / "model" / "model_index.json").exists()


def test_an_input_changed_while_a_stage_runs_is_named(project: Path):
    with pytest.raises(InputsChanged, match=r"input outputs/mixture/alignment\.json changed"):
        with begin(project, "alignment"):
            (project / "outputs" / "mixture" / "alignment.json").write_text("{}")


def test_a_second_writer_of_a_run_folder_is_refused_with_the_pid_of_the_first(project: Path):
    with begin(project, "alignment"):
        with pytest.raises(Locked, match=r"is being written by process \d+"):
            with begin(project, "alignment"):
                pass


def test_the_same_settings_have_the_same_run_folder_and_others_have_another(project: Path, edit_params):
    with begin(project, "alignment") as first:
        pass
    with begin(project, "alignment") as again:
        pass
    edit_params(project, lambda params: params["alignment"].update(seed=99))
    with begin(project, "alignment") as other:
        pass
    assert first.folder == again.folder != other.folder


@pytest.mark.parametrize("harm", ["flip", "delete"])
def test_a_damaged_shard_is_refused_by_name_with_the_command_that_rebuilds_it(project: Path, harm: str):
    tar = project / "outputs" / "shards" / "drawn_image_edit" / "shard-000000.tar"
    if harm == "delete":
        tar.unlink()
    else:
        content = bytearray(tar.read_bytes())
        content[700] ^= 1
        tar.chmod(0o644)
        tar.write_bytes(content)
    with begin(project, "alignment") as run, pytest.raises(ShardMismatch, match=r"drawn_image_edit/shard-000000\.tar.*dvc repro"):
        run_supervised(run, "alignment")


def test_a_mixture_is_not_resolved_over_a_damaged_part(project: Path):
    (project / "outputs" / "shards" / "drawn_image_edit" / "index.npy").unlink()
    with pytest.raises(ShardMismatch, match=r"index\.npy is missing"):
        with begin(project, "mixture@sft") as run:
            run_mixture(run)


def test_the_random_foundation_and_the_shards_come_out_the_same_in_another_clone(project: Path, tmp_path: Path):
    other = tmp_path / "other"
    shutil.copytree(project, other, symlinks=True, ignore=shutil.ignore_patterns("outputs"))
    with begin(other, "foundation") as run:
        run_foundation(run)
    with begin(other, "shards@drawn_image_edit") as run:
        run_shards(run)
    from runtime.files import sha256_path

    for out in ("foundation", "shards/drawn_image_edit"):
        assert sha256_path(project / "outputs" / out) == sha256_path(other / "outputs" / out)


def test_an_unknown_stage_is_refused_naming_those_there_are(project: Path):
    from runtime.exits import StopRequest
    from runtime.params import ParamsError

    with pytest.raises(ParamsError, match=r"pretrain: no such stage in dvc\.yaml; allowed: shards@"):
        with begin_stage(project, "pretrain", StopRequest()):
            pass


def test_what_a_user_can_mend_is_told_without_a_trace(project: Path, capsys: pytest.CaptureFixture[str]):
    tar = next((project / "outputs" / "shards" / "drawn_image_edit").glob("*.tar"))
    tar.unlink()
    with pytest.raises(SystemExit) as ended, guard("mixture@sft"), begin(project, "mixture@sft") as run:
        run_mixture(run)
    told = capsys.readouterr().err
    assert ended.value.code == 1 and "mixture@sft: ShardMismatch" in told and "Traceback" not in told
