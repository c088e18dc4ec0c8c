"""The held-out loss and the sample board, asked the same way each time and without a trace in the training."""

import math
import random
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from data.loader import Sample, read_part
from model.deepgen import DeepGen
from model.flow import interpolate, sigmas_at, velocity_target
from model.generate import latent_shape
from model.vae import encode_images
from runtime.stage import StageRun, rank
from training.batching import batched, one_size_batches, reference_pixels, stack_pixels
from training.checkpoint import TrainState
from training.config import EarlyStopConfig, StageConfig
from training.losses import flow_matching_loss
from training.optim import EMA
from training.pictures import edit_captions, edit_row, save_grid
from training.randomness import quantiles, sample_noise
from training.scoring import score
from training.tracking import Tracker

BOARD = 16  # fixed prompts a task on a stage's sample grid
HELD_OUT = 64  # samples a part in the held-out loss
BATCH = 32
SIGMAS = (0.1, 0.3, 0.5, 0.7, 0.9)
LOSS, STOPPED = "held_out/loss", "stopped_early"  # names in the history


@dataclass(frozen=True)
class HeldOut:
    """Samples of one size, numbered over their part's held-out samples; by that number their noise is named."""

    samples: Sequence[Sample]
    positions: list[int]


class Validation:
    """What the loop asks after each step. `over` says that the early stop's patience has ended: a matter of the history alone.

    The averaged weights are asked where the stage keeps an average, since those are published. Ranks share each batch, and all end with
    the same numbers.
    """

    def __init__(
        self, run: StageRun, config: StageConfig, accelerator: Accelerator, model: DeepGen, state: TrainState, tracker: Tracker
    ) -> None:
        self.run, self.config, self.accelerator, self.model, self.state, self.tracker = run, config, accelerator, model, state, tracker
        self.batches = list(held_out(run)) if config.validate_every else []

    @property
    def over(self) -> bool:
        return any(STOPPED in row for row in self.state.history[-1:])

    def look(self, step: int) -> dict[str, float]:
        """The held-out row where step `step` has one, else nothing; draws the board where it is due."""
        config, row = self.config, {}
        if config.validate_every and (step % config.validate_every == 0 or step == config.steps):
            with aside(self.model, self.state.ema):
                row = self.finite(self.measure(), step)
            patience = Patience(config.early_stop)  # counted anew: a rollback takes rows of the history back
            for past in [*self.state.history, row]:
                if LOSS in past:
                    patience.see(past[LOSS])
            if patience.over:
                row[STOPPED] = 1.0
        if config.board_every and step % config.board_every == 0:
            picture = self.run.folder / "boards" / f"step-{step:06d}.png"
            with aside(self.model, self.state.ema):
                draw_board(self.run, self.model, picture)
            self.tracker.picture(picture, "boards")
        return row

    def finite(self, row: dict[str, float], step: int) -> dict[str, float]:
        """What of a held-out row can be kept in a checkpoint; the rest is told of."""
        odd = [name for name, value in row.items() if not math.isfinite(value)]
        if odd and rank() == 0:
            print(f"{self.run.name}: step {step}: no finite number: {', '.join(odd)}", flush=True)
        return {name: value for name, value in row.items() if name not in odd}

    def measure(self) -> dict[str, float]:
        """Mean loss over all held-out samples and SIGMAS, by task, by task and kind, and by sigma."""
        ours, ranks = self.accelerator.process_index, self.accelerator.num_processes
        loss_SN = torch.zeros(len(SIGMAS), sum(len(batch.samples) for batch in self.batches), device=self.accelerator.device)
        start = 0
        for batch in self.batches:
            # Every rank takes part in every batch, if need be with a row of another's: sharded weights are gathered by all together,
            # and the vision tower's for edits alone.
            count = len(batch.samples)
            rows = list(range(ours, count, ranks)) or [0]
            mine = HeldOut([batch.samples[row] for row in rows], [batch.positions[row] for row in rows])
            sigma_SB = torch.tensor(SIGMAS)[:, None].expand(-1, len(rows))
            losses_SB = losses_at(self.model, mine, sigma_SB)
            if ours < count:
                loss_SN[:, [start + row for row in rows]] = losses_SB
            start += count
        loss_SN = self.accelerator.reduce(loss_SN, "sum").double().cpu()
        groups: dict[str, list[int]] = defaultdict(list)
        for index, sample in enumerate(sample for batch in self.batches for sample in batch.samples):
            groups[f"held_out/{sample.task}"].append(index)
            groups[f"held_out/{sample.task}.{re.sub(r'[^A-Za-z0-9_-]', '_', sample.kind)}"].append(index)
        return (
            {LOSS: loss_SN.mean().item()}
            | {name: loss_SN[:, members].mean().item() for name, members in sorted(groups.items())}
            | {f"held_out/sigma_{sigma}": loss_SN[index].mean().item() for index, sigma in enumerate(SIGMAS)}
        )


