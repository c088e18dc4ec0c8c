"""Bad steps: skipped, rolled back, stopped, each with a trace. A healthy run is not touched by any of it."""

import json
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from data.loader import Batch
from runtime.exits import Plain
from runtime.files import write_json
from runtime.stage import rank
from training.checkpoint import Checkpoints, TrainState
from training.config import GuardConfig
from training.ranks import from_every_rank

MAD_TO_STD = 1.4826  # of a normal distribution


class NonFiniteLoss(Plain):
    """Losses or gradients were NaN or infinite. No weight was changed by those steps."""


class StepsRefused(Plain):
    """The stage itself refused too many steps, most often for want of rewards. No weight was changed by those steps."""


class OutOfMemory(Plain):
    """The device has not the memory that a step takes."""


@contextmanager
def memory_advice(stage: str, micro_batch_size: int) -> Iterator[None]:
    """Raises OutOfMemory, saying what takes less, in place of torch's own error."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise OutOfMemory(
            f"{stage}: {str(error).splitlines()[0]} Lower {stage}.micro_batch_size ({micro_batch_size}; the result stays, by "
            "batch_size), or set launch.gradient_checkpointing: true, or launch.strategy: fsdp2 with more ranks. Other params begin a new "
            "run folder."
        ) from error


class Guard:
    """Looks at each step before it changes a weight. Its counts are part of the state: a resumed run goes on counting.

    A step is bad where its loss, gradient norm or an input is no finite number on any rank, and, with `skip_spikes`, where its loss is a
    spike. A bad step changes no weight and is not counted as a step: its batches are left behind. Each decision is printed and appended
    to `guards.jsonl` of the run folder, with the samples of the step by rank.
    """

    def __init__(
        self, config: GuardConfig, stage: str, folder: Path, accelerator: Accelerator, state: TrainState, checkpoints: Checkpoints
    ) -> None:
        self.config, self.stage, self.folder, self.accelerator = config, stage, folder, accelerator
        self.state, self.checkpoints = state, checkpoints
        self.seen: list[tuple[Batch, Tensor]] = []
        state.guard = {"streak": 0, "skipped": 0, "rollbacks": 0, "spikes": 0} | state.guard

    def see(self, batch: Batch, loss_B: Tensor) -> None:
        """A micro-batch of the step to come, with this rank's losses (B,)."""
        self.seen.append((batch, loss_B.detach()))

    def refuses(self, loss: float, norm: float, rate: float, why: str = "") -> bool:
        """Whether the step must not be taken, decided alike on every rank; after `rollback_after` in a row the state is rolled back.

        Args:
            loss: mean over all ranks and micro-batches.
            norm: of the gradient, over all parameters.
            rate: learning rate that the step would have.
            why: the stage itself refuses it, for this reason: it is counted as skipped, and as no bad step in a row.

        Raises:
            NonFiniteLoss: `stop_after` steps were bad; what they were is in `bad_steps.json` of the run folder.
            StepsRefused: so many, and the stage itself refused the last.
        """
        seen, self.seen = self.seen, []
        finite = math.isfinite(loss) and math.isfinite(norm) and all(finite_input(batch) for batch, _ in seen)
        past = [row["loss"] for row in self.state.history[-self.config.spike_window :]]
        spike = finite and len(past) == self.config.spike_window and deviations(loss, past) > self.config.spike
        bad, spike = self._any_rank(not finite, spike)
        counts = self.state.guard
        counts["spikes"] += spike
        if why:
            counts["skipped"] += 1
            refused: dict[str, Any] = {"step": self.state.step + 1, "why": why}
            self._log("skip", f"{why}: no weight is changed", refused)
            if counts["skipped"] >= self.config.stop_after:
                self._stop(refused)
            return True
        if not (bad or spike):
            counts["streak"] = 0
            return False
        facts: dict[str, Any] = {"step": self.state.step + 1, "loss": number(loss), "grad_norm": number(norm), "lr": rate}
        facts["ranks"] = from_every_rank(account(seen))
        if not bad and not self.config.skip_spikes:
            counts["streak"] = 0
            self._log(
                "spike", f"loss {loss:.4g} is more than {self.config.spike:g} deviations above the last ones; trained as any other", facts
            )
            return False
        counts["streak"] += 1
        counts["skipped"] += 1
        self._log("skip", f"loss {loss:.4g}, gradient norm {norm:.4g}{blame(facts['ranks'])}: no weight is changed", facts)
        if counts["skipped"] >= self.config.stop_after:
            self._stop(facts)
        if counts["streak"] >= self.config.rollback_after:
            self._roll_back(facts)
        return True

    def _any_rank(self, *flags: bool) -> list[bool]:
        """Each flag, true on every rank if it is true on any."""
        if self.accelerator.num_processes == 1:
            return list(flags)
        total = self.accelerator.reduce(torch.tensor([float(flag) for flag in flags], device=self.accelerator.device), "sum")
        return [value > 0 for value in total.tolist()]

    def _roll_back(self, facts: dict[str, Any]) -> None:
        """The weights, step and generators of the last checkpoint that was due; the position in the data and the counts stay.

        Not of one that a stop made: the run that was not stopped has none there, and both must end the same.
        """
        counts, left = self.state.guard | {"streak": 0}, self.state.step
        self.state.guard = counts
        if not self.checkpoints.restore(self.state, due=True):
            self._log("no_rollback", "there is no checkpoint to go back to yet", facts)
            return
        counts["rollbacks"] += 1
        self.state.guard = counts
        self._log("rollback", f"from step {left} to the checkpoint of step {self.state.step}, past the batches that were skipped", facts)

    def _stop(self, facts: dict[str, Any]) -> None:
        evidence = self.folder / "bad_steps.json"
        if rank() == 0:
            write_json(evidence, {"stage": self.stage, "counts": self.state.guard, "last": facts, "log": self._log_file.name})
        if "why" in facts:
            raise StepsRefused(
                f"{self.stage}: {self.state.guard['skipped']} steps refused in all, {self.stage}.guard.stop_after is "
                f"{self.config.stop_after}; the last was step {facts['step']}: {facts['why']}. All are in {self._log_file}."
            )
        raise NonFiniteLoss(
            f"{self.stage}: {self.state.guard['skipped']} bad steps in all, {self.stage}.guard.stop_after is {self.config.stop_after}; the "
            f"last was step {facts['step']}, loss {facts['loss']}, gradient norm {facts['grad_norm']}{blame(facts['ranks'])}. The samples "
            f"are in {evidence}: look at them, or lower {self.stage}.optimizer.lr."
        )

    @property
    def _log_file(self) -> Path:
        return self.folder / "guards.jsonl"

    def _log(self, decision: str, words: str, facts: dict[str, Any]) -> None:
        if rank() != 0:
            return
        print(f"{self.stage}: step {facts['step']}: {decision}: {words}", flush=True)
        with open(self._log_file, "a") as log:
            log.write(json.dumps({"time": time.time(), "decision": decision, "counts": self.state.guard} | facts, allow_nan=False) + "\n")


