"""A stage with a fault on one rank: `python -m torch.distributed.run ... -m tests.training.faulty_rank FAULT RANK FIRST LAST`.

FAULT, from micro-batch FIRST to LAST on that rank: `nan` (its loss), `spike` (its loss x 1000), `latents` (its input), `die` (SIGKILL) or
`hang`. Where it ends, each rank writes a digest of its weights, its step and its counts to `end-rank0.json` of the working folder.
"""

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from runtime.environment import set_environment

set_environment()

import numpy as np  # noqa: E402
import torch  # noqa: E402

from runtime.files import sha256_bytes, write_json  # noqa: E402
from runtime.stage import open_stage, rank  # noqa: E402
from training import supervised  # noqa: E402


def with_fault(batch_loss: Any, fault: str, wrong_rank: int, micro_batches: range) -> Any:
    def wrong(wrapped: Any, model: Any, batch: Any, *rest: Any) -> torch.Tensor:
        if rank() != wrong_rank or batch.index not in micro_batches:
            return batch_loss(wrapped, model, batch, *rest)
        if fault == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if fault == "hang":
            time.sleep(600)
        if fault == "latents" and batch.latents is not None:
            batch.latents.mean[0] = np.inf
        loss_B = batch_loss(wrapped, model, batch, *rest)
        return loss_B * {"nan": torch.nan, "spike": 1000.0}.get(fault, 1.0)

    return wrong


def main() -> None:
    fault, wrong_rank, first, last = sys.argv[1:]
    supervised.batch_loss = with_fault(supervised.batch_loss, fault, int(wrong_rank), range(int(first), int(last) + 1))
    supervised.publish_stage = supervised.remember_start = lambda *_: None
    states, real = [], supervised.Checkpoints.restore
    supervised.Checkpoints.restore = lambda self, state, due=False: states.append(state) or real(self, state, due)
    try:
        with open_stage("alignment") as run:
            supervised.run_supervised(run, "alignment")
    finally:
        weights = torch.cat([p.detach().flatten() for p in states[0].trained.values()])
        end = {"weights": sha256_bytes(weights.numpy().tobytes()), "step": states[0].step, "guard": states[0].guard}
        write_json(Path(f"end-rank{rank()}.json"), end)


if __name__ == "__main__":
    main()
