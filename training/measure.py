"""A few steps of a preset's own model on this machine, timed, beside what the count predicts."""

import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import psutil
import torch
from torch import Tensor

from model.deepgen import Condition, DeepGen, build_connector
from model.dit import build_dit
from model.flops import total, vision_tokens
from model.flow import interpolate, velocity_target
from model.prompts import IMAGE_PAD, SPECIAL_TOKENS, VISION_END, VISION_START
from model.vae import build_vae, posterior_of, scale_latents
from model.vlm import build_vlm
from runtime.params import STAGES, Params
from training.estimate import (
    ASSUMED,
    GPUS,
    EstimateRefused,
    batch_of,
    memory_of,
    reads_latents,
    references_of,
    stage_flops,
    task_shares,
    weights_of,
)
from training.losses import flow_matching_loss
from training.optim import build_optimizer
from training.sharding import checkpoint_activations
from training.stages import freeze_for

WARMUP, REPEATS = 1, 3
TOKEN_IDS = {token: i for i, token in enumerate(SPECIAL_TOKENS)}


def build_fresh(params: Params, device: torch.device) -> DeepGen:
    """The preset's model with fresh weights; it reads token ids, not text."""
    config = params.model
    with device:
        return DeepGen(
            vlm=build_vlm(config.vlm, TOKEN_IDS),
            connector=build_connector(config),
            dit=build_dit(config.dit, config.vae.latent_channels),
            vae=build_vae(config.vae),
            tokenizer=SimpleNamespace(pad_token_id=0),  # type: ignore[arg-type]
            timestep_shift=config.timestep_shift,
            max_prompt_tokens=config.vlm.max_prompt_tokens,
        )


