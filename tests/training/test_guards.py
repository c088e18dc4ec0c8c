"""A bad step changes no weight, is counted and named, and many of them end the stage; interrupted equals uninterrupted all the same."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from data.loader import Loader
from runtime import exits
from runtime.exits import Interrupted
from training import supervised
from training.checkpoint import Checkpoints, TrainState
from training.guards import NonFiniteLoss, OutOfMemory, deviations
from training.spool import Spool

from .conftest import begin
from .faulty_rank import with_faults
from .test_resume import StopAt

MICRO = 4  # micro-batches a step


def steps(first: int, last: int | None = None) -> range:
    """The micro-batches of attempts number `first` to `last`, from 0."""
    return range(first * MICRO, ((first if last is None else last) + 1) * MICRO)


@pytest.fixture
def train(monkeypatch: pytest.MonkeyPatch, project: Path, edit_params: Callable) -> Callable[..., TrainState]:
    """Train alignment, with a fault on some micro-batches and without its publishing; gives the state at its end."""
    real = supervised.batch_loss, supervised.train

    def train(fault: str = "nan", micro_batches: range = range(0), stop: int | None = None, **guard: Any) -> TrainState:
        ends: list[TrainState] = []
        edit_params(project, lambda params: params["alignment"]["guard"].update(guard))
        monkeypatch.setattr(supervised, "batch_loss", with_faults(real[0], [(fault, 0, micro_batches.start, micro_batches.stop - 1)]))
        monkeypatch.setattr(supervised, "train", lambda *arguments: ends.append(real[1](*arguments)) or ends[0])
        for name in ("publish_stage", "remember_start"):
            monkeypatch.setattr(supervised, name, lambda *_: None)
        torch.seed()
        with begin(project, "alignment", StopAt(stop) if stop else None) as run:
            supervised.run_supervised(run, "alignment")
        return ends[0]

    return train


def weights(state: TrainState) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in state.trained.values()])


def set_aside_checkpoints(project: Path) -> None:
    for checkpoint in project.glob("outputs/runs/alignment/*/step-*"):
        shutil.rmtree(checkpoint)


def log_of(project: Path) -> list[dict[str, Any]]:
    file = max(project.glob("outputs/runs/alignment/*/guards.jsonl"), key=lambda path: path.stat().st_mtime)
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_bad_step_is_skipped_with_its_samples_named_and_its_batches_are_left_behind(train, project: Path, capsys):
    state = train("nan", range(9, 10))
    assert state.step == 4 and [row["step"] for row in state.history] == [1, 2, 3, 4]
    assert state.data["global_sample"] == 5 * MICRO * 2, "five attempts were fed to four steps"
    assert state.guard == {"streak": 0, "skipped": 1, "rollbacks": 0, "spikes": 0}
    (row,) = log_of(project)
    assert (row["decision"], row["step"], row["loss"]) == ("skip", 3, "nan")
    (rank,) = row["ranks"]
    assert [micro["micro_batch"] for micro in rank] == [8, 9, 10, 11]
    assert set(rank[1]["samples"].values()) == {"nan"} and all(isinstance(loss, float) for loss in rank[0]["samples"].values())
    said = capsys.readouterr().out
    assert "alignment: step 3: skip: loss nan" in said and next(iter(rank[1]["samples"])) in said


def test_a_skipped_step_is_as_if_its_batches_were_not_there(train, project: Path, monkeypatch: pytest.MonkeyPatch):
    """Dropout is off in alignment, so that a skipped forward pass leaves no trace but the position."""
    skipped = weights(train("nan", steps(1)))
    real = supervised.Loader.batch
    monkeypatch.setattr(supervised.Loader, "batch", lambda self, index: real(self, index + (MICRO if index >= MICRO else 0)))
    set_aside_checkpoints(project)
    assert torch.equal(weights(train()), skipped)


def test_after_a_skip_a_resumed_process_logs_no_step_again(train, edit_params, project: Path, monkeypatch: pytest.MonkeyPatch):
    """The third attempt is bad. A process dies after it has logged step 3, and the next begins again at step 2, before that attempt."""
    edit_params(project, lambda params: params["alignment"].update(log_every=1))
    real = Loader.batch

    def die(self: Loader, index: int) -> Any:
        if index == 4 * MICRO:
            raise RuntimeError("the machine is gone")
        return real(self, index)

    with monkeypatch.context() as first:
        first.setattr(Loader, "batch", die)
        with pytest.raises(RuntimeError, match="gone"):
            train("nan", steps(2))
    train("nan", steps(2))
    (folder,) = project.glob("outputs/runs/alignment/*")
    logged = [event["step"] for event, _ in Spool(folder).read() if event["kind"] == "metrics" and "loss" in event["values"]]
    assert logged == [1, 2, 3, 4]


def test_an_input_that_is_no_number_is_a_bad_step_whatever_the_loss_says(train, project: Path):
    train("latents", range(0, MICRO))
    (row,) = log_of(project)
    assert row["decision"] == "skip" and any(not micro["finite_input"] for micro in row["ranks"][0])


def test_after_bad_steps_in_a_row_it_rolls_back_and_goes_on_past_them_interrupted_or_not(train, project: Path):
    """Checkpoints at 2 and 4: three bad attempts at step 4 lead back to 2. A stop at 3 saves there, and changes nothing of it."""
    ends = []
    for stop in (None, 1, 3):
        if stop:
            with pytest.raises(Interrupted, match=f"step {stop} of 4"):
                train("nan", steps(3, 5), stop=stop)
        ends.append(train("nan", steps(3, 5)))
        set_aside_checkpoints(project)
    for end in ends:
        assert end.guard == {"streak": 0, "skipped": 3, "rollbacks": 1, "spikes": 0}
        assert end.data["global_sample"] == (3 + 3 + 2) * MICRO * 2
        assert [row["step"] for row in end.history] == [1, 2, 3, 4] and end.history == ends[0].history
        assert torch.equal(weights(end), weights(ends[0]))
    assert log_of(project)[-1]["decision"] == "rollback"


def test_what_a_rollback_takes_back_does_not_count_for_the_early_stop(train, edit_params, project: Path):
    """No held-out loss is good enough: with patience 6 the seventh validation ends the stage, whichever steps were taken twice."""
    hopeless = {"validate_every": 1, "early_stop": {"patience": 6, "min_delta": 1000.0}}
    edit_params(project, lambda params: params["alignment"].update(hopeless, steps=9, checkpoint_every=4))
    end = train("nan", steps(6, 8))
    assert end.guard["rollbacks"] == 1
    assert [row.get("stopped_early") for row in end.history] == [None] * 6 + [1.0]


def test_too_many_bad_steps_stop_the_stage_with_evidence_and_unchanged_weights(train, project: Path, capsys):
    with pytest.raises(
        NonFiniteLoss, match=r"5 bad steps in all, alignment\.guard\.stop_after is 5; .*loss nan.*rank 0: .*bad_steps\.json"
    ):
        train("nan", range(2 * MICRO, 10**6), rollback_after=2, stop_after=5)
    (folder,) = project.glob("outputs/runs/alignment/*")
    evidence = json.loads((folder / "bad_steps.json").read_text())
    assert evidence["counts"] == {"streak": 1, "skipped": 5, "rollbacks": 2, "spikes": 0}
    assert evidence["last"]["lr"] > 0 and evidence["last"]["ranks"][0][0]["samples"]
    assert [path.name for path in Checkpoints(folder, 2, 2).steps()] == ["step-000002"]
    assert [row["decision"] for row in log_of(project)] == ["skip", "skip", "rollback", "skip", "skip", "rollback", "skip"]


def test_before_the_first_checkpoint_there_is_nothing_to_roll_back_to_and_it_goes_on(train, project: Path):
    state = train("nan", steps(0, 2))
    assert state.step == 4 and state.guard["rollbacks"] == 0
    assert [row["decision"] for row in log_of(project)] == ["skip", "skip", "skip", "no_rollback"]


@pytest.mark.parametrize("skip", [False, True])
def test_a_spike_is_counted_and_trains_as_any_other_unless_it_is_told_to(train, edit_params, project: Path, skip: bool):
    edit_params(project, lambda params: params["alignment"].update(steps=5))
    plain = train()
    spiked = train("spike", steps(4), spike_window=4, skip_spikes=skip, spike=100.0)
    (row,) = log_of(project)
    assert row["decision"] == ("skip" if skip else "spike") and row["step"] == 5
    assert spiked.guard == {"streak": 0, "skipped": int(skip), "rollbacks": 0, "spikes": 1}
    assert (spiked.history[4]["loss"] > 100 * plain.history[4]["loss"]) is not skip
    assert spiked.history[:4] == plain.history[:4] and len(spiked.history) == 5


def test_deviations_are_those_of_a_normal_distribution_and_do_not_mind_outliers():
    normal = torch.distributions.Normal(3.0, 0.5).icdf(torch.linspace(0.001, 0.999, 999, dtype=torch.float64)).tolist()
    assert deviations(5.0, normal) == pytest.approx(4.0, rel=0.01)
    assert deviations(5.0, [*normal, *[1e9] * 20]) == pytest.approx(4.0, rel=0.08)
    assert deviations(9.0, [1.0] * 50) == 0.0


def test_too_little_memory_is_told_with_what_takes_less(train, monkeypatch: pytest.MonkeyPatch):
    def full(*_: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nand a page of figures")

    monkeypatch.setattr(Loader, "batch", full)
    with pytest.raises(
        OutOfMemory, match=r"^alignment: CUDA out of memory\. Tried to allocate 2 GiB\. Lower alignment\.micro_batch_size \(2;"
    ):
        train()


def test_a_first_rank_that_hangs_ends_by_its_own_code_and_its_end_is_noted(project: Path):
    script = (
        "import time\nfrom pathlib import Path\nfrom runtime.exits import StopRequest\nfrom runtime.stage import begin_stage\n"
        "from training.heartbeat import watch_ranks\n"
        "with begin_stage(Path.cwd(), 'alignment', StopRequest()) as run, watch_ranks(run):\n    time.sleep(60)\n"
    )
    params = yaml.safe_load((project / "params.yaml").read_text())
    params["launch"]["hang_seconds"] = 1
    (project / "params.yaml").write_text(yaml.safe_dump(params))
    done = subprocess.run([sys.executable, "-c", script], cwd=project, capture_output=True, text=True, timeout=50)
    assert done.returncode == exits.HUNG, done.stderr
    (folder,) = project.glob("outputs/runs/alignment/*")
    ended = json.loads((folder / "ended.json").read_text())
    assert ended["state"] == "failed" and "rank 0: no step for 1 s" in ended["error"]
    assert "in <module>" in (folder / "hang-rank0.txt").read_text()
