"""An optimizer step of the real loop at the tiny preset's size, and where its time goes, against a plain loop over the same batches.

    python benchmarks/train_step.py [--json FILE] [--pairs N] [--steps N] [--stages alignment sft]

The plain loop is the least that trains the same: loader, loss, backward, clip, AdamW, average of the weights; no accelerate, no MLflow, no
progress, no checkpoints; neither looks at held-out samples. Both start from the same weights and must give the same losses. A run of the
real loop ends with a checkpoint, as every `checkpoint_every` steps of the preset do; the loop's times are between entering and leaving it,
and its parts are timed from outside. Times are medians of interleaved pairs, in milliseconds a step; how much slower is the median over
the pairs of their own ratios.
Goal: at most 5% slower than the plain loop.
"""

import argparse
import contextlib
import copy
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import yaml
from accelerate import Accelerator

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data.loader import Batch, Loader
from data.stages import run_mixture, run_shards
from model.deepgen import DeepGen
from model.weights import load_foundation
from runtime.environment import set_environment
from runtime.exits import StopRequest
from runtime.files import read_json
from runtime.progress import Progress
from runtime.stage import StageRun, begin_stage
from training import loop, supervised
from training.checkpoint import Checkpoints
from training.foundation import run_foundation
from training.latents import run_latents
from training.launch import build_accelerator
from training.optim import EMA, build_optimizer, set_learning_rate
from training.stages import freeze_for
from training.tracking import Tracker

ROOT = Path(__file__).resolve().parents[1]
SLOWER = 0.05
PARTS = ("data", "forward", "backward", "optimizer", "logging", "saving")


def build(root: Path, steps: int) -> None:
    """A project of the tiny preset with little data."""
    params = yaml.safe_load((ROOT / "presets" / "tiny.yaml").read_text())
    for part in params["data"]["parts"].values():
        part["samples"] = 512 if part["split"] == "train" else 16
    params["launch"] |= {"processes": 1, "threads": 2}  # what is measured runs in this process
    for stage in ("alignment", "sft"):
        params[stage] |= {"steps": steps, "checkpoint_every": steps, "validate_every": 0, "board_every": 0}
    for name in ("data", "model", "training", "runtime", "foundation"):
        (root / name).symlink_to(ROOT / name)
    for name in ("dvc.yaml", "takedown.txt"):
        shutil.copyfile(ROOT / name, root / name)
    (root / "params.yaml").write_text(yaml.safe_dump(params))
    stages: list[tuple[str, Callable[[StageRun], None]]] = [(f"shards@{part}", run_shards) for part in params["data"]["parts"]]
    stages += [(f"mixture@{stage}", run_mixture) for stage in ("alignment", "sft", "mr_grpo")]
    for name, work in [*stages, ("foundation", run_foundation), ("latents", run_latents)]:
        with begin_stage(root, name, StopRequest()) as run:
            work(run)
    (root / "outputs" / "alignment").symlink_to("foundation")  # SFT begins with the foundation here


