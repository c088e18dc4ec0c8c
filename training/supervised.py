"""Alignment and SFT: one loop. batch -> latents -> noise -> velocity -> loss -> step (paper sections 3.1, 3.2)."""

import contextlib
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from data.loader import Batch, Loader
from model.config import ModelConfig
from model.deepgen import DeepGen, References, rows_of, stacked
from model.flow import interpolate, sigmas_at, velocity_target
from model.lora import merge_lora
from model.vae import posterior_of, scale_latents, to_pixels
from model.weights import WeightsMismatch, load_foundation, load_model
from runtime.exits import Interrupted
from runtime.files import read_json
from runtime.progress import Progress
from runtime.stage import StageRun, rank
from training.checkpoint import Checkpoints, TrainState
from training.config import SupervisedConfig
from training.curves import Curves
from training.guards import Guard, memory_advice
from training.heartbeat import watch_ranks
from training.latents import refuse_other_encoders
from training.launch import build_accelerator
from training.losses import flow_matching_loss
from training.optim import EMA, build_optimizer, set_learning_rate
from training.publish import publish_stage, remember_start, report_parameters
from training.randomness import coin_flips, generator, quantiles, sample_noise
from training.ranks import whole
from training.sharding import gathered, spread
from training.stages import freeze_for, parent_of
from training.tracking import Tracker, track
from training.validation import LOSS as HELD_OUT_LOSS
from training.validation import Validation


def run_supervised(run: StageRun, stage: str) -> None:
    """Train `stage` to its last step and publish its folder."""
    with track(run) as tracker:
        accelerator = build_accelerator(run.params.launch)
        model = load_parent(run, stage).to(accelerator.device)
        remember_start(run, model)
        trained = freeze_for(model, stage, getattr(run.params, stage).lora)
        report_parameters(run, model, tracker)
        state = train(run, stage, accelerator, model, trained, tracker)
        if state.ema is not None:
            state.ema.copy_to_parameters()
        if run.params.launch.strategy == "fsdp2":
            model = reassembled(run, stage, state).to(accelerator.device)
        merge_lora(model)
        if rank() == 0:
            publish_stage(run, stage, model, state, tracker)
        accelerator.wait_for_everyone()


def load_parent(run: StageRun, stage: str) -> DeepGen:
    """The model that `stage` starts from: the foundation with a fresh connector, or the stage before."""
    # A process begins with a random global seed; fresh weights (connector, LoRA) and LoRA's dropout draw from it.
    torch.manual_seed(generator("weights and dropout", getattr(run.params, stage).seed, stage).initial_seed())
    parent = parent_of(stage, run.params)
    folder = run.root / "outputs" / str(parent)
    if parent != "foundation":
        model = load_model(folder / "model")
        refuse_other_settings(model, run.params.model, folder)
        return model
    return load_foundation(folder / "model", run.params.model)


def reassembled(run: StageRun, stage: str, state: TrainState) -> DeepGen:
    """The model that was trained in shards, whole again on every rank."""
    model = load_parent(run, stage)
    trained = freeze_for(model, stage, getattr(run.params, stage).lora)
    with torch.no_grad():
        for name, parameter in gathered(state).trained.items():
            trained[name].copy_(parameter)
    return model


def refuse_other_settings(model: DeepGen, config: ModelConfig, folder: Path) -> None:
    """Weights trained with one padding, position layout or choice of layers are not for another.

    Raises:
        WeightsMismatch: naming the keys of params.yaml and both values.
    """
    stored, dit = model.connector.config, model.dit.config
    pairs = {
        "model.connector.padding": (stored.padding, config.connector.padding),
        "model.connector.projector": (stored.projector, config.connector.projector),
        "model.vlm.stacked_layers": (tuple(stored.stacked_layers), config.vlm.stacked_layers),
        "model.dit.reference_offset": (dit.reference_offset, config.dit.reference_offset),
        "model.resolution_shift": (model.resolution_shift, config.resolution_shift),
    }
    wrong = [f"{key}: {wanted} in params.yaml, {held} in the weights" for key, (held, wanted) in pairs.items() if held != wanted]
    if wrong:
        raise WeightsMismatch(f"{folder}: " + "; ".join(wrong) + ". Set params.yaml back, or train again from the foundation.")


