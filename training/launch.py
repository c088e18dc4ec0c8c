"""The one seam at which training processes start, and the accelerator they get."""

import os
import sys
from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

from runtime.exits import Plain
from training.config import LaunchConfig

START = 60.0  # seconds


class WorldSizeMismatch(Plain):
    """The launcher started another number of ranks than params.yaml asks for."""


def start_ranks(config: LaunchConfig, arguments: list[str]) -> None:
    """Become torchrun where several ranks are asked for and this is not one of them yet; return in the rank that trains.

    `accelerate launch --cpu --num_processes 2` silently starts one process, so it is not used; accelerate runs inside each rank.
    """
    if config.processes == 1 or "RANK" in os.environ:
        return
    os.environ["OMP_NUM_THREADS"] = str(config.threads)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={config.processes}", "-m", *arguments]
    os.execv(sys.executable, command)


def build_accelerator(config: LaunchConfig) -> Accelerator:
    """Accelerator of this rank, with the configured precision and threads.

    A collective call gives up `START` seconds after `launch.hang_seconds`: a rank that hangs speaks for itself first
    (`training.heartbeat`), and ranks that start unequally fast are no hang.

    Raises:
        WorldSizeMismatch: the number of ranks is not `launch.processes`.
    """
    torch.set_num_threads(config.threads)
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),
        mixed_precision="no" if config.precision == "fp32" else config.precision,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=config.hang_seconds + START))] if config.hang_seconds else [],
    )
    if accelerator.num_processes != config.processes:
        raise WorldSizeMismatch(
            f"launch.processes: {config.processes} asked for, {accelerator.num_processes} running. Start the stage by its own command "
            "(`python -m training STAGE`), which starts as many."
        )
    return accelerator
