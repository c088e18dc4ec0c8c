"""The loop that every part of the foundation trains in: whole steps, whole checkpoints, a stop that is saved."""

import os
import shutil
from collections import defaultdict, deque
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from runtime.exits import Interrupted
from runtime.files import fsync_folder, fsync_tree, read_json, sha256_file, sweep_stale, write_json
from runtime.progress import Progress
from runtime.run_folder import checkpoints, step_of
from training.checkpoint import CheckpointCorrupt

STATE, COMPLETE = "state.pt", "complete.json"


def train_steps(
    part: str,
    total: int,
    step: Callable[[int], dict[str, float]],
    state: dict[str, Any],
    folder: Path,
    save_every: int,
    stop: Callable[[], bool],
    rank: int = 0,
    keep: int = 1,
    on_save: Callable[[int], None] | None = None,
) -> None:
    """Take steps up to `total`, from the newest checkpoint in `folder` on.

    No step may draw from a global generator: a draw is named by its step, so that a resumed run draws what the whole one drew.

    Args:
        step: does step i (0 first) whole, and returns numbers; shown and logged, in `<part>.jsonl` beside `folder`, is their mean over the
            last hundred steps.
        state: name -> what has `state_dict` and `load_state_dict`: all that must survive.
        stop: looked at before each step. If it says so on any rank, all save and stop.
        rank: 0 alone writes; all read.
        keep: the newest checkpoints that stay.
        on_save: called on rank 0 with the steps done, after each save.

    Raises:
        Interrupted: saved, the same command goes on.
        CheckpointCorrupt: naming the file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if rank == 0:
        sweep_stale(folder)
    done = restore(state, folder)
    recent: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=100))
    log = folder.parent / f"{part}.jsonl"
    with Progress(total, "step", part, log, start=done) if rank == 0 else nullcontext() as progress:
        while done < total:
            stopped = on_any_rank(stop())
            if not stopped:
                for name, value in step(done).items():
                    recent[name].append(value)
                done += 1
                if progress is not None:
                    progress.update(**{name: sum(values) / len(values) for name, values in recent.items()})
            if rank == 0 and (stopped or done % save_every == 0 or done == total):
                save(state, folder, done, keep)
                if on_save is not None:
                    on_save(done)
            if stopped:
                raise Interrupted(f"{part}: stopped after step {done} of {total}. Run the same command to go on.")


def on_any_rank(flag: bool) -> bool:
    """Whether any rank says so; every rank must ask."""
    if not distributed.is_initialized():
        return flag
    said = torch.tensor(float(flag))
    distributed.all_reduce(said, distributed.ReduceOp.MAX)
    return bool(said)


def save(state: dict[str, Any], folder: Path, done: int, keep: int) -> None:
    """Write `folder/step-000500`, whole or not at all, unless it is there; then delete all but the newest `keep`."""
    final = folder / f"step-{done:06d}"
    if not final.exists():
        temporary = folder / f".{final.name}.{os.getpid()}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)  # of a killed process that had the same number
        temporary.mkdir()
        torch.save({name: held.state_dict() for name, held in state.items()}, temporary / STATE)
        write_json(temporary / COMPLETE, {STATE: sha256_file(temporary / STATE)})
        fsync_tree(temporary)
        os.rename(temporary, final)
        fsync_folder(folder)
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old)


def restore(state: dict[str, Any], folder: Path) -> int:
    """Load the newest checkpoint in `folder` into `state`: the steps that were done, 0 where there is none.

    Raises:
        CheckpointCorrupt: naming the file that is missing or not the one that was written, and what to do.
    """
    found = checkpoints(folder)
    if not found:
        return 0
    newest = found[-1]
    goes_on = f"goes on from {found[-2].name}" if len(found) > 1 else "begins this part again"
    mend = f"Delete {newest}; the same command then {goes_on}."
    try:
        expected = read_json(newest / COMPLETE)[STATE]
        whole = sha256_file(newest / STATE) == expected
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointCorrupt(f"{newest}: {error}. {mend}") from error
    if not whole:
        raise CheckpointCorrupt(f"{newest / STATE}: has not the sha256 it was written with. {mend}")
    held = torch.load(newest / STATE, weights_only=True)
    if set(held) != set(state):
        raise CheckpointCorrupt(f"{newest / STATE}: holds {sorted(held)}, and {sorted(state)} train here. {mend}")
    for name, value in held.items():
        state[name].load_state_dict(value)
    return step_of(newest)
