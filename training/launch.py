"""The one seam at which training processes start, and the accelerator they get."""

import importlib.util
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from torch import distributed

from runtime import exits
from runtime.exits import Plain
from runtime.stage import rank
from training.config import LaunchConfig

START = 60.0  # seconds
ALONE = 30.0
MEETING = "DEEPGEN_MEETING"  # the file at which ranks find each other


class WorldSizeMismatch(Plain):
    """The launcher started another number of ranks than params.yaml asks for."""


class LaunchRefused(Plain):
    """`launch` asks for what can't run here."""


def start_ranks(config: LaunchConfig, arguments: list[str]) -> None:
    """Start the ranks of a command and end as they do, where several are asked for; return in the rank that trains.

    torchrun is not used: it ends as failed where the ranks were interrupted, kills a save after 30 s, and its store listens to the network
    and unpickles. These ranks meet at a file.
    """
    if config.processes == 1 or "RANK" in os.environ:
        return
    exits.exit_with_parent()
    sys.exit(run_ranks(config.processes, config.threads, arguments))


def run_ranks(processes: int, threads: int, arguments: list[str]) -> int:
    """Start the ranks of a command, pass on the signals that come meanwhile, and wait: an exit code of `runtime.exits`."""
    with tempfile.TemporaryDirectory(prefix="deepgen-ranks-") as folder:
        shared = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "OMP_NUM_THREADS": str(threads)}
        shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", MEETING: f"{folder}/meeting"}  # accelerate wants the first two
        environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo"} | shared
        command = [sys.executable, "-m", *arguments]
        ranks: list[subprocess.Popen[bytes]] = []
        for number in exits.SIGNALS:
            signal.signal(number, lambda received, _: send(ranks, received))
        for n in range(processes):
            own = {"RANK": str(n), "LOCAL_RANK": str(n)}
            ranks.append(subprocess.Popen(command, env=environment | own, start_new_session=True))
        return wait_for_ranks(ranks)


def send(ranks: Sequence["subprocess.Popen[bytes]"], number: int) -> None:
    for process in ranks:
        process.send_signal(number)


def wait_for_ranks(ranks: Sequence["subprocess.Popen[bytes]"], alone: float = ALONE) -> int:
    """Until all have ended; the exit code of the first that failed, else INTERRUPTED if one was, else DONE.

    Args:
        alone: seconds that the others have to end by themselves once one has failed; then they are killed.
    """
    failed, deadline = exits.DONE, math.inf
    while None in (now := [process.poll() for process in ranks]):
        codes = [code for code in now if code not in (None, exits.DONE, exits.INTERRUPTED)]
        if codes and not failed:
            failed, deadline = codes[0], time.monotonic() + alone
        if time.monotonic() > deadline:
            send(ranks, signal.SIGKILL)
        time.sleep(0.1)
    codes = [process.returncode for process in ranks]
    failed = failed or next((code for code in codes if code not in (exits.DONE, exits.INTERRUPTED)), exits.DONE)
    if failed:
        return failed if failed > 0 else 128 - failed  # as a shell tells of a signal
    return exits.INTERRUPTED if exits.INTERRUPTED in codes else exits.DONE


def refuse_missing(config: LaunchConfig) -> None:
    """Raises LaunchRefused, saying what is missing, unless the ranks, `launch.strategy` and `launch.compile` can be had here."""
    gpus = torch.cuda.device_count()
    if torch.cuda.is_available() and config.processes > gpus:
        raise LaunchRefused(
            f"launch.processes: {config.processes} ranks asked for, each on a GPU of its own, and {gpus} found. Set at most as many, or "
            "train on the CPU: CUDA_VISIBLE_DEVICES= (empty) before the command."
        )
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


def join_ranks(timeout: timedelta | None = None) -> None:
    """Meet the other ranks of this command, where it has several."""
    if MEETING in os.environ and not distributed.is_initialized():
        meeting, size = os.environ[MEETING], int(os.environ["WORLD_SIZE"])
        backend = "cuda:nccl,cpu:gloo" if torch.cuda.is_available() else "gloo"
        distributed.init_process_group(backend, store=distributed.FileStore(meeting, size), rank=rank(), world_size=size, timeout=timeout)


def build_accelerator(config: LaunchConfig) -> Accelerator:
    """Accelerator of this rank, with the configured precision and threads.

    A collective call gives up `START` seconds after `launch.hang_seconds`: a rank that hangs says so first (`training.heartbeat`),
    and ranks that start unequally fast are no hang.

    Raises:
        WorldSizeMismatch: the number of ranks is not `launch.processes`.
        LaunchRefused: the ranks, `launch.strategy` or `launch.compile` can't be had here.
    """
    refuse_missing(config)
    torch.set_num_threads(config.threads)
    timeout = timedelta(seconds=config.hang_seconds + START) if config.hang_seconds else None
    join_ranks(timeout)
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),
        mixed_precision="no" if config.precision == "fp32" else config.precision,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timeout)] if timeout else [],
    )
    if accelerator.num_processes != config.processes:
        raise WorldSizeMismatch(
            f"launch.processes: {config.processes} asked for, {accelerator.num_processes} running. Start the stage by its own command "
            "(`python -m training STAGE`), which starts as many."
        )
    return accelerator
