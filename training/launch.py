"""The one seam at which training processes start, and the accelerator they get."""

import importlib.util
import os
import sys

import torch
from accelerate import Accelerator

from runtime.exits import Plain
from training.config import LaunchConfig


class WorldSizeMismatch(Plain):
    """The launcher started another number of ranks than params.yaml asks for."""


class StrategyMissing(Plain):
    """`launch.strategy` names what can't run here."""


def start_ranks(config: LaunchConfig, arguments: list[str]) -> None:
    """Become torchrun where several ranks are asked for and this is not one of them yet; return in the rank that trains.

    `accelerate launch --cpu --num_processes 2` silently starts one process, so it is not used; accelerate runs inside each rank.
    """
    if config.processes == 1 or "RANK" in os.environ:
        return
    os.environ["OMP_NUM_THREADS"] = str(config.threads)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={config.processes}", "-m", *arguments]
    os.execv(sys.executable, command)


def refuse_missing(config: LaunchConfig) -> None:
    """Raises StrategyMissing, saying what is missing, unless this program can train by `launch.strategy`."""
    if config.strategy != "zero2":
        return
    found = importlib.util.find_spec("deepspeed") is not None
    missing = "checkpoints of DeepSpeed's partitioned optimizer, which are not written yet" if found else "the package deepspeed"
    raise StrategyMissing(
        f"launch.strategy: zero2 needs {missing}. fsdp2 with `reshard_after_forward: false` in training/accelerate/fsdp2.yaml keeps "
        "moments and gradients in shards likewise."
    )


def build_accelerator(config: LaunchConfig) -> Accelerator:
    """Accelerator of this rank, with the configured precision and threads.

    Raises:
        WorldSizeMismatch: the number of ranks is not `launch.processes`.
        StrategyMissing: `launch.strategy` can't run here.
    """
    refuse_missing(config)
    torch.set_num_threads(config.threads)
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), mixed_precision="no" if config.precision == "fp32" else config.precision)
    if accelerator.num_processes != config.processes:
        raise WorldSizeMismatch(
            f"launch.processes: {config.processes} asked for, {accelerator.num_processes} running. Start the stage by its own command "
            "(`python -m training STAGE`), which starts as many."
        )
    return accelerator