def supervised_pass(params: Params, model: DeepGen, stage: str, task: str, prompt_tokens: int, rows: int) -> Callable[[], Tensor]:
    """One micro-batch of alignment or sft on random data: latents, condition, velocity, loss and backward; returns the loss."""
    side, device, count = params.data.image_size, model.device, references_of(task)
    images = torch.rand(1 + count, rows, 3, side, side, device=device) * 2 - 1
    pads = [TOKEN_IDS[VISION_START], *[TOKEN_IDS[IMAGE_PAD]] * vision_tokens(params.model.vlm, side), TOKEN_IDS[VISION_END]]
    text = torch.randint(len(SPECIAL_TOKENS), params.model.vlm.vocab_size, (rows, prompt_tokens - 2 * count)).tolist()
    tokens = [pads * count + row for row in text]
    references = [[image[i] for image in images[1:]] for i in range(rows)]
    sigmas, cached = torch.full((rows,), 0.5, device=device), reads_latents(params, stage, task)
    shape = (1 + count, rows, params.model.vae.latent_channels, *[side // params.model.vae.downscale] * 2)
    stored = torch.randn(shape, device=device)

    def step() -> Tensor:
        means = list(stored) if cached else [posterior_of(model.vae, pixels)[0] for pixels in images]
        target, *cleans = (scale_latents(model.vae, mean) for mean in means)
        noise = torch.randn_like(target)
        condition = model.encode_tokens(tokens, references)
        velocity = model.predict_velocity(interpolate(target, noise, sigmas), sigmas, condition, tuple(cleans))
        loss = flow_matching_loss(velocity, velocity_target(target, noise)).mean()
        loss.backward()
        return loss

    return step


def dit_pass(params: Params, model: DeepGen, prompt_tokens: int, rows: int, train: bool) -> Callable[[], Tensor]:
    """One velocity of mr_grpo's images, of the rollout or, with its backward pass, of the update; returns its mean square."""
    config, side = params.model, params.data.image_size // params.model.vae.downscale
    M = prompt_tokens + config.connector.num_think_tokens
    latents = torch.randn(rows, config.vae.latent_channels, side, side, device=model.device)
    embeds = torch.randn(rows, M, config.dit.joint_attention_dim, device=model.device)
    pooled = torch.randn(rows, config.dit.pooled_projection_dim, device=model.device)
    condition = Condition(embeds, pooled, torch.full((rows,), M, device=model.device))
    sigmas = torch.full((rows,), 0.5, device=model.device)

    def step() -> Tensor:
        with torch.set_grad_enabled(train):
            loss = model.predict_velocity(latents, sigmas, condition).float().pow(2).mean()
        if train:
            loss.backward()
        return loss

    return step


def seconds_of(step: Callable[[], Any], device: torch.device) -> float:
    """Median of some calls after a warm-up."""
    times = []
    for turn in range(WARMUP + REPEATS):
        began = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if turn >= WARMUP:
            times.append(time.perf_counter() - began)
    return statistics.median(times)


def peak_of(device: torch.device, precision: str) -> float:
    """FLOP/s against which utilisation is told: as published for bf16 on a GPU that is known here, else measured."""
    if device.type == "cuda" and precision == "bf16":
        name = torch.cuda.get_device_name(device).lower()
        for known, gpu in GPUS.items():
            if known in name:
                return gpu.peak
    return measured_peak(device, precision)


def measured_peak(device: torch.device, precision: str) -> float:
    """FLOP/s of a large square matrix product, which is the most that this machine gives. Draws nothing from global generators."""
    size = 8192 if device.type == "cuda" else 1024
    a = torch.ones(size, size, device=device, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    return 2 * size**3 / seconds_of(lambda: a @ a, device)


def measure_stages(params: Params, prompt_tokens: int) -> dict[str, Any]:
    """Seconds of a step of each stage, predicted and measured, and the utilisation between them.

    A step is its micro-batches, tasks by their ratio, and the optimizer's step; data loading, exchange between ranks, and in mr_grpo
    decoding, reward and condition are not timed (and not counted).

    Raises:
        EstimateRefused: the model does not fit this machine.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    torch.set_num_threads(params.launch.threads)
    peak = peak_of(device, params.launch.precision)  # the one that the estimate multiplies a measured utilisation with
    found: dict[str, Any] = {}
    for stage in STAGES:
        needs = memory_of(params, stage, weights_of(params, stage), 1, "ddp", prompt_tokens).total
        if needs > 0.9 * free:
            raise EstimateRefused(
                f"{params.preset}, {stage}: needs about {needs / 2**30:.1f} GiB on one rank, {free / 2**30:.1f} are free here. "
                "Measure on a larger machine, or a smaller preset."
            )
        seconds, done = _measure_stage(params, stage, prompt_tokens, device)
        assumed = ASSUMED[f"utilisation_{stage}"].value
        found[stage] = {
            "flops_a_step": done,
            "seconds_a_step": seconds,
            "predicted_seconds": done / (peak * assumed),
            "predicted_with_utilisation": assumed,
            "utilisation": done / (peak * seconds),
        }
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {params.launch.threads} threads"
    facts = {"preset": params.preset, "device": name, "precision": params.launch.precision, "prompt_tokens": prompt_tokens}
    published = peak in {gpu.peak for gpu in GPUS.values()}
    return facts | {"peak_flops": peak, "peak_by": "as published" if published else "a large matrix product", "ranks": 1, "stages": found}


def _measure_stage(params: Params, stage: str, prompt_tokens: int, device: torch.device) -> tuple[float, float]:
    """Seconds and FLOPs of one step on one rank."""
    torch.manual_seed(0)
    model = build_fresh(params, device)
    section = getattr(params, stage)
    trained = freeze_for(model, stage, getattr(section, "lora", None))
    if params.launch.gradient_checkpointing:
        checkpoint_activations(model)
    optimizer = build_optimizer(trained.values(), section.optimizer)
    batch, micro = batch_of(params, stage)
    cast = torch.autocast(device.type, torch.bfloat16, enabled=params.launch.precision == "bf16")

    def timed(step: Callable[[], Any]) -> float:
        with cast:
            return seconds_of(step, device)

    rows = stage_flops(params, stage, prompt_tokens)
    if stage == "mr_grpo":
        model.eval()
        rows = [row for row in rows if row.part in ("dit, rollout", "dit, update")]
        update = timed(dit_pass(params, model, prompt_tokens, micro, train=True))
        rollout = timed(dit_pass(params, model, prompt_tokens, micro, train=False))
        config = params.mr_grpo
        updates = config.stochastic_steps + config.auxiliary_per_image
        seconds = batch / micro * (config.rollout_steps * rollout + updates * update)
    else:
        model.train()
        shares = task_shares(params, stage).items()
        one = sum(share * timed(supervised_pass(params, model, stage, task, prompt_tokens, micro)) for task, share in shares)
        seconds = batch / micro * one
    return seconds + seconds_of(optimizer.step, device), total(rows).done * batch
