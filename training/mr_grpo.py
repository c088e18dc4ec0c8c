"""Stage 3, MR-GRPO: rollout -> reward -> advantage -> update (paper section 3.3)."""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor

from data.loader import Batch, Loader
from model.deepgen import Condition, DeepGen
from model.flow import interpolate, sampling_sigmas, sigmas_at, velocity_target
from model.generate import latent_shape
from model.vae import decode_latents, encode_images, to_pixels, to_uint8
from runtime.exits import Interrupted, Plain
from runtime.files import read_json
from runtime.keys import seed_from
from runtime.progress import Progress
from runtime.stage import StageRun, rank
from training.advantages import advantages
from training.checkpoint import Checkpoints, TrainState
from training.config import MRGRPOConfig
from training.guards import NonFiniteLoss, memory_advice
from training.heartbeat import watch_ranks
from training.launch import build_accelerator
from training.losses import clipped_ratio_loss, flow_matching_loss, velocity_kl
from training.optim import build_optimizer, set_learning_rate
from training.publish import publish_stage, remember_start, report_parameters
from training.randomness import quantiles, sample_noise
from training.rewards.scene import SceneParts
from training.rewards.scores import Group, Scores, below
from training.sde import log_prob, sde_step
from training.sharding import checkpoint_activations
from training.stages import freeze_for
from training.supervised import agreed, load_parent
from training.tracking import Tracker, track

STAGE = "mr_grpo"


class RewardsMissing(Plain):
    """Too few of the reward values are valid to learn from."""


class OffPolicy(Exception):
    """Log-probabilities recomputed with unchanged weights differ from the rollout's: the ratio would not be 1."""


@dataclass(frozen=True)
class Rollout:
    """Images of one step, groups in a row, and what the update needs of how they were made.

    latents[j], next_latents[j] (N, C, H, W) and log_probs[j] (N,) belong to stochastic step j.
    """

    condition: Condition
    latents: tuple[Tensor, ...]
    next_latents: tuple[Tensor, ...]
    log_probs: tuple[Tensor, ...]
    groups: Sequence[Group]


def run_mr_grpo(run: StageRun) -> None:
    """Train the DiT on rewards to the last step and publish the stage's folder."""
    with track(run) as tracker:
        accelerator = build_accelerator(run.params.launch)
        model = load_parent(run, STAGE)
        remember_start(run, model)
        state = train(run, accelerator, model, tracker)
        if rank() == 0:
            publish_stage(run, STAGE, model, state, tracker)
        accelerator.wait_for_everyone()


def train(run: StageRun, accelerator: Accelerator, model: DeepGen, tracker: Tracker) -> TrainState:
    """One optimizer step an update, counted; interrupted and started again it ends with the same weights."""
    config = run.params.mr_grpo
    trained = freeze_for(model, STAGE)
    report_parameters(run, model, tracker)
    model.to(accelerator.device).eval()
    reference = copy.deepcopy(model.dit).requires_grad_(False) if config.kl_weight else None
    optimizer = build_optimizer(trained.values(), config.optimizer)
    state = TrainState(trained, optimizer)
    checkpoints = Checkpoints(run.folder, config.checkpoint_every, config.keep_checkpoints)
    if checkpoints.restore(state):
        print(f"{STAGE}: going on from step {state.step}", flush=True)
    mixture = read_json(run.root / "outputs" / "mixture" / f"{STAGE}.json")
    loader = Loader(mixture, run.root / "outputs" / "shards", config.prompts_per_step, start=state.step)
    if state.data:
        loader.restore(state.data)
    batches = iter(loader)
    if run.params.launch.gradient_checkpointing:
        checkpoint_activations(model)
    wrapped = accelerator.prepare_model(model)
    reward = SceneParts(list(config.rewards))
    weights = torch.tensor([config.rewards[name] for name in reward.names])
    stopped = False
    log = run.folder / "progress.jsonl" if rank() == 0 else None
    with (
        watch_ranks(run) as heartbeat,
        memory_advice(STAGE, config.micro_batch_size),
        Progress(config.steps, "step", STAGE, log, start=state.step) as progress,
    ):
        while state.step < config.steps and not stopped:
            batch = next(batches)
            rolled = rollout(model, batch, config, state.step)
            scores = below([reward(group) for group in rolled.groups])
            if scores.coverage < config.min_coverage:
                raise RewardsMissing(
                    f"{STAGE}: {scores.coverage:.0%} of the reward values are valid, mr_grpo.min_coverage is {config.min_coverage:.0%}"
                )
            advantage = advantages(scores, weights, config.group_size, config.noise_floor, config.advantage_clip)
            rate = set_learning_rate(optimizer, state.step, config.steps, config.optimizer)
            row = update(accelerator, wrapped, model, reference, rolled, advantage, batch, config, state)
            state.step += 1
            heartbeat.beat()
            row |= reward_row(scores, config) | {"lr": rate}
            state.history.append({"step": state.step} | row)
            state.data = loader.state()
            tracker.log(state.step, **row)
            progress.update(reward=row["reward"], loss=row["loss"])
            stopped = agreed(accelerator, bool(run.stop)) and state.step < config.steps
            if checkpoints.due(state.step) or stopped or state.step == config.steps:
                tracker.flush()  # a resumed process does not log these steps again
                checkpoints.save(state)
    if stopped:
        raise Interrupted(
            f"stopped at step {state.step} of {config.steps}, saved in {run.folder.relative_to(run.root)}; the same command goes on"
        )
    return state


