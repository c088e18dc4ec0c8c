"""A stage with faults on one rank: `python -m torch.distributed.run ... -m tests.training.faulty_rank FAULT:RANK:FIRST:LAST ...`.

FAULT, from micro-batch FIRST to LAST on that rank: `nan` or `inf` (its loss), `spike` (its loss x 1000), `gradient nan` or `gradient inf`
(of a loss that is a number), `latents` (its input), `die` (SIGKILL) or `hang`. Where it ends, each rank writes to `end-rank0.json` of the
working folder a digest of its weights, its step, its counts and, as `trail`, its weights before each step that it tried.
"""

import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from runtime.environment import set_environment

set_environment()

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import distributed  # noqa: E402

from runtime.files import sha256_bytes, write_json  # noqa: E402
from runtime.stage import open_stage, rank  # noqa: E402
from training import supervised  # noqa: E402


def with_faults(batch_loss: Any, faults: Sequence[Sequence[Any]]) -> Any:
    def fault_of(micro_batch: int) -> str:
        found = [kind for kind, wrong, first, last in faults if int(wrong) == rank() and int(first) <= micro_batch <= int(last)]
        return found[0] if found else "none"

    def wrong(wrapped: Any, model: Any, batch: Any, *rest: Any) -> torch.Tensor:
        fault = fault_of(batch.index)
        if fault == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if fault == "hang":
            time.sleep(600)
        if fault == "latents" and batch.latents is not None:
            batch.latents.mean[0] = np.inf
        loss_B = batch_loss(wrapped, model, batch, *rest)
        if fault.startswith("gradient"):
            loss_B.register_hook(lambda gradient_B: gradient_B * float(fault.split()[1]))
        return loss_B * {"nan": torch.nan, "inf": torch.inf, "spike": 1000.0}.get(fault, 1.0)

    return wrong


def with_trail(batch_loss: Any, states: list[Any], trail: list[dict[str, Any]]) -> Any:
    """Note the weights before each step that is tried."""

    def noting(wrapped: Any, model: Any, batch: Any, config: Any, stage: str) -> torch.Tensor:
        if batch.index % config.accumulation(distributed.get_world_size()) == 0:
            trail.append({"micro_batch": batch.index, "step": states[0].step, "weights": digest(states[0])})
        return batch_loss(wrapped, model, batch, config, stage)

    return noting


def digest(state: Any) -> str:
    return sha256_bytes(torch.cat([p.detach().flatten() for p in state.trained.values()]).numpy().tobytes())


def main() -> None:
    faults = [word.split(":") for word in sys.argv[1:]]
    states: list[Any] = []
    trail: list[dict[str, Any]] = []
    supervised.batch_loss = with_trail(with_faults(supervised.batch_loss, faults), states, trail)
    supervised.publish_stage = supervised.remember_start = lambda *_: None
    real = supervised.Checkpoints.restore
    supervised.Checkpoints.restore = lambda self, state, due=False: states.append(state) or real(self, state, due)
    try:
        with open_stage("alignment") as run:
            supervised.run_supervised(run, "alignment")
    finally:
        end = {"weights": digest(states[0]), "step": states[0].step, "guard": states[0].guard, "trail": trail}
        write_json(Path(f"end-rank{rank()}.json"), end)


if __name__ == "__main__":
    main()
