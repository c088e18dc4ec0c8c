"""The one seam at which training processes start, and the accelerator they get."""

import importlib.util
import os
import shutil
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


class LaunchRefused(Plain):
    """`launch` asks for what can't run here."""


def start_ranks(config: LaunchConfig, arguments: list[str]) -> None:
    """Become torchrun where several ranks are asked for and this is not one of them yet; return in the rank that trains.

    `accelerate launch --cpu --num_processes 2` silently starts one process, so it is not used; accelerate runs inside each rank.
    """
    if config.processes == 1 or "RANK" in os.environ:
        return
    os.environ["OMP_NUM_THREADS"] = str(config.threads)
    command = [sys.executable, "-m", "training.torchrun", "--standalone", f"--nproc_per_node={config.processes}", "-m", *arguments]
    os.execv(sys.executable, command)


def refuse_missing(config: LaunchConfig) -> None:
    """Raises LaunchRefused, saying what is missing, unless `launch.strategy` and `launch.compile` can be had here."""
    compiler = os.environ.get("CXX", "g++")
    if config.compile and not torch.cuda.is_available() and shutil.which(compiler) is None:
        raise LaunchRefused(
            f"launch.compile: true needs a C++ compiler, and {compiler!r} is not found. Install g++, name another in CXX, or set false."
        )
    if config.strategy != "zero2":
        return
    found = importlib.util.find_spec("deepspeed") is not None
    missing = "checkpoints of DeepSpeed's partitioned optimizer, which are not written yet" if found else "the package deepspeed"
    raise LaunchRefused(
        f"launch.strategy: zero2 needs {missing}. fsdp2 with `reshard_after_forward: false` in training/accelerate/fsdp2.yaml keeps "
        "moments and gradients in shards likewise."
    )


def build_accelerator(config: LaunchConfig) -> Accelerator:
    """Accelerator of this rank, with the configured precision and threads.

    A collective call gives up `START` seconds after `launch.hang_seconds`: a rank that hangs says so first (`training.heartbeat`),
    and ranks that start unequally fast are no hang.

    Raises:
        WorldSizeMismatch: the number of ranks is not `launch.processes`.
        LaunchRefused: `launch.strategy` or `launch.compile` can't be had here.
    """
    refuse_missing(config)
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