@torch.no_grad()
def rollout(model: DeepGen, batch: Batch, config: MRGRPOConfig, step: int) -> Rollout:
    """A group of images a prompt. The first `stochastic_steps` add noise and are kept; the rest are Euler steps.

    Every draw has a generator named by (step, prompt, sample), so that rank and batch layout don't change it.
    """
    prompts = len(batch.prompts)
    condition = model.encode_condition(batch.prompts)
    condition = condition[torch.arange(prompts, device=model.device).repeat_interleave(config.group_size)]
    names = [(prompt, sample) for prompt in range(prompts) for sample in range(config.group_size)]
    draws = [torch.Generator().manual_seed(seed_from("rollout", config.seed, step, *name)) for name in names]
    shape = latent_shape(model, batch.target_images.shape[1:3])

    def noise() -> Tensor:
        return torch.stack([torch.randn(shape, generator=draw) for draw in draws]).to(model.device)

    sigmas = sampling_sigmas(config.rollout_steps, model.shift_for(shape[1:])).to(model.device)
    latents = noise()
    kept: list[tuple[Tensor, Tensor, Tensor]] = []
    for index in range(config.rollout_steps):
        velocity = model.predict_velocity(latents, sigmas[index].expand(len(latents)), condition)
        if index < config.stochastic_steps:
            gaussian = sde_step(config.sampler, latents, velocity, sigmas, index, config.eta)
            following = gaussian.mean + gaussian.std * noise()
            kept.append((latents, following, log_prob(config.sampler, gaussian, following)))
        else:
            following = latents + (sigmas[index + 1] - sigmas[index]) * velocity
        latents = following
    images = to_uint8(decode_latents(model.vae, latents)).cpu().numpy()
    befores, afters, log_probs = zip(*kept, strict=True)
    groups = [
        Group(f"{step}-{key}", batch.task, prompt, tuple(images[i * config.group_size : (i + 1) * config.group_size]), scene)
        for i, (key, prompt, scene) in enumerate(zip(batch.keys, batch.prompts, batch.scenes, strict=True))
    ]
    return Rollout(condition, befores, afters, log_probs, groups)


