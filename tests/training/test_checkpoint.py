"""A checkpoint is whole or absent, whatever happens to it or to the process that writes it."""

import os
import random
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from runtime.files import read_json, sha256_file, sweep_stale, write_json
from runtime.run_folder import best_checkpoint, register_checkpoint, tell_score
from training import checkpoint
from training.checkpoint import FORMAT, UPGRADES, CannotSave, Checkpoints, NewerFormat, TrainState, read_checkpoint
from training.optim import EMA
from training.randomness import global_generators

REPO = Path(__file__).parents[2]
FILES = ("weights.safetensors", "optimizer.safetensors", "ema.safetensors", "random.safetensors", "state.json", "complete.json")
POINTS = ("before_write", "after_files", "before_rename", "after_rename")


def fresh_state() -> TrainState:
    """A linear model, its optimizer and its average: the smallest thing with all the files."""
    torch.manual_seed(0)
    layer = nn.Linear(3, 2)
    trained = dict(layer.named_parameters())
    return TrainState(trained, torch.optim.AdamW(layer.parameters(), lr=0.1), EMA(trained, 0.9), guard={"skipped": 0})


def train_to(state: TrainState, steps: int, checkpoints: Checkpoints | None = None) -> TrainState:
    """Steps whose gradient is drawn from the global generators of torch, numpy and python, one after the other."""
    while state.step < steps:
        for draw in (torch.randn(()).item(), np.random.randn(), random.gauss(0, 1)):
            for parameter in state.trained.values():
                parameter.grad = torch.full_like(parameter, draw)
            state.optimizer.step()
        state.ema.update()
        state.step += 1
        state.history.append({"step": state.step, "loss": 1 / state.step})
        if checkpoints is not None and checkpoints.due(state.step):
            checkpoints.save(state)
    return state


def weights(state: TrainState) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in (*state.trained.values(), *state.ema.average.values())])


def seed_all(seed: int) -> None:
    torch.manual_seed(seed), np.random.seed(seed), random.seed(seed)


