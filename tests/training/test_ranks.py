"""Several ranks train as one would, through the stage's own command, and a run may go on with another number of them."""

import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from data.stages import run_mixture, run_shards
from model.weights import load_model
from runtime import exits
from runtime.files import read_json
from training.checkpoint import read_checkpoint
from training.config import LaunchConfig
from training.latents import run_latents
from training.launch import LaunchRefused, build_accelerator
from training.sharding import read_plugin
from training.supervised import load_parent, run_supervised

from .conftest import begin

ONE_OF_TWO = 1e-5  # float32: gradients of two ranks are added in another order


def set_ranks(root: Path, ranks: int, strategy: str = "ddp") -> None:
    """The same global micro-batch, and so the same accumulation, with `ranks` processes."""
    params = yaml.safe_load((root / "params.yaml").read_text())
    params["launch"] |= {"processes": ranks, "strategy": strategy}
    for stage in ("alignment", "sft"):
        params[stage]["micro_batch_size"] = 2 // ranks
    (root / "params.yaml").write_text(yaml.safe_dump(params))


@pytest.fixture(scope="module")
def uneven(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose parts have 13 and 7 samples, so that no rank's share comes out even and the stream begins anew on the way."""
    root = tmp_path_factory.mktemp("uneven") / "project"
    shutil.copytree(built, root, symlinks=True, ignore=shutil.ignore_patterns("runs"))
    params = yaml.safe_load((root / "params.yaml").read_text())
    params["data"]["parts"]["drawn_text_to_image"]["samples"] = 13
    params["data"]["parts"]["drawn_image_edit"]["samples"] = 7
    params["sft"]["board_every"] = 4
    params["sft"]["lora"]["dropout"] = 0.0  # its masks belong to a rank, not to a sample
    (root / "params.yaml").write_text(yaml.safe_dump(params))
    for part in ("drawn_text_to_image", "drawn_image_edit"):
        with begin(root, f"shards@{part}") as run:
            run_shards(run)
    for stage in ("alignment", "sft"):
        with begin(root, f"mixture@{stage}") as run:
            run_mixture(run)
    with begin(root, "latents") as run:
        run_latents(run)
    return root


@pytest.fixture(scope="module")
def alone(uneven: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Alignment and SFT on one rank."""
    root = copy_of(uneven, tmp_path_factory.mktemp("alone"))
    train_alone(root, "alignment")
    train_alone(root, "sft")
    return root


@pytest.fixture(scope="module")
def together(alone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same on two, SFT from the very weights that one rank began with."""
    root = copy_of(alone, tmp_path_factory.mktemp("together"))
    set_ranks(root, 2)
    train_together(root, "sft")
    train_together(root, "alignment")
    return root


def copy_of(project: Path, folder: Path) -> Path:
    shutil.copytree(project, folder / "project", symlinks=True, ignore=shutil.ignore_patterns("runs"))
    return folder / "project"


def train_alone(root: Path, stage: str) -> None:
    torch.seed()
    set_ranks(root, 1)
    with begin(root, stage) as run:
        run_supervised(run, stage)


def train_together(root: Path, stage: str) -> str:
    """Run the stage's command; what it printed."""
    shutil.rmtree(root / "outputs" / stage, ignore_errors=True)
    command = [sys.executable, "-m", "training", stage]
    ended = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=400)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def series(root: Path, stage: str, name: str = "loss") -> torch.Tensor:
    return torch.tensor([row[name] for row in read_json(root / "outputs" / stage / "history.json")], dtype=torch.float64)


def checkpoint(root: Path, stage: str, step: int) -> Path:
    return next((root / "outputs" / "runs" / stage).glob(f"*/step-{step:06d}"))


def assert_same_training(root: Path, other: Path, stage: str) -> None:
    for name in ("loss", "grad_norm"):
        torch.testing.assert_close(series(root, stage, name), series(other, stage, name), rtol=ONE_OF_TWO, atol=0)
    ours, theirs = (load_model(project / "outputs" / stage / "model").state_dict() for project in (root, other))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=ONE_OF_TWO)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["alignment", "sft"])
def test_two_ranks_have_the_losses_and_the_weights_of_one(alone: Path, together: Path, stage: str):
    assert len(series(together, stage)) == 4
    assert_same_training(together, alone, stage)