def update(
    accelerator: Accelerator,
    wrapped: torch.nn.Module,
    model: DeepGen,
    reference: torch.nn.Module | None,
    rolled: Rollout,
    advantage: Tensor,
    batch: Batch,
    config: MRGRPOConfig,
    state: TrainState,
) -> dict[str, float]:
    """One optimizer step on the clipped ratio, the KL to the reference and the auxiliary flow-matching loss.

    Accumulated over stochastic steps and micro-batches, equal to the whole batch at once.
    """
    sigmas = sampling_sigmas(config.rollout_steps, model.shift_for(rolled.latents[0].shape[-2:])).to(model.device)
    advantage = advantage.to(model.device)
    count = len(advantage)
    share = (1 - config.sft_weight) / (count * config.stochastic_steps)
    totals = {"policy_loss": 0.0, "kl": 0.0, "clip_share": 0.0, "ratio_error": 0.0, "sft_loss": 0.0}
    for index in range(config.stochastic_steps):
        for start in range(0, count, config.micro_batch_size):
            rows = slice(start, start + config.micro_batch_size)
            at = sigmas[index].expand(len(rolled.latents[index][rows]))
            velocity = wrapped(rolled.latents[index][rows], at, condition=rolled.condition[rows])
            gaussian = sde_step(config.sampler, rolled.latents[index][rows], velocity, sigmas, index, config.eta)
            new = log_prob(config.sampler, gaussian, rolled.next_latents[index][rows])
            old = rolled.log_probs[index][rows]
            policy = clipped_ratio_loss(new, old, advantage[rows], config.clip_range)
            loss = policy.sum() * share
            ratio = torch.exp(new.detach() - old)
            if reference is not None:
                with torch.no_grad():
                    condition = rolled.condition[rows]
                    still = reference(
                        rolled.latents[index][rows], condition.prompt_embeds, condition.pooled_prompt_embeds, at * 1000, (), condition.mask
                    )
                kl = velocity_kl(velocity, still, gaussian.std)
                loss = loss + config.kl_weight * kl.sum() * share
                totals["kl"] += kl.detach().sum().item() / (count * config.stochastic_steps)
            accelerator.backward(loss)
            totals["policy_loss"] += policy.detach().sum().item() / (count * config.stochastic_steps)
            totals["clip_share"] += ((ratio - 1).abs() > config.clip_range).float().sum().item() / (count * config.stochastic_steps)
            totals["ratio_error"] = max(totals["ratio_error"], float((ratio - 1).abs().max()))
    if totals["ratio_error"] > config.clip_range / 10:
        raise OffPolicy(
            f"{STAGE}: |ratio - 1| is {totals['ratio_error']:.2e} before any step; allowed: a tenth of mr_grpo.clip_range, "
            f"{config.clip_range / 10:.2e}. Use float32, or a wider clip range."
        )
    if config.sft_weight:
        sft = auxiliary_loss(wrapped, model, batch, config, state.step)
        accelerator.backward(config.sft_weight * sft)
        totals["sft_loss"] = sft.item()
    norm = float(accelerator.clip_grad_norm_(state.trained.values(), config.optimizer.max_grad_norm))
    total = totals["policy_loss"] + config.kl_weight * totals["kl"] + config.sft_weight * totals["sft_loss"]
    if not (math.isfinite(total) and math.isfinite(norm)):
        raise NonFiniteLoss(f"{STAGE}: step {state.step + 1} has loss {total}, gradient norm {norm}; prompts {list(batch.prompts)[:3]}")
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    return totals | {"loss": total, "grad_norm": norm, "zero_advantage_share": float((advantage.abs() < 1e-6).float().mean())}


def auxiliary_loss(wrapped: torch.nn.Module, model: DeepGen, batch: Batch, config: MRGRPOConfig, step: int) -> Tensor:
    """Flow-matching loss on the real images of this step's prompts, so that the model does not forget them."""
    positions = [step * len(batch.prompts) + i for i in range(len(batch.prompts))]
    target = encode_images(model.vae, to_pixels(torch.from_numpy(batch.target_images).to(model.device)))
    noise = sample_noise(target, config.seed, STAGE, positions)
    sigmas = sigmas_at(quantiles(config.seed, STAGE, positions), "uniform", model.shift_for(target.shape[-2:])).to(model.device)
    with torch.no_grad():
        condition = model.encode_condition(batch.prompts)
    velocity = wrapped(interpolate(target, noise, sigmas), sigmas, condition=condition)
    return flow_matching_loss(velocity, velocity_target(target, noise)).mean()


def reward_row(scores: Scores, config: MRGRPOConfig) -> dict[str, float]:
    """Mean of each reward where it applies, and the weighted mean of all."""
    means = {}
    for k, name in enumerate(scores.names):
        asked = scores.applies[:, k] & scores.valid[:, k]
        if asked.any():
            means[name] = float(scores.values[asked, k].mean())
    weight = sum(config.rewards[name] for name in means)
    total = sum(config.rewards[name] * value for name, value in means.items()) / weight
    return {"reward": total, "coverage": scores.coverage} | {f"reward_{name}": value for name, value in means.items()}