def draws() -> tuple[float, float, float]:
    return torch.randn(()).item(), np.random.randn(), random.gauss(0, 1)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A run folder with the checkpoints of steps 1 to 3."""
    seed_all(1)
    train_to(fresh_state(), 3, Checkpoints(tmp_path, 1, 9))
    return tmp_path


def uninterrupted(steps: int) -> torch.Tensor:
    seed_all(1)
    return weights(train_to(fresh_state(), steps))


def harm(file: Path, how: str) -> None:
    content = bytearray(file.read_bytes())
    if how == "deleted":
        file.unlink()
    elif how == "swapped with the older one's":
        shutil.copyfile(file.parent.with_name("step-000002") / file.name, file)
    elif how == "flipped":
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    else:
        file.write_bytes(content[: len(content) * int(how.removesuffix("%")) // 100])


@pytest.mark.parametrize("how", ["0%", "1%", "50%", "99%", "flipped", "deleted", "swapped with the older one's"])
@pytest.mark.parametrize("file", FILES)
def test_whatever_is_wrong_with_the_newest_it_is_named_and_the_one_before_goes_on_to_the_same_end(
    saved: Path, file: str, how: str, caplog: pytest.LogCaptureFixture
):
    harm(saved / "step-000003" / file, how)
    state = fresh_state()
    seed_all(99)
    assert Checkpoints(saved, 1, 9).restore(state) and state.step == 2
    assert "step-000003 is damaged" in caplog.text and (saved / "step-000003.bad").is_dir()
    assert torch.equal(weights(train_to(state, 5)), uninterrupted(5))


def test_a_newest_that_is_wholly_an_older_one_is_found_out_by_its_step(saved: Path, caplog: pytest.LogCaptureFixture):
    shutil.rmtree(saved / "step-000003")
    shutil.copytree(saved / "step-000001", saved / "step-000003")
    state = fresh_state()
    assert Checkpoints(saved, 1, 9).restore(state) and state.step == 2
    assert "state.json is of step 1" in caplog.text


def test_with_all_damaged_the_run_begins_again(saved: Path):
    for number in (1, 2, 3):
        (saved / f"step-{number:06d}" / "state.json").unlink()
    assert not Checkpoints(saved, 1, 9).restore(fresh_state())


@pytest.mark.parametrize("left_out", ["torch", "numpy", "numpy_rest", "python"])
def test_each_generator_is_needed_for_the_same_end(saved: Path, left_out: str, monkeypatch: pytest.MonkeyPatch):
    """The test of the test: a state without one of them does not end as the uninterrupted run."""
    real = checkpoint.restore_global_generators
    seed_all(99)
    foreign = global_generators() | {"numpy_rest": torch.tensor([5.0, 0.0, 0.0], dtype=torch.float64)}
    monkeypatch.setattr(checkpoint, "restore_global_generators", lambda states: real(states | {left_out: foreign[left_out]}))
    state = fresh_state()
    Checkpoints(saved, 1, 9).restore(state)
    assert not torch.equal(weights(train_to(state, 5)), uninterrupted(5))


def test_a_deviate_that_waits_in_numpy_or_python_is_kept(tmp_path: Path):
    seed_all(3)
    np.random.randn(), random.gauss(0, 1)  # each makes two and keeps one
    Checkpoints(tmp_path, 1, 1).save(fresh_state())
    expected = [(np.random.randn(), random.gauss(0, 1)) for _ in range(3)]
    seed_all(4)
    Checkpoints(tmp_path, 1, 1).restore(fresh_state())
    assert [(np.random.randn(), random.gauss(0, 1)) for _ in range(3)] == expected


def test_every_rank_gets_its_own_generators_back_and_a_new_rank_its_own_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    states, expected = [], []
    for seed in (10, 11):
        seed_all(seed)
        states.append(global_generators())
        expected.append(draws())
    state = fresh_state()
    state.step = 7
    with monkeypatch.context() as ranks:
        ranks.setattr(checkpoint, "from_every_rank", lambda mine: states)
        Checkpoints(tmp_path, 1, 1).save(state)
    tensors, facts = read_checkpoint(tmp_path / "step-000007")
    found = []
    for number in (0, 1, 2, 3, 2):
        monkeypatch.setenv("RANK", str(number))
        seed_all(99)
        fresh_state().load(tensors, facts)
        found.append(draws())
    assert found[:2] == expected
    assert len(set(found)) == 4 and found[2] == found[4]


def as_format_1(folder: Path) -> None:
    """Rewrite a checkpoint as the code of format 1 wrote it."""
    random_file = folder / "random.safetensors"
    tensors = load_file(random_file)
    position, waits, deviate = tensors.pop("0.numpy_rest").tolist()
    version, *words = tensors.pop("0.python").tolist()
    waiting = tensors.pop("0.python_deviate").tolist()
    save_file({name.removeprefix("0."): value for name, value in tensors.items()}, random_file)
    facts = read_json(folder / "state.json")
    del facts["guard"]
    facts |= {
        "format": 1,
        "random": {"python": [version, words, *(waiting or [None])], "numpy": [int(position), int(waits), deviate]},
    }
    write_json(folder / "state.json", facts)
    rehash(folder)


def rehash(folder: Path) -> None:
    (folder / "complete.json").unlink()
    write_json(folder / "complete.json", {file.name: sha256_file(file) for file in sorted(folder.iterdir())})


def test_a_checkpoint_of_the_first_format_goes_on_to_the_same_end(saved: Path):
    as_format_1(saved / "step-000003")
    state = fresh_state()
    seed_all(99)
    assert Checkpoints(saved, 1, 9).restore(state) and state.step == 3
    assert torch.equal(weights(train_to(state, 5)), uninterrupted(5))


def test_every_older_format_has_an_upgrade():
    assert sorted(UPGRADES) == list(range(1, FORMAT))


def test_a_later_format_with_other_files_is_refused_by_name_and_is_no_damage(saved: Path):
    facts = read_json(saved / "step-000003" / "state.json")
    write_json(saved / "step-000003" / "state.json", facts | {"format": FORMAT + 1})
    (saved / "step-000003" / "random.safetensors").unlink()
    rehash(saved / "step-000003")
    with pytest.raises(NewerFormat, match=f"step-000003: has format {FORMAT + 1}, this code reads up to {FORMAT}"):
        Checkpoints(saved, 1, 9).restore(fresh_state())
    assert (saved / "step-000003").is_dir()


def names(checkpoints: Checkpoints) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in checkpoints.steps()]


def test_the_latest_the_best_and_the_registered_are_kept(tmp_path: Path):
    checkpoints = Checkpoints(tmp_path, 1, 2)
    state = fresh_state()
    losses = {1: 0.5, 2: 0.9, 3: 0.2, 4: None, 5: float("nan"), 6: 0.4, 7: 0.2}
    for step, loss in losses.items():
        state.step = step
        checkpoints.save(state, score=loss)
        if step == 2:
            register_checkpoint(tmp_path / "step-000002")
    assert names(checkpoints) == [2, 3, 6, 7], "of two equally good the earlier is the best"
    assert best_checkpoint(tmp_path) == tmp_path / "step-000003"
    state.step = 8
    checkpoints.save(state)
    tell_score(tmp_path / "step-000008", 0.1)  # as a validation does that looks at the saved weights
    state.step = 9
    checkpoints.save(state)
    assert names(checkpoints) == [2, 8, 9]
    with pytest.raises(FileNotFoundError, match="step-000003: no whole checkpoint"):
        register_checkpoint(tmp_path / "step-000003")


def test_steps_are_in_the_order_of_their_numbers_beyond_a_million(tmp_path: Path):
    checkpoints = Checkpoints(tmp_path, 1, 2)
    state = fresh_state()
    for state.step in (999_999, 1_000_000, 1_000_001):
        checkpoints.save(state)
    assert names(checkpoints) == [1_000_000, 1_000_001]


def test_an_old_one_that_cannot_be_deleted_stops_nothing_and_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    checkpoints = Checkpoints(tmp_path, 1, 1)
    real = shutil.rmtree

    def refuse(path: Path, ignore_errors: bool = False) -> None:
        if Path(path).name == "step-000001":
            raise PermissionError(f"{path} is held")
        real(path, ignore_errors=ignore_errors)

    with monkeypatch.context() as held:
        held.setattr(shutil, "rmtree", refuse)
        train_to(fresh_state(), 2, checkpoints)
    assert names(checkpoints) == [1, 2] and "step-000001 can't be deleted" in caplog.text
    train_to(fresh_state(), 3, checkpoints)
    assert names(checkpoints) == [3]


def test_too_little_disk_is_told_before_a_byte_is_written(saved: Path, monkeypatch: pytest.MonkeyPatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 3_000))
    state = fresh_state()
    state.step = 4
    with pytest.raises(CannotSave, match=r"step-000004 .* 0\.0 MB are free, it needs 0\.\d MB\..* goes on from step-000003"):
        Checkpoints(saved, 1, 9).save(state)
    assert not list(saved.glob(".*"))


SCRIPT = """
import resource, sys
from pathlib import Path
from tests.training.test_checkpoint import *
folder, steps, limit, background = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "background"
seed_all(1)
state = fresh_state()
checkpoints = Checkpoints(folder, 1, 2, background)
if limit:
    train_to(state, 2, checkpoints)
    checkpoints.wait()
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    with checkpoints:
        train_to(state, steps, checkpoints)
