"""The loop that every stage trains in: gradients -> guard -> step -> log -> save. A stage brings its gradients, the rest is here."""

import contextlib
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch.distributed.fsdp import FSDPModule

from runtime.exits import Interrupted
from runtime.progress import Progress
from runtime.stage import StageRun, rank
from training.checkpoint import Checkpoints, TrainState, fault
from training.config import StageConfig
from training.guards import Guard, memory_advice
from training.heartbeat import Heartbeat, watch_ranks
from training.optim import set_learning_rate
from training.ranks import whole
from training.sharding import gathered
from training.tracking import Tracker
from training.validation import LOSS as HELD_OUT_LOSS
from training.validation import Validation


@dataclass(frozen=True)
class Tried:
    """A step whose gradients are there, and that has changed nothing yet.

    loss: mean over all ranks. row: its numbers in the history. curve: what is logged beside them; logged: whether it is a log step.
    refused: why it must not be taken, whatever its numbers; "" where nothing speaks against it.
    """

    loss: float
    row: dict[str, float] = field(default_factory=dict)
    curve: dict[str, float] = field(default_factory=dict)
    logged: bool = False
    refused: str = ""


class Work(Protocol):
    """What a stage does in a step."""

    def gradients(self, guard: Guard, heartbeat: Heartbeat) -> Tried:
        """Leave the gradients of step `state.step` in the parameters."""
        ...

    def taken(self) -> None:
        """The step was taken, and is not yet counted."""
        ...

    def data_state(self) -> dict[str, Any]:
        """Where the next step reads on."""
        ...

    def shown(self, tried: Tried, rate: float) -> dict[str, float]:
        """What the progress line shows."""
        ...


def train_to_end(
    run: StageRun,
    stage: str,
    config: StageConfig,
    accelerator: Accelerator,
    state: TrainState,
    checkpoints: Checkpoints,
    work: Work,
    validation: Validation,
    tracker: Tracker,
    samples: int,
) -> TrainState:
    """Interrupted at any step and started again it ends with the same weights, bit for bit on one kind of CPU.

    Args:
        samples: of a step, over all ranks, for the rate that is shown.

    Raises:
        Interrupted: it was told to stop, and has saved.
    """
    guard = Guard(config.guard, stage, run.folder, accelerator, state, checkpoints)
    tracker.checkpoints(checkpoints.steps(), state.history)
    stopped, log = False, run.folder / "progress.jsonl" if rank() == 0 else None
    with (
        watch_ranks(run) as heartbeat,
        memory_advice(stage, config.micro_batch_size),
        checkpoints,
        Progress(config.steps, "step", stage, log, start=state.step, samples=samples) as progress,
    ):
        while state.step < config.steps and not (stopped or validation.over):
            tried = work.gradients(guard, heartbeat)
            norm = float(whole(accelerator.clip_grad_norm_(state.trained.values(), config.optimizer.max_grad_norm)))
            rate = set_learning_rate(state.optimizer, state.step, config.steps, config.optimizer)
            heartbeat.beat()
            before = state.step
            if guard.refuses(tried.loss, norm, rate, tried.refused):
                state.optimizer.zero_grad(set_to_none=True)
                state.data = work.data_state()
                if state.step < before:  # after a mere skip nothing may be logged twice, which a killed process has logged already
                    tracker.back_to(state.step)
                progress.update(state.step - progress.done, skipped=state.guard["skipped"])
                continue
            fault("update", state.step + 1)
            work.taken()
            state.optimizer.step()
            state.optimizer.zero_grad(set_to_none=True)
            if state.ema is not None:
                state.ema.update()
            state.step += 1
            row = {"loss": tried.loss, "grad_norm": norm, "lr": rate} | tried.row
            held_out = validation.look(state.step)
            heartbeat.beat()
            state.history.append({"step": state.step} | row | held_out)
            state.data = work.data_state()
            if tried.logged or held_out:
                tracker.log(state.step, **row, **tried.curve, **held_out)
            progress.update(**work.shown(tried, rate))
            done = state.step == config.steps or validation.over
            stopped = agreed(accelerator, bool(run.stop)) and not done
            if checkpoints.due(state.step) or stopped or done:
                tracker.flush()  # a resumed process does not log these steps again
                checkpoints.save(gathered(state), held_out.get(HELD_OUT_LOSS))
                tracker.checkpoints(checkpoints.steps(), state.history)
                heartbeat.beat()
    tracker.checkpoints(checkpoints.steps(), state.history)  # one that was written in the background is whole only now
    if stopped:
        raise Interrupted(
            f"stopped at step {state.step} of {config.steps}, saved in {run.folder.relative_to(run.root)}; the same command goes on"
        )
    return state


def accumulate(accelerator: Accelerator, wrapped: torch.nn.Module, last: bool) -> Any:
    """Ranks exchange gradients on the last micro-batch of a step only."""
    if isinstance(wrapped, FSDPModule):
        wrapped.set_requires_gradient_sync(last)
        return contextlib.nullcontext()
    return contextlib.nullcontext() if last else accelerator.no_sync(wrapped)


def agreed(accelerator: Accelerator, flag: bool) -> bool:
    """True on every rank if it is true on any: all stop at the same step."""
    if accelerator.num_processes == 1:
        return flag
    return bool(accelerator.reduce(torch.tensor(float(flag), device=accelerator.device), "sum").item())