class Patience:
    """Counts validations without a new best. Never over where `config` is None."""

    def __init__(self, config: EarlyStopConfig | None) -> None:
        self.config, self.best, self.waited = config, math.inf, 0

    @property
    def over(self) -> bool:
        return self.config is not None and self.waited >= self.config.patience

    def see(self, loss: float) -> None:
        if loss < self.best - (self.config.min_delta if self.config else 0.0):
            self.best, self.waited = loss, 0
        else:
            self.waited += 1


@contextmanager
def aside(model: DeepGen, ema: EMA | None = None) -> Iterator[None]:
    """Evaluation mode, no gradients, the averaged weights where there are; after it modes, weights and global generators are as before."""
    modes = [(module, module.training) for module in model.modules()]
    generators, cuda = (random.getstate(), np.random.get_state()), torch.cuda.is_available()
    kept = {name: parameter.detach().clone() for name, parameter in ema.parameters.items()} if ema is not None else {}
    with torch.random.fork_rng([torch.cuda.current_device()] if cuda else []), torch.no_grad():
        try:
            if ema is not None:
                ema.copy_to_parameters()
            model.eval()
            yield
        finally:
            for name, value in kept.items():
                ema.parameters[name].copy_(value)  # type: ignore[union-attr]
            for module, training in modes:
                module.training = training
            random.setstate(generators[0])
            np.random.set_state(generators[1])


def held_out(run: StageRun) -> Iterator[HeldOut]:
    """Samples spread over each evaluation part, in batches that can be stacked."""
    for part in run.params.evaluation.parts:
        seen = 0
        for samples in one_size_batches(read_part(run.root / "outputs" / "shards" / part, HELD_OUT), BATCH):
            yield HeldOut(samples, list(range(seen, seen + len(samples))))
            seen += len(samples)


def losses_at(model: DeepGen, batch: HeldOut, sigma_SB: Tensor) -> Tensor:
    """(S, B) flow-matching loss of each sample, at S rows of sigmas (S, B) and one noise a sample."""
    target = encode_images(model.vae, stack_pixels([sample.target for sample in batch.samples], model.device))
    references = reference_pixels(batch.samples, model.device)
    noise = sample_noise(target, 0, "held_out", batch.positions)
    reference_latents = tuple(encode_images(model.vae, pixels) for pixels in references)
    condition = model.encode_condition([sample.prompt for sample in batch.samples], references)
    rows = []
    for sigmas in sigma_SB.to(model.device):
        velocity = model(interpolate(target, noise, sigmas), sigmas, reference_latents, condition=condition)
        rows.append(flow_matching_loss(velocity, velocity_target(target, noise)))
    return torch.stack(rows)


def held_out_loss(run: StageRun, model: DeepGen) -> dict[str, float]:
    """Mean flow-matching loss by task on evaluation samples, at fixed noise and sigmas spread evenly: the stage's before and after."""
    losses: dict[str, list[float]] = defaultdict(list)
    counts: dict[str, int] = defaultdict(int)
    with aside(model):
        for batch in held_out(run):
            size = latent_shape(model, batch.samples[0].target.shape[:2])[1:]
            sigmas = sigmas_at(quantiles(0, "held_out", batch.positions), "uniform", model.shift_for(size))
            task = batch.samples[0].task
            losses[task].append(losses_at(model, batch, sigmas[None]).sum().item())
            counts[task] += len(batch.samples)
    return {task: sum(sums) / counts[task] for task, sums in losses.items()}


def draw_board(run: StageRun, model: DeepGen, path: Path) -> None:
    """Fixed prompts and seeds: generated images, and edits as source, result, target. Every rank computes, the first writes."""
    config = run.params.evaluation
    rows, captions = [], []
    for part in config.parts:
        samples = list(read_part(run.root / "outputs" / "shards" / part, BOARD))
        scored = score(model, samples, config.sampling_steps, config.guidance, config.batch_size, config.seed)
        for group in batched(scored, 8 if not samples[0].references else 3):
            rows.append([image for row in group for image in edit_row(row.sample.references, row.image, row.sample.target)])
            captions.append([text for row in group for text in edit_captions(row.sample.prompt, len(row.sample.references))])
    if rank() == 0:
        save_grid(rows, path, captions, scale=2)