except CannotSave as error:
    sys.exit(f"CannotSave: {error}")
"""


def process(folder: Path, steps: int, limit: int = 0, background: bool = False, fault: str = "") -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder), str(steps), str(limit), "background" if background else ""],
        cwd=REPO,
        # Where files may not grow Python leaves cut .pyc files behind, for all who come after.
        env=os.environ | {"PYTHONPATH": str(REPO), "DEEPGEN_FAULT": fault, "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
    )


def gone_on(folder: Path, steps: int) -> torch.Tensor:
    """What a next process ends with."""
    sweep_stale(folder)
    state, checkpoints = fresh_state(), Checkpoints(folder, 1, 2)
    seed_all(1)
    checkpoints.restore(state)
    return weights(train_to(state, steps, checkpoints))


@pytest.mark.parametrize("background", [False, True])
def test_a_disk_that_fills_in_the_middle_of_a_save_leaves_no_half_and_the_run_goes_on(tmp_path: Path, background: bool):
    full = process(tmp_path, 4, limit=500, background=background)
    assert full.returncode == 1 and "CannotSave: checkpoint step-000003 can't be written" in full.stderr, full.stderr
    assert "goes on from step-000002" in full.stderr and "Traceback" not in full.stderr
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step-000001", "step-000002"]
    assert torch.equal(gone_on(tmp_path, 4), uninterrupted(4))


@pytest.mark.parametrize("point", POINTS)
def test_killed_at_any_point_of_a_save_it_goes_on_to_the_same_end(tmp_path: Path, point: str):
    killed = process(tmp_path, 5, fault=f"save:{point}:3")
    assert killed.returncode == -signal.SIGKILL
    assert names(Checkpoints(tmp_path, 1, 2))[-1] == (3 if point == "after_rename" else 2)
    assert torch.equal(gone_on(tmp_path, 5), uninterrupted(5))
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step-000004", "step-000005"], "nothing half is left"


def test_what_is_saved_behind_the_training_is_the_state_of_its_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    seed_all(1)
    checkpoints = Checkpoints(tmp_path, 1, 9, background=True)
    gate = checkpoint.Future()
    real = checkpoints._write
    monkeypatch.setattr(checkpoints, "_write", lambda *arguments: (gate.result(), real(*arguments))[1])
    with checkpoints:
        state = train_to(fresh_state(), 1, checkpoints)
        train_to(state, 3)  # the weights, moments, average, history and generators all move before a byte is written
        assert not checkpoints.steps()
        gate.set_result(None)
    restored = fresh_state()
    Checkpoints(tmp_path, 1, 9).restore(restored)
    assert restored.step == 1 and len(restored.history) == 1
    assert torch.equal(weights(train_to(restored, 4)), uninterrupted(4))


def test_what_the_writing_thread_raised_is_raised_at_the_next_save_or_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*arguments: object) -> None:
        raise OSError("no such disk")

    monkeypatch.setattr(checkpoint, "save_file", fail)
    state = fresh_state()
    with pytest.raises(CannotSave, match="no such disk"):
        train_to(state, 2, Checkpoints(tmp_path, 1, 9, background=True))
    assert state.step == 2, "the first save returned"
    with pytest.raises(CannotSave, match="no such disk"):
        with Checkpoints(tmp_path, 1, 9, background=True) as checkpoints:
            checkpoints.save(state)


def test_a_leftover_of_a_killed_process_of_the_same_number_is_no_hindrance(tmp_path: Path):
    leftover = tmp_path / f".step-000001.{os.getpid()}.tmp"
    leftover.mkdir()
    (leftover / "weights.safetensors").write_bytes(b"half")
    train_to(fresh_state(), 1, Checkpoints(tmp_path, 1, 9))
    assert read_checkpoint(tmp_path / "step-000001") and not leftover.exists()