def finite_input(batch: Batch) -> bool:
    """Whether the batch's latents, and what the vision tower saw, are numbers; its pixels are whole numbers and can't be anything else."""
    if batch.latents is None:
        return True
    return all(bool(np.isfinite(array).all()) for array in (*batch.latents.arrays, *batch.latents.vision))


def deviations(loss: float, past: Sequence[float]) -> float:
    """How far `loss` lies above the median of `past`, in robust standard deviations; 0 where `past` does not vary."""
    middle = statistics.median(past)
    spread = MAD_TO_STD * statistics.median(abs(value - middle) for value in past)
    return (loss - middle) / spread if spread > 0 else 0.0


def account(seen: Sequence[tuple[Batch, Tensor]]) -> list[dict[str, Any]]:
    """A rank's micro-batches of one step: the task, each sample's key and loss, whether its input was finite."""
    return [
        {
            "micro_batch": batch.index,
            "task": batch.task,
            "samples": dict(zip(batch.keys, [number(value) for value in loss_B.tolist()], strict=True)),
            "finite_input": finite_input(batch),
        }
        for batch, loss_B in seen
    ]


def blame(ranks: Sequence[Sequence[dict[str, Any]]]) -> str:
    """Which ranks and samples were no numbers, in words; where all were, the gradient was it."""
    found = [
        f"rank {number}: {', '.join(bad[:4])}"
        for number, micro_batches in enumerate(ranks)
        if (bad := [key for micro in micro_batches for key in bad_samples(micro)])
    ]
    return f" ({'; '.join(found)})" if found else ""


def bad_samples(micro: dict[str, Any]) -> list[str]:
    samples: dict[str, float | str] = micro["samples"]
    return [key for key, loss in samples.items() if isinstance(loss, str) or not micro["finite_input"]]


def number(value: float) -> float | str:
    """JSON has no name for nan and inf: they become words."""
    return value if math.isfinite(value) else str(value)
