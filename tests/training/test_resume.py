"""Interrupted equals uninterrupted, and nothing damaged is taken for whole."""

import shutil
from pathlib import Path

import pytest
import torch

from runtime.exits import Interrupted, StopRequest
from runtime.files import tensors_digest
from training import checkpoint
from training.checkpoint import CheckpointCorrupt, read_checkpoint
from training.mr_grpo import run_mr_grpo
from training.randomness import restore_global_generators
from training.supervised import run_supervised

from .conftest import begin


class StopAt(StopRequest):
    """Asks to stop when it has been looked at `looks` times: after that many steps."""

    def __init__(self, looks: int) -> None:
        super().__init__()
        self.left = looks

    def __bool__(self) -> bool:
        self.left -= 1
        return self.left == 0


def run_stage(root: Path, stage: str, stop: StopRequest | None = None) -> Path:
    torch.seed()  # as a new process does
    with begin(root, stage, stop) as run:
        run_mr_grpo(run) if stage == "mr_grpo" else run_supervised(run, stage)
        return run.folder


@pytest.fixture(scope="module")
def trained(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project trained through every stage without a stop."""
    root = tmp_path_factory.mktemp("trained") / "project"
    shutil.copytree(built, root, symlinks=True, ignore=shutil.ignore_patterns("runs"))
    for stage in ("alignment", "sft", "mr_grpo"):
        run_stage(root, stage)
    return root


@pytest.mark.parametrize(("stage", "steps"), [("alignment", 1), ("alignment", 3), ("sft", 1), ("mr_grpo", 1)])
def test_a_stage_stopped_and_started_again_ends_with_the_same_bytes(trained: Path, tmp_path: Path, stage: str, steps: int):
    root = tmp_path / "project"
    shutil.copytree(trained, root, symlinks=True, ignore=shutil.ignore_patterns("runs"))
    shutil.rmtree(root / "outputs" / stage)
    with pytest.raises(Interrupted, match=f"step {steps} of"):
        run_stage(root, stage, StopAt(steps))
    assert not (root / "outputs" / stage).exists(), "an interrupted stage must publish nothing"
    run_stage(root, stage)
    assert tensors_digest(root / "outputs" / stage / "model") == tensors_digest(trained / "outputs" / stage / "model")
    history = (root / "outputs" / stage / "history.json").read_text()
    assert history == (trained / "outputs" / stage / "history.json").read_text()


def test_a_state_without_torchs_generator_ends_with_other_weights(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The test of the test: SFT's dropout draws from that generator, so that equal ends show that it was kept."""
    root = tmp_path / "project"
    shutil.copytree(trained, root, symlinks=True, ignore=shutil.ignore_patterns("runs"))
    with pytest.raises(Interrupted):
        run_stage(root, "sft", StopAt(1))
    monkeypatch.setattr(
        checkpoint, "restore_global_generators", lambda states: restore_global_generators(states | {"torch": torch.get_rng_state()})
    )
    run_stage(root, "sft")
    assert tensors_digest(root / "outputs" / "sft" / "model") != tensors_digest(trained / "outputs" / "sft" / "model")


def test_a_damaged_newest_checkpoint_is_set_aside_and_the_one_before_is_used(
    trained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    root = tmp_path / "project"
    shutil.copytree(trained, root, symlinks=True, ignore=shutil.ignore_patterns("runs"))
    with pytest.raises(Interrupted):
        run_stage(root, "alignment", StopAt(3))
    folder = next((root / "outputs" / "runs" / "alignment").iterdir())
    newest = folder / "step-000003" / "optimizer.safetensors"
    content = bytearray(newest.read_bytes())
    content[-5] ^= 1
    newest.write_bytes(content)
    run_stage(root, "alignment")
    assert (folder / "step-000003.bad").is_dir()
    assert "optimizer.safetensors has not the sha256" in caplog.text
    assert tensors_digest(root / "outputs" / "alignment" / "model") == tensors_digest(trained / "outputs" / "alignment" / "model")


@pytest.mark.parametrize("harm", ["cut", "flip", "delete"])
@pytest.mark.parametrize("file", ["weights.safetensors", "optimizer.safetensors", "random.safetensors", "state.json", "complete.json"])
def test_every_file_of_a_checkpoint_is_checked_before_it_is_used(trained: Path, tmp_path: Path, file: str, harm: str):
    source = sorted(next((trained / "outputs" / "runs" / "alignment").iterdir()).glob("step-*"))[-1]
    folder = tmp_path / source.name
    shutil.copytree(source, folder)
    content = bytearray((folder / file).read_bytes())
    if harm == "delete":
        (folder / file).unlink()
    elif harm == "cut":
        (folder / file).write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 2] ^= 1
        (folder / file).write_bytes(content)
    with pytest.raises(CheckpointCorrupt):
        read_checkpoint(folder)


def test_old_checkpoints_are_pruned_and_the_newest_kept(trained: Path):
    folder = next((trained / "outputs" / "runs" / "alignment").iterdir())
    assert [path.name for path in sorted(folder.glob("step-*"))] == ["step-000002", "step-000004"]