def train(run: StageRun, stage: str, accelerator: Accelerator, model: DeepGen, trained: dict[str, Any], tracker: Tracker) -> TrainState:
    """The loop. Interrupted at any step and started again it ends with the same weights, bit for bit on one kind of CPU."""
    config: SupervisedConfig = getattr(run.params, stage)
    mixture = read_json(run.root / "outputs" / "mixture" / f"{stage}.json")
    model.to(accelerator.device)
    optimizer = build_optimizer(trained.values(), config.optimizer)
    ema = EMA(trained, config.ema_decay) if config.ema_decay else None
    state = TrainState(trained, optimizer, ema)
    checkpoints = Checkpoints(run.folder, config.checkpoint_every, config.keep_checkpoints, config.async_checkpoints)
    if checkpoints.restore(state):
        print(f"{stage}: going on from step {state.step}", flush=True)
    guard = Guard(config.guard, stage, run.folder, accelerator, state, checkpoints)
    micro_batches = config.accumulation(accelerator.num_processes)
    shards, latents = run.root / "outputs" / "shards", run.root / "outputs" / "latents"
    refuse_other_encoders(latents, run.root / "outputs" / str(parent_of(stage, run.params)) / "model")
    global_micro_batch = config.micro_batch_size * accelerator.num_processes
    loader = Loader(
        mixture,
        shards,
        global_micro_batch,
        accelerator.process_index,
        accelerator.num_processes,
        start=state.step * micro_batches,
        latents=latents,
    )
    if state.data:
        loader.restore(state.data)
    batches = iter(loader)
    wrapped = spread(accelerator, run.params.launch, model, state)
    model.train()
    curves = Curves(accelerator, model, run.params, stage)
    validation = Validation(run, config, accelerator, model, state, tracker)
    tracker.checkpoints(checkpoints.steps(), state.history)
    stopped, log = False, run.folder / "progress.jsonl" if rank() == 0 else None
    with (
        watch_ranks(run) as heartbeat,
        memory_advice(stage, config.micro_batch_size),
        checkpoints,
        Progress(config.steps, "step", stage, log, start=state.step, samples=config.batch_size) as progress,
    ):
        while state.step < config.steps and not (stopped or validation.over):
            losses: dict[str, list[Tensor]] = defaultdict(list)
            for micro in range(micro_batches):
                batch = next(batches)
                with torch.enable_grad(), accumulate(accelerator, wrapped, last=micro == micro_batches - 1):
                    loss_B = batch_loss(wrapped, model, batch, config, stage)
                    accelerator.backward(loss_B.mean() / micro_batches)
                losses[batch.task].append(loss_B.detach().mean())
                guard.see(batch, loss_B)
                curves.add(batch, loss_B)
            curve = curves.row(state.step + 1, state.trained)
            norm = whole(accelerator.clip_grad_norm_(state.trained.values(), config.optimizer.max_grad_norm))
            means = {task: accelerator.reduce(torch.stack(values).mean(), "mean").item() for task, values in losses.items()}
            loss = sum(means[task] * len(values) for task, values in losses.items()) / micro_batches
            rate = set_learning_rate(optimizer, state.step, config.steps, config.optimizer)
            heartbeat.beat()
            tried = state.step
            if guard.refuses(loss, float(norm), rate):
                optimizer.zero_grad(set_to_none=True)
                state.data = loader.state()
                if state.step < tried:  # after a mere skip nothing may be logged twice, which a killed process has logged already
                    tracker.back_to(state.step)
                progress.update(state.step - progress.done, skipped=state.guard["skipped"])
                continue
            if curve:
                curves.reset()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if ema is not None:
                ema.update()
            state.step += 1
            row = {"loss": loss, "grad_norm": float(norm), "lr": rate} | {f"loss_{task}": v for task, v in means.items()}
            held_out = validation.look(state.step)
            heartbeat.beat()
            state.history.append({"step": state.step} | row | held_out)
            state.data = loader.state()
            if curve or held_out:
                tracker.log(state.step, **row, **curve, **held_out)
            progress.update(loss=loss, lr=rate)
            done = state.step == config.steps or validation.over
            stopped = agreed(accelerator, bool(run.stop)) and not done
            if checkpoints.due(state.step) or stopped or done:
                tracker.flush()  # a resumed process does not log these steps again
                checkpoints.save(gathered(state), held_out.get(HELD_OUT_LOSS))
                tracker.checkpoints(checkpoints.steps(), state.history)
                heartbeat.beat()
    tracker.checkpoints(checkpoints.steps(), state.history)  # one that was written in the background is whole only now
    if stopped:
        raise Interrupted(
            f"stopped at step {state.step} of {config.steps}, saved in {run.folder.relative_to(run.root)}; the same command goes on"
        )
    return state