class Stopwatch:
    """Seconds by part of the loop, from calls that are wrapped while it runs."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.loop = 0.0

    def timed(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*arguments: Any, **settings: Any) -> Any:
            began = time.perf_counter()
            try:
                return call(*arguments, **settings)
            finally:
                self.seconds[part] += time.perf_counter() - began

        return wrapper

    def progress(self) -> type[Progress]:
        watch = self

        class Timed(Progress):
            def __enter__(self) -> Any:
                watch.loop = -time.perf_counter()
                return super().__enter__()

            def __exit__(self, *problem: Any) -> None:
                super().__exit__(*problem)
                watch.loop += time.perf_counter()

            update = watch.timed("logging", Progress.update)

        return Timed


def real_loop(run: StageRun, stage: str, accelerator: Accelerator, model: DeepGen, tracker: Tracker) -> tuple[Stopwatch, list[float]]:
    for folder in run.folder.glob("step-*"):
        shutil.rmtree(folder)
    torch.manual_seed(0)
    trained = freeze_for(model, stage, getattr(run.params, stage).lora)
    watch = Stopwatch()
    with (
        mock.patch.object(loop, "Progress", watch.progress()),
        mock.patch.object(supervised, "batch_loss", watch.timed("forward", supervised.batch_loss)),
        mock.patch.object(Loader, "batch", watch.timed("data", Loader.batch)),
        mock.patch.object(Accelerator, "backward", watch.timed("backward", Accelerator.backward)),
        mock.patch.object(Accelerator, "clip_grad_norm_", watch.timed("optimizer", Accelerator.clip_grad_norm_)),
        mock.patch.object(torch.optim.AdamW, "step", watch.timed("optimizer", torch.optim.AdamW.step)),
        mock.patch.object(EMA, "update", watch.timed("optimizer", EMA.update)),
        mock.patch.object(Tracker, "log", watch.timed("logging", Tracker.log)),
        mock.patch.object(Checkpoints, "save", watch.timed("saving", Checkpoints.save)),
    ):
        state = supervised.train(run, stage, accelerator, model, trained, tracker)
    return watch, [row["loss"] for row in state.history]


def plain_loop(run: StageRun, stage: str, model: DeepGen) -> tuple[float, list[float]]:
    config = getattr(run.params, stage)
    torch.manual_seed(0)
    trained = freeze_for(model, stage, config.lora)
    optimizer, average = build_optimizer(trained.values(), config.optimizer), EMA(trained, config.ema_decay)
    mixture = read_json(run.root / "outputs" / "mixture" / f"{stage}.json")
    batches: Iterator[Batch] = iter(Loader(mixture, run.root / "outputs" / "shards", config.micro_batch_size))
    micro_batches = config.accumulation(1)
    model.train()
    losses = []
    began = time.perf_counter()
    for step in range(config.steps):
        total = 0.0
        for _ in range(micro_batches):
            loss = supervised.batch_loss(model, model, next(batches), config, stage).mean()
            (loss / micro_batches).backward()
            total += loss.item() / micro_batches
        torch.nn.utils.clip_grad_norm_(trained.values(), config.optimizer.max_grad_norm)
        set_learning_rate(optimizer, step, config.steps, config.optimizer)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        average.update()
        losses.append(total)
    return time.perf_counter() - began, losses


def compare(root: Path, stage: str, pairs: int) -> dict[str, Any]:
    ours: list[float] = []
    plain: list[float] = []
    parts: dict[str, list[float]] = {name: [] for name in PARTS}
    with begin_stage(root, stage, StopRequest()) as run:
        accelerator, tracker = build_accelerator(run.params.launch), Tracker(run)
        torch.manual_seed(0)
        start = load_foundation(root / "outputs" / "foundation" / "model", run.params.model)
        steps = getattr(run.params, stage).steps

        def one_real() -> list[float]:
            watch, losses = real_loop(run, stage, accelerator, copy.deepcopy(start), tracker)
            ours.append(watch.loop / steps)
            for name in PARTS:
                parts[name].append(watch.seconds[name] / steps)
            return losses

        def one_plain() -> list[float]:
            seconds, losses = plain_loop(run, stage, copy.deepcopy(start))
            plain.append(seconds / steps)
            return losses

        for pair in range(pairs + 1):  # the first warms up
            first, second = (one_real, one_plain) if pair % 2 else (one_plain, one_real)
            torch.testing.assert_close(torch.tensor(first()), torch.tensor(second()), rtol=1e-5, atol=0)
    row: dict[str, Any] = {"stage": stage, "steps": steps}
    row |= {"ours_ms": 1e3 * statistics.median(ours[1:]), "plain_ms": 1e3 * statistics.median(plain[1:])}
    row |= {f"{name}_ms": 1e3 * statistics.median(values[1:]) for name, values in parts.items()}
    slower = statistics.median(a / b for a, b in zip(ours[1:], plain[1:], strict=True)) - 1
    return row | {"slower": slower, "goal": f"<= {SLOWER:.0%} slower", "met": slower <= SLOWER}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """What stages print goes nowhere, so that the table stands alone."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


def main() -> None:
    set_environment()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--steps", type=int, default=10, help="optimizer steps a run, the last of which saves")
    parser.add_argument("--stages", nargs="+", default=["alignment", "sft"], choices=["alignment", "sft"])
    arguments = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory(prefix="train_step_") as folder:
        with quiet():
            build(Path(folder), arguments.steps)
        print(f"{'stage':<11}{'ours ms':>9}{'plain ms':>10}" + "".join(f"{name:>11}" for name in PARTS) + f"{'slower':>9}  goal")
        for stage in arguments.stages:
            with quiet():
                row = compare(Path(folder), stage, arguments.pairs)
            results.append(row)
            print(
                f"{stage:<11}{row['ours_ms']:>9.1f}{row['plain_ms']:>10.1f}"
                + "".join(f"{row[f'{name}_ms']:>11.2f}" for name in PARTS)
                + f"{row['slower']:>9.1%}  {row['goal']}: {'met' if row['met'] else 'MISSED'}",
                flush=True,
            )
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))
    sys.exit(0 if all(row["met"] for row in results) else 1)


if __name__ == "__main__":
    main()
