"""Stage 3, MR-GRPO: rollout -> reward -> advantage -> update (paper section 3.3)."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from data.loader import Batch, Loader
from data.mixture import cycle
from model.deepgen import DeepGen
from runtime.exits import Plain
from runtime.files import read_json
from runtime.stage import StageRun, rank
from training.advantages import advantages, alive, spread_of
from training.batching import batched
from training.checkpoint import Checkpoints, TrainState, fault
from training.conditions import Conditions
from training.config import NOISE_FLOORS
from training.guards import Guard
from training.heartbeat import Heartbeat
from training.launch import build_accelerator
from training.loop import Tried, accumulate, agreed, train_to_end
from training.optim import EMA, build_optimizer
from training.pictures import Shown, save_strips
from training.probe import Probe
from training.publish import publish_stage, remember_start, report_parameters
from training.ranks import from_every_rank
from training.rewards.build import build_rewards
from training.rewards.scores import Group, Scores, below
from training.rewards.scoring import Pending, Scoring
from training.rollout import Rollout, roll_out, trained_steps
from training.sharding import checkpoint_activations
from training.stages import freeze_for
from training.supervised import batch_loss, load_parent
from training.tracking import Tracker, track
from training.update import frozen_twin, update

STAGE = "mr_grpo"


class RewardsMissing(Plain):
    """Too few of the reward values are valid to learn from."""


def run_mr_grpo(run: StageRun) -> None:
    """Train the DiT on rewards to the last step and publish the stage's folder."""
    with track(run) as tracker:
        accelerator = build_accelerator(run.params.launch)
        model = load_parent(run, STAGE)
        remember_start(run, model)
        state = train(run, accelerator, model, tracker)
        if state.ema is not None:
            state.ema.copy_to_parameters()
        if rank() == 0:
            publish_stage(run, STAGE, model, state, tracker)
        accelerator.wait_for_everyone()


def train(run: StageRun, accelerator: Accelerator, model: DeepGen, tracker: Tracker) -> TrainState:
    """Train to the last update, from the newest checkpoint on."""
    config = run.params.mr_grpo
    trained = freeze_for(model, STAGE)
    report_parameters(run, model, tracker)
    model.to(accelerator.device).eval()
    reference = frozen_twin(model) if config.kl_weight else None  # before a checkpoint's weights are in the model
    state = TrainState(
        trained, build_optimizer(trained.values(), config.optimizer), EMA(trained, config.ema_decay) if config.ema_decay else None
    )
    checkpoints = Checkpoints(run.folder, config.checkpoint_every, config.keep_checkpoints, config.async_checkpoints)
    probe = Probe(run, config, accelerator, model, state, tracker)
    if checkpoints.restore(state):
        print(f"{STAGE}: going on from step {state.step}", flush=True)
    work = Reinforcement(run, accelerator, model, reference, state, tracker)
    images = config.prompts_per_step * config.group_size
    try:
        return train_to_end(run, STAGE, config, accelerator, state, checkpoints, work, probe, tracker, images)
    finally:
        work.scoring.close()


@dataclass(frozen=True)
class Rewarded:
    """This rank's images of an update, groups in a row, and their scores."""

    rollouts: tuple[Rollout, ...]
    scores: Scores

    @property
    def groups(self) -> list[Group]:
        return [group for rollout in self.rollouts for group in rollout.groups]

    @property
    def diversity(self) -> float:
        """Standard deviation of a pixel's value, in [0, 1], over the images of a group; mean over pixels and groups."""
        return float(np.mean([np.std(np.stack(group.images) / 255.0, axis=0).mean() for group in self.groups]))

    def only(self, kept: Sequence[int], group_size: int) -> "Rewarded":
        """Of these groups alone, in their order."""
        rollouts, first = [], 0
        for rollout in self.rollouts:
            own = [number - first for number in kept if first <= number < first + len(rollout.groups)]
            rollouts += [rollout.only(own)] if own else []
            first += len(rollout.groups)
        rows = torch.tensor([number * group_size + image for number in kept for image in range(group_size)])
        part = Scores(self.scores.names, self.scores.values[rows], self.scores.valid[rows], self.scores.applies[rows])
        return Rewarded(tuple(rollouts), part)

    def __add__(self, other: "Rewarded") -> "Rewarded":
        return Rewarded((*self.rollouts, *other.rollouts), below([self.scores, other.scores]))