@pytest.mark.slow
def test_a_run_of_two_ranks_goes_on_with_one(alone: Path, together: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Another number of ranks is another run folder, so the checkpoint is put there by hand."""
    root = copy_of(alone, tmp_path)
    with begin(root, "alignment") as run:
        shutil.copytree(checkpoint(together, "alignment", 2), run.folder / "step-000002")
    train_alone(root, "alignment")
    assert "alignment: going on from step 2" in capsys.readouterr().out
    assert_same_training(root, alone, "alignment")


@pytest.mark.slow
def test_two_ranks_asked_to_stop_save_and_end_as_one_would(alone: Path, tmp_path: Path):
    """The launcher above them is asked, as `kill`, Dagster and a cluster do; its exit code is the stage's."""
    root = copy_of(alone, tmp_path)
    set_ranks(root, 2)
    process = subprocess.Popen(
        [sys.executable, "-m", "training", "alignment"], cwd=root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    while process.poll() is None and not list(root.glob("outputs/runs/alignment/*/step-000002")):
        time.sleep(0.01)
    process.terminate()
    said, _ = process.communicate(timeout=200)
    assert process.returncode == exits.INTERRUPTED, said
    assert "the same command goes on" in said and "Traceback" not in said


@pytest.mark.slow
def test_a_second_writer_with_two_ranks_is_refused_with_its_own_code(alone: Path, tmp_path: Path):
    root = copy_of(alone, tmp_path)
    set_ranks(root, 2)
    with begin(root, "alignment"):
        ended = subprocess.run([sys.executable, "-m", "training", "alignment"], cwd=root, capture_output=True, text=True, timeout=200)
    assert ended.returncode == exits.LOCKED and "is being written by process" in ended.stderr


@pytest.mark.slow
def test_a_run_of_one_rank_goes_on_with_two(alone: Path, tmp_path: Path):
    root = copy_of(alone, tmp_path)
    set_ranks(root, 2)
    with begin(root, "alignment") as run:
        shutil.copytree(checkpoint(alone, "alignment", 2), run.folder / "step-000002")
    assert train_together(root, "alignment").count("alignment: going on from step 2") == 2
    assert_same_training(root, alone, "alignment")


@pytest.mark.slow
def test_a_run_of_one_rank_goes_on_with_its_model_in_shards_on_two(alone: Path, tmp_path: Path):
    """FSDP2: weights, gradients, moments, held-out losses and what is published are those of whole tensors, and so is the checkpoint."""
    root = copy_of(alone, tmp_path)
    set_ranks(root, 2, "fsdp2")
    with begin(root, "sft") as run:
        shutil.copytree(checkpoint(alone, "sft", 2), run.folder / "step-000002")
    train_together(root, "sft")
    assert_same_training(root, alone, "sft")
    (ours_held, theirs_held) = (read_json(project / "outputs" / "sft" / "history.json")[-1]["held_out/loss"] for project in (root, alone))
    assert ours_held == pytest.approx(theirs_held, rel=ONE_OF_TWO)
    assert list((root / "outputs" / "runs" / "sft").glob("*/boards/step-000004.png"))
    (ours, _), (theirs, _) = (read_checkpoint(checkpoint(project, "sft", 4)) for project in (root, alone))
    torch.testing.assert_close(ours["weights"], theirs["weights"], rtol=0, atol=ONE_OF_TWO)
    torch.testing.assert_close(ours["optimizer"], theirs["optimizer"], rtol=1e-3, atol=ONE_OF_TWO)


def test_the_files_of_the_strategies_are_read_by_accelerate():
    fsdp, zero = read_plugin("fsdp2"), read_plugin("zero2")
    assert (fsdp.fsdp_version, fsdp.reshard_after_forward) == (2, True)
    assert (zero.zero_stage, zero.gradient_clipping) == (2, 1.0)


def test_every_layer_that_is_cut_by_name_is_in_the_model(built: Path):
    with begin(built, "alignment") as run:
        model = load_parent(run, "alignment")
    assert set(read_plugin("fsdp2").transformer_cls_names_to_wrap) <= {type(module).__name__ for module in model.modules()}


def test_zero2_without_deepspeed_is_refused_by_name():
    config = LaunchConfig(processes=2, strategy="zero2")
    with pytest.raises(LaunchRefused, match=r"zero2 needs the package deepspeed\. fsdp2 with `reshard_after_forward: false`"):
        build_accelerator(config)


def test_more_ranks_than_gpus_are_refused_with_the_way_to_the_cpu(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(LaunchRefused, match=r"2 ranks asked for, each on a GPU of its own, and 1 found\..*CUDA_VISIBLE_DEVICES= \(empty\)"):
        build_accelerator(LaunchConfig(processes=2))


def test_compiling_without_a_compiler_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(LaunchRefused, match="needs a C\\+\\+ compiler, and 'no-such-compiler' is not found"):
        build_accelerator(LaunchConfig(compile=True))


def test_shards_of_one_rank_are_refused():
    with pytest.raises(ValueError, match=r"fsdp2 spreads a model over ranks, and launch\.processes is 1; allowed: ddp"):
        LaunchConfig(strategy="fsdp2")