def accumulate(accelerator: Accelerator, wrapped: torch.nn.Module, last: bool) -> Any:
    """Ranks exchange gradients on the last micro-batch of a step only."""
    if isinstance(wrapped, FSDPModule):
        wrapped.set_requires_gradient_sync(last)
        return contextlib.nullcontext()
    return contextlib.nullcontext() if last else accelerator.no_sync(wrapped)


def agreed(accelerator: Accelerator, flag: bool) -> bool:
    """True on every rank if it is true on any: all stop at the same step."""
    if accelerator.num_processes == 1:
        return flag
    return bool(accelerator.reduce(torch.tensor(float(flag), device=accelerator.device), "sum").item())


def without(references: tuple[Tensor, ...], dropped: Sequence[bool]) -> References:
    """The references of rows that keep them: the batch as it is where all do."""
    if not any(dropped):
        return references
    return stacked([[] if drop else row for drop, row in zip(dropped, rows_of(references, len(dropped)), strict=True)])


def posteriors(model: DeepGen, batch: Batch, references: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """Mean and standard deviation of the targets' latents (B, C, h, w), and means of the references': as stored, or encoded now."""
    if batch.latents is not None:
        mean, std, *means = (torch.from_numpy(a).to(model.device).float() for a in batch.latents.arrays)
        return mean, std, tuple(means)
    mean, std = posterior_of(model.vae, to_pixels(torch.from_numpy(batch.target_images).to(model.device)))
    return mean, std, tuple(posterior_of(model.vae, pixels)[0] for pixels in references)


def batch_loss(wrapped: torch.nn.Module, model: DeepGen, batch: Batch, config: SupervisedConfig, stage: str) -> Tensor:
    """(B,) flow-matching loss of a batch. Every draw belongs to a sample's position in the stream, not to a rank or batch."""
    positions = list(batch.positions)
    references = tuple(to_pixels(torch.from_numpy(images).to(model.device)) for images in batch.reference_images)
    mean, std, reference_means = posteriors(model, batch, references)
    target = scale_latents(model.vae, mean + std * sample_noise(mean, config.seed, stage, positions, "posterior"))
    noise = sample_noise(target, config.seed, stage, positions)
    shift = model.shift_for(target.shape[-2:])
    sigmas = sigmas_at(quantiles(config.seed, stage, positions), config.timestep_sampling, shift).to(model.device)
    empty = coin_flips(config.text_dropout, "text_dropout", config.seed, stage, positions)
    prompts = ["" if drop else prompt for prompt, drop in zip(batch.prompts, empty, strict=True)]
    blind = coin_flips(config.reference_dropout, "reference_dropout", config.seed, stage, positions) if references else []
    images = without(references, blind)
    reference_latents = without(tuple(scale_latents(model.vae, mean) for mean in reference_means), blind)
    seen = () if batch.latents is None else tuple(torch.from_numpy(tokens).to(model.device) for tokens in batch.latents.vision)
    velocity = wrapped(
        interpolate(target, noise, sigmas),
        sigmas,
        reference_latents,
        prompts=prompts,
        reference_images=images,
        reference_tokens=without(seen, blind) if seen else (),
    )
    return flow_matching_loss(velocity, velocity_target(target, noise))