class Reinforcement:
    """Gradients of one update: rollout, reward, advantage and update in this order."""

    def __init__(
        self, run: StageRun, accelerator: Accelerator, model: DeepGen, reference: DeepGen | None, state: TrainState, tracker: Tracker
    ) -> None:
        self.run, self.accelerator, self.model, self.reference, self.state = run, accelerator, model, reference, state
        self.tracker, self.config = tracker, run.params.mr_grpo
        mixture, ranks = read_json(run.root / "outputs" / "mixture" / f"{STAGE}.json"), accelerator.num_processes
        shards, latents = run.root / "outputs" / "shards", run.root / "outputs" / "latents"
        place = (accelerator.process_index, ranks)
        self.loader = Loader(mixture, shards, self.config.prompts_per_step, *place)
        self.auxiliary: Loader | None = None
        if self.config.auxiliary is not None:
            self.turns = len(cycle(mixture["auxiliary"]))
            size = self.config.auxiliary.batch_size // self.turns
            self.auxiliary = Loader(mixture["auxiliary"], shards, size, *place, latents=latents)
            self.real = iter(self.auxiliary)
        if state.data:
            self.loader.restore(state.data)
            if self.auxiliary is not None:
                self.auxiliary.restore(state.data["auxiliary"])
        self.batches = iter(self.loader)
        if run.params.launch.gradient_checkpointing:
            checkpoint_activations(model)
        self.wrapped = accelerator.prepare_model(model)
        model.eval()
        self.conditions = Conditions(model)
        self.scoring = Scoring(
            build_rewards(self.config, run.root, run.folder, accelerator.device), self.config.weights_of, self.config.held_out_reward
        )
        floors = NOISE_FLOORS | self.config.noise_floor
        self.floor = torch.tensor([floors[name] for name in self.scoring.names])
        self.seconds: dict[str, float] = {}

    def gradients(self, guard: Guard, heartbeat: Heartbeat) -> Tried:
        self.seconds = dict.fromkeys(("rollout_s", "reward_s", "update_s"), 0.0)
        rewarded = self.rewarded_groups(guard, heartbeat)
        everyone = Everyone.of(rewarded, self.scoring.weights(rewarded.groups))
        row = self.numbers(everyone)
        if row["coverage"] < self.config.min_coverage:
            return self.refuse(row)
        advantage = self.advantage(everyone)
        row |= self.update(rewarded, advantage)
        self.save_strips(rewarded)
        done = self.state.step + 1
        logged = done % self.config.log_every == 0 or done == self.config.steps
        curve = {f"seconds/{name}": value for name, value in self.seconds.items()} | self.scoring.facts()
        return Tried(row.pop("loss"), row, curve, logged)

    def rewarded_groups(self, guard: Guard, heartbeat: Heartbeat) -> Rewarded:
        """Rollout and reward; where refill is set, groups that no reward tells apart make room for others that one does."""
        config, steps = self.config, trained_steps(self.config, self.state.step)
        rewarded = self.reward(*self.rollout(next(self.batches), steps, heartbeat), guard)
        wanted = len(rewarded.groups)
        for _ in range(config.refill):
            if not agreed(self.accelerator, not all(self.live(rewarded))):
                break
            rewarded = rewarded + self.reward(*self.rollout(next(self.batches), steps, heartbeat), guard)
            live = self.live(rewarded)
            order = sorted(range(len(live)), key=lambda number: not live[number])  # live ones first, each kind in its order
            rewarded = rewarded.only(sorted(order[:wanted]), config.group_size)
        return rewarded

    def rollout(self, batch: Batch, steps: tuple[int, ...], heartbeat: Heartbeat) -> tuple[Batch, list[Rollout], list[Pending]]:
        """Images for the batch's prompts; each group is asked about as soon as it is there."""
        began, rollouts, pending = time.monotonic(), [], []
        for rows in batched(range(len(batch.prompts)), self.config.rollout_prompts or len(batch.prompts)):
            rolled = roll_out(self.wrapped, self.model, self.conditions, batch, rows, self.config, steps)
            pending += [self.scoring.begin(group) for group in rolled.groups]
            rollouts.append(rolled)
            heartbeat.beat()
        self.seconds["rollout_s"] += time.monotonic() - began
        fault("rollout", self.state.step + 1)
        return batch, rollouts, pending

    def reward(self, batch: Batch, rollouts: Sequence[Rollout], pending: Sequence[Pending], guard: Guard) -> Rewarded:
        """Wait for what is still being scored: in `reward_s`, so much of it as was not hidden behind the rollout."""
        began = time.monotonic()
        rewarded = Rewarded(tuple(rollouts), below([group.result() for group in pending]))
        self.seconds["reward_s"] += time.monotonic() - began
        fault("reward", self.state.step + 1)
        guard.see(batch, weighted_mean(rewarded.scores, self.scoring.weights(rewarded.groups)).view(len(batch.prompts), -1).mean(1))
        return rewarded

    def live(self, rewarded: Rewarded) -> list[bool]:
        """Of each group, whether a trained reward tells its images apart."""
        found: list[bool] = self.alive(rewarded.scores, self.scoring.weights(rewarded.groups)).any(-1).any(-1).tolist()
        return found

    def alive(self, scores: Scores, weights: Tensor) -> Tensor:
        """(groups, G, K), of trained rewards."""
        valid = (scores.valid & scores.applies).view(len(weights), self.config.group_size, -1) & (weights > 0)
        return alive(scores.values.view_as(valid), valid, self.floor)

    def advantage(self, everyone: "Everyone") -> Tensor:
        """(N,) of this rank's images; normalised over those of all ranks."""
        config = self.config
        made = advantages(
            everyone.scores,
            everyone.weights,
            config.group_size,
            self.floor,
            config.advantage_clip,
            config.max_gain,
            config.advantage_norm,
        )
        fault("advantage", self.state.step + 1)
        return made.chunk(self.accelerator.num_processes)[self.accelerator.process_index]

    def update(self, rewarded: Rewarded, advantage: Tensor) -> dict[str, float]:
        began = time.monotonic()
        trained = list(self.state.trained.values())
        auxiliary = self.auxiliary_gradients if self.auxiliary is not None else None
        row = update(
            self.accelerator, self.wrapped, self.model, self.reference, rewarded.rollouts, advantage, trained, self.config, auxiliary
        )
        if self.accelerator.num_processes > 1:
            names = ("loss", "policy_loss", "kl", "clip_share")
            means = self.accelerator.reduce(torch.tensor([row[name] for name in names], device=self.model.device), "mean")
            row |= dict(zip(names, means.tolist(), strict=True))
        self.seconds["update_s"] += time.monotonic() - began
        return row

    def auxiliary_gradients(self) -> Tensor:
        """Gradients of the flow-matching loss on real data, tasks by the ratio of mixture.mr_grpo.auxiliary; its mean over all ranks."""
        assert self.auxiliary is not None and self.config.auxiliary is not None
        losses = []
        for micro in range(self.turns):
            batch = next(self.real)
            with torch.enable_grad(), accumulate(self.accelerator, self.wrapped, last=micro == self.turns - 1):
                loss = batch_loss(self.wrapped, self.model, batch, self.config.auxiliary, STAGE).mean()
                self.accelerator.backward(loss / self.turns)
            losses.append(loss.detach())
        return self.accelerator.reduce(torch.stack(losses).mean(), "mean")

    def refuse(self, row: dict[str, float]) -> Tried:
        """Too little was scored: as mr_grpo.on_low_coverage says."""
        names = [name for name in self.scoring.names if row.get(f"valid_{name}", 1.0) < 1.0]
        shares = ", ".join(f"{name} {row[f'valid_{name}']:.0%}" for name in names)
        why = f"{row['coverage']:.0%} of the reward values are valid ({shares}), mr_grpo.min_coverage is {self.config.min_coverage:.0%}"
        if self.config.on_low_coverage == "stop":
            raise RewardsMissing(
                f"{STAGE}: step {self.state.step + 1}: {why}. No weight was changed. See to what scores them; the same command goes on "
                "from the last checkpoint. Or set mr_grpo.on_low_coverage: skip."
            )
        return Tried(0.0, refused=why)

    def numbers(self, everyone: "Everyone") -> dict[str, float]:
        """Of all ranks: what was scored and how well, and whether groups differ."""
        scores, G = everyone.scores, self.config.group_size
        asked = scores.applies & (everyone.weights > 0).expand(-1, G, -1).reshape(scores.applies.shape)
        row = {
            "reward": float(weighted_mean(scores, everyone.weights).mean()),
            "coverage": float((scores.valid & asked).sum()) / max(1, int(asked.sum())),
            "zero_variance_share": 1.0 - float(self.alive(scores, everyone.weights).any(-1).any(-1).float().mean()),
            "diversity": everyone.diversity,
        }
        for k, name in enumerate(scores.names):
            applies, valid = scores.applies[:, k], scores.applies[:, k] & scores.valid[:, k]
            if name == self.config.held_out_reward and valid.any():
                row["held_out_reward"] = float(scores.values[valid, k].mean())
            elif valid.any():
                row[f"reward_{name}"] = float(scores.values[valid, k].mean())
            if applies.any():
                grouped = valid.view(-1, G, 1)
                spread = spread_of(scores.values[:, k].view(-1, G, 1), grouped)[grouped.any(1, keepdim=True)]
                row[f"valid_{name}"] = float(valid.sum()) / int(applies.sum())
                row[f"spread_{name}"] = float(spread.mean()) if len(spread) else 0.0
        return row

    def save_strips(self, rewarded: Rewarded) -> None:
        """The best and the worst picture of each reward in the group that it tells apart most, of this rank."""
        done, scores = self.state.step + 1, rewarded.scores
        if rank() != 0 or not self.config.strips_every or done % self.config.strips_every:
            return
        there = (scores.valid & scores.applies).view(-1, self.config.group_size, len(scores.names))
        values = scores.values.view_as(there)
        shown = []
        for k, name in enumerate(scores.names):
            best, worst = (torch.where(there[..., k], sign * values[..., k], -torch.inf).max(1) for sign in (1, -1))
            if there[..., k].any():
                group = int((best.values + worst.values).argmax())
                made = rewarded.groups[group]
                shown += [
                    Shown(name, made.prompt, float(values[group, image, k]), made.images[image])
                    for image in (int(best.indices[group]), int(worst.indices[group]))
                ]
        if not shown:
            return
        path = self.run.folder / "strips" / f"update-{done:06d}.png"
        path.parent.mkdir(exist_ok=True)
        save_strips(shown, path)
        self.tracker.picture(path, "strips")

    def taken(self) -> None:
        pass

    def data_state(self) -> dict[str, Any]:
        return self.loader.state() | ({} if self.auxiliary is None else {"auxiliary": self.auxiliary.state()})

    def shown(self, tried: Tried, rate: float) -> dict[str, float]:
        return {"reward": tried.row["reward"], "loss": tried.loss}


@dataclass(frozen=True)
class Everyone:
    """Scores of all ranks' images, their groups' weights (groups, 1, K), and their mean diversity."""

    scores: Scores
    weights: Tensor
    diversity: float

    @classmethod
    def of(cls, rewarded: Rewarded, weights: Tensor) -> "Everyone":
        """Of this rank's and all others'."""
        scores, every, diversity = zip(*from_every_rank((rewarded.scores, weights, rewarded.diversity)), strict=True)
        return cls(below(scores), torch.cat(every), sum(diversity) / len(diversity))


def weighted_mean(scores: Scores, weights: Tensor) -> Tensor:
    """(N,) weighted mean of the valid rewards of each image; 0 where none is."""
    valid = (scores.valid & scores.applies).view(len(weights), -1, len(scores.names)) * weights
    return ((scores.values.view_as(valid) * valid).sum(-1) / valid.sum(-1).clamp_min(1e-9)).view(-1)
