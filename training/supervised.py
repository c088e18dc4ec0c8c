"""Alignment and SFT: what their step is. batch -> latents -> noise -> velocity -> loss -> step (paper sections 3.1, 3.2)."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from data.loader import Batch, Loader
from model.config import ModelConfig
from model.deepgen import DeepGen, References, rows_of, stacked
from model.flow import interpolate, sigmas_at, velocity_target
from model.lora import merge_lora
from model.vae import posterior_of, scale_latents, to_pixels
from model.weights import WeightsMismatch, load_foundation, load_model
from runtime.files import read_json
from runtime.stage import StageRun, rank
from training.checkpoint import Checkpoints, TrainState
from training.config import AuxiliaryConfig, SupervisedConfig
from training.curves import Curves
from training.guards import Guard
from training.heartbeat import Heartbeat
from training.latents import refuse_other_encoders
from training.launch import build_accelerator
from training.loop import Tried, accumulate, train_to_end
from training.losses import flow_matching_loss
from training.optim import EMA, build_optimizer
from training.publish import publish_stage, remember_start, report_parameters
from training.randomness import coin_flips, generator, quantiles, sample_noise
from training.sharding import gathered, spread
from training.stages import freeze_for, parent_of
from training.tracking import Tracker, track
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
    """Train to the last step, from the newest checkpoint on."""
    config: SupervisedConfig = getattr(run.params, stage)
    model.to(accelerator.device)
    optimizer = build_optimizer(trained.values(), config.optimizer)
    state = TrainState(trained, optimizer, EMA(trained, config.ema_decay) if config.ema_decay else None)
    checkpoints = Checkpoints(run.folder, config.checkpoint_every, config.keep_checkpoints, config.async_checkpoints)
    if checkpoints.restore(state):
        print(f"{stage}: going on from step {state.step}", flush=True)
    work = Supervised(run, stage, accelerator, model, state)
    validation = Validation(run, config, accelerator, model, state, tracker)
    return train_to_end(run, stage, config, accelerator, state, checkpoints, work, validation, tracker, config.batch_size)


class Supervised:
    """Gradients of the flow-matching loss, over the micro-batches of a step."""

    def __init__(self, run: StageRun, stage: str, accelerator: Accelerator, model: DeepGen, state: TrainState) -> None:
        self.stage, self.accelerator, self.model, self.state = stage, accelerator, model, state
        self.config: SupervisedConfig = getattr(run.params, stage)
        self.micro_batches = self.config.accumulation(accelerator.num_processes)
        latents = run.root / "outputs" / "latents"
        refuse_other_encoders(latents, run.root / "outputs" / str(parent_of(stage, run.params)) / "model")
        self.loader = Loader(
            read_json(run.root / "outputs" / "mixture" / f"{stage}.json"),
            run.root / "outputs" / "shards",
            self.config.micro_batch_size * accelerator.num_processes,
            accelerator.process_index,
            accelerator.num_processes,
            latents=latents,
        )
        if state.data:
            self.loader.restore(state.data)
        self.batches = iter(self.loader)
        self.wrapped = spread(accelerator, run.params.launch, model, state)
        model.train()
        self.curves = Curves(accelerator, model, run.params, stage)

    def gradients(self, guard: Guard, heartbeat: Heartbeat) -> Tried:
        losses: dict[str, list[Tensor]] = defaultdict(list)
        for micro in range(self.micro_batches):
            batch = next(self.batches)
            with torch.enable_grad(), accumulate(self.accelerator, self.wrapped, last=micro == self.micro_batches - 1):
                loss_B = batch_loss(self.wrapped, self.model, batch, self.config, self.stage)
                self.accelerator.backward(loss_B.mean() / self.micro_batches)
            losses[batch.task].append(loss_B.detach().mean())
            guard.see(batch, loss_B)
            self.curves.add(batch, loss_B)
        curve = self.curves.row(self.state.step + 1, self.state.trained)
        means = {task: self.accelerator.reduce(torch.stack(values).mean(), "mean").item() for task, values in losses.items()}
        loss = sum(means[task] * len(values) for task, values in losses.items()) / self.micro_batches
        return Tried(loss, {f"loss_{task}": value for task, value in means.items()}, curve, logged=bool(curve))

    def taken(self) -> None:
        if self.curves.due(self.state.step + 1):
            self.curves.reset()

    def data_state(self) -> dict[str, Any]:
        return self.loader.state()

    def shown(self, tried: Tried, rate: float) -> dict[str, float]:
        return {"loss": tried.loss, "lr": rate}


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


def batch_loss(wrapped: torch.nn.Module, model: DeepGen, batch: Batch, config: SupervisedConfig | AuxiliaryConfig, stage: str) -> Tensor:
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
