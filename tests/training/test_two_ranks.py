"""What befalls one rank of two: both act alike, or both end in bounded time and say why."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from runtime import exits
from training.checkpoint import Checkpoints, read_checkpoint
from training.launch import wait_for_ranks

from .conftest import REPO

pytestmark = pytest.mark.slow
MICRO = 4  # micro-batches a step, of two ranks


@pytest.fixture
def two_ranks(project: Path, edit_params: Callable) -> Callable[..., tuple[subprocess.CompletedProcess, list[dict[str, Any]]]]:
    """Train alignment on two ranks with a fault on the second; gives the process and how each rank ended."""

    def run(fault: str, first: int, last: int, hang_seconds: float = 300, **guard: Any) -> Any:
        def change(params: dict) -> None:
            params["launch"] |= {"processes": 2, "hang_seconds": hang_seconds}
            for stage in ("alignment", "sft"):
                params[stage]["micro_batch_size"] = 1
            params["mr_grpo"]["micro_batch_size"] = 2
            params["alignment"]["guard"] |= guard

        edit_params(project, change)
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        done = subprocess.run(
            [*launcher, "-m", "tests.training.faulty_rank", f"{fault}:1:{first}:{last}"],
            cwd=project,
            env=os.environ | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=500,
        )
        ends = [json.loads(path.read_text()) for path in sorted(project.glob("end-rank*.json"))]
        return done, ends

    return run


def folder_of(project: Path) -> Path:
    (folder,) = project.glob("outputs/runs/alignment/*")
    return folder


def test_a_nan_on_one_rank_is_skipped_rolled_back_and_gone_past_by_both_alike(two_ranks, project: Path):
    done, ends = two_ranks("nan", 3 * MICRO, 4 * MICRO - 1, rollback_after=1)
    assert done.returncode == 0, done.stderr[-3000:]
    assert ends[0] == ends[1] and ends[0]["step"] == 4
    assert ends[0]["guard"] == {"streak": 0, "skipped": 1, "rollbacks": 1, "spikes": 0}
    skip, rollback = (json.loads(line) for line in (folder_of(project) / "guards.jsonl").read_text().splitlines())
    healthy, wrong = skip["ranks"]
    assert all(isinstance(loss, float) for micro in healthy for loss in micro["samples"].values())
    assert all(loss == "nan" for micro in wrong for loss in micro["samples"].values())
    assert rollback["decision"] == "rollback" and f"rank 1: {next(iter(wrong[0]['samples']))}" in done.stdout
    tensors, _ = read_checkpoint(Checkpoints(folder_of(project), 2, 2).steps()[-1])
    assert {name.partition(".")[0] for name in tensors["random"]} == {"0", "1"}


def test_many_of_them_stop_both_with_unchanged_weights(two_ranks, project: Path):
    done, ends = two_ranks("latents", 0, 10**6, stop_after=2)
    assert done.returncode != 0 and "NonFiniteLoss: alignment: 2 bad steps in all" in done.stderr
    assert ends[0] == ends[1] and ends[0]["step"] == 0 and ends[0]["guard"]["skipped"] == 2
    evidence = json.loads((folder_of(project) / "bad_steps.json").read_text())
    assert [all(micro["finite_input"] for micro in rank) for rank in evidence["last"]["ranks"]] == [True, False]


def test_a_rank_that_hangs_leaves_its_stacks_and_both_end_in_bounded_time(two_ranks, project: Path):
    began = time.monotonic()
    done, _ = two_ranks("hang", MICRO, MICRO, hang_seconds=15)
    assert done.returncode != 0 and time.monotonic() - began < 200
    stacks = (folder_of(project) / "hang-rank1.txt").read_text()
    assert "faulty_rank.py" in stacks and "in wrong" in stacks
    assert "rank 1: no step for 15 s" in done.stderr or "lost another rank" in done.stderr
    assert f"exitcode  : {exits.HUNG}" in done.stderr or "RankLost" in done.stderr


def test_a_rank_that_dies_ends_the_other_by_name_and_the_same_command_goes_on(two_ranks, project: Path):
    began = time.monotonic()
    done, _ = two_ranks("die", 3 * MICRO, 3 * MICRO)
    assert done.returncode != 0 and time.monotonic() - began < 200
    assert "RankLost: rank 0 lost another rank" in done.stderr, done.stderr[-3000:]
    again, ends = two_ranks("none", 0, 0)
    assert again.returncode == 0 and "going on from step 2" in again.stdout
    assert ends[0] == ends[1] and ends[0]["step"] == 4


def test_sigterm_finishes_the_step_and_the_command_of_two_ranks_ends_as_interrupted(project: Path, edit_params: Callable):
    """Meanwhile neither rank, nor what started them, listens to the network."""

    def change(params: dict) -> None:
        params["launch"] |= {"processes": 2}
        params["alignment"] |= {"micro_batch_size": 1, "steps": 4000, "checkpoint_every": 4000, "validate_every": 0}
        params["sft"]["micro_batch_size"] = 1
        params["mr_grpo"]["micro_batch_size"] = 2

    edit_params(project, change)
    command = subprocess.Popen([sys.executable, "-m", "training", "alignment"], cwd=project, stdout=subprocess.PIPE, text=True)
    assert command.stdout is not None
    next(line for line in command.stdout if line.startswith("alignment: 1") or "/4000 steps" in line)
    processes = [psutil.Process(command.pid), *psutil.Process(command.pid).children(recursive=True)]
    listening = {place.laddr.ip for process in processes for place in process.net_connections() if place.status == psutil.CONN_LISTEN}
    assert len(processes) == 3 and listening <= {"127.0.0.1"}
    command.terminate()
    said, _ = command.communicate(timeout=60)
    assert command.returncode == exits.INTERRUPTED, said
    assert json.loads((folder_of(project) / "ended.json").read_text())["state"] == "interrupted"
    assert len(Checkpoints(folder_of(project), 4000, 2).steps()) == 1


@pytest.mark.parametrize(
    ("ends", "code"),
    [
        (["exit(0)", "exit(0)"], exits.DONE),
        (["exit(75)", "exit(75)"], exits.INTERRUPTED),
        (["import time; time.sleep(0.5); exit(1)", "exit(5)"], exits.HUNG),
        (["import os; os.kill(os.getpid(), 9)", "import time; time.sleep(60)"], 128 + 9),
    ],
)
def test_ranks_end_as_the_first_that_failed_and_none_is_left_alone(ends: list[str], code: int):
    ranks = [subprocess.Popen([sys.executable, "-c", end]) for end in ends]
    assert wait_for_ranks(ranks, alone=1) == code
    assert all(process.returncode is not None for process in ranks)
