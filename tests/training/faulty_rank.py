"""A stage with a fault on one rank: `python -m torch.distributed.run ... -m tests.training.faulty_rank FAULT RANK FIRST [LAST]`.

FAULT, from micro-batch FIRST to LAST on that rank: `nan` (its loss), `spike` (its loss x 1000), `latents` (its input), `die` (SIGKILL), `hang`.
At the end, and where it stops, each rank writes its weights' sum and its step to `end-rank0.json` of the working folder.
"""

import os
import signal
import sys
import time
from typing import Any

from runtime.environment import set_environment

set_environment()

import numpy as np  # noqa: E402
import torch  # noqa: E402

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
    fault, wrong_rank, first, *last = sys.argv[1:]
    supervised.batch_loss = with_fault(supervised.batch_loss, fault, int(wrong_rank), range(int(first), int(*last or [first]) + 1))
    supervised.publish_stage = supervised.remember_start = lambda *_: None
    with open_stage("alignment") as run:
        supervised.run_supervised(run, "alignment")


if __name__ == "__main__":
    main()
