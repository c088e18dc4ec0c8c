"""An update of MR-GRPO at the tiny preset's size, against the order of work of the reference implementation on the same model.

    python benchmarks/rollout.py [--json FILE] [--pairs N] [--latency SECONDS]

Both draw 8 prompts, 8 images each, by 50 steps; a judge on loopback compares every two images of a group in both orders and takes 200 ms
for each answer. The plain version reads the prompt of every image, and again for the update; adds noise in every step; asks about group
after group and waits for each; trains 30 of the 50 steps, one at a time. Ours reads each prompt once, rolls out group by group while the
judge looks at those before, and trains the steps of its window: once the same 30, once 10 neighbours. Times are medians of interleaved
pairs, in seconds an update; ratios are medians of the pairs' own. hidden: what of the plain version's waiting for the judge ours does not
wait.
Goals: the window at least twice as fast as plain, and at least 80% hidden.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.train_step import build, quiet
from data.loader import Batch
from model.deepgen import DeepGen
from model.flow import sampling_sigmas
from model.generate import latent_shape
from model.vae import decode_latents, to_uint8
from model.weights import load_foundation
from runtime.environment import set_environment
from runtime.exits import StopRequest
from runtime.files import write_json
from runtime.stage import begin_stage
from tests.training.fake_judge import MODEL, FakeJudge
from training.advantages import advantages
from training.checkpoint import TrainState
from training.config import MRGRPOConfig
from training.launch import build_accelerator
from training.losses import clipped_ratio_loss
from training.mr_grpo import Reinforcement
from training.optim import build_optimizer
from training.rewards.preference import Preference
from training.rewards.scores import Group, below
from training.sde import log_prob, sde_step
from training.stages import freeze_for
from training.tracking import Tracker

FASTER, HIDDEN = 2.0, 0.8
ALIKE = {
    "prompts_per_step": 8,
    "group_size": 8,
    "rollout_prompts": 1,
    "micro_batch_size": 64,
    "rollout_steps": 50,
    "stochastic_steps": 30,
    "window": "spread",
    "sampler": "cps_sde",
    "eta": 1.0,
    "clip_range": 1e-2,
    "rewards": {"preference": 1.0},
    "held_out_reward": None,
    "probe": None,
    "auxiliary": None,
}
VARIANTS: dict[str, dict[str, Any]] = {"same 30 steps": {}, "window of 10": {"stochastic_steps": 10, "window": "neighbours"}}


def settings(judge: FakeJudge, **changes: Any) -> dict[str, Any]:
    preference = {"endpoint": judge.endpoint, "model": MODEL, "replay_share": 0.0, "concurrency": 64}
    return ALIKE | {"preference": preference} | changes


def ours(work: Reinforcement, state: TrainState) -> dict[str, float]:
    began = time.perf_counter()
    work.gradients(SimpleNamespace(see=lambda *_: None), SimpleNamespace(beat=lambda: None))  # type: ignore[arg-type]
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    state.step += 1
    return work.seconds | {"seconds": time.perf_counter() - began}


def plain(model: DeepGen, batch: Batch, config: MRGRPOConfig, reward: Preference, optimizer: torch.optim.Optimizer) -> dict[str, float]:
    began = time.perf_counter()
    G, N = config.group_size, config.group_size * len(batch.prompts)
    prompts = [prompt for prompt in batch.prompts for _ in range(G)]
    sigmas = sampling_sigmas(config.rollout_steps, model.timestep_shift)
    trained = torch.randperm(config.rollout_steps - 1)[: config.stochastic_steps].tolist()
    latents, kept = torch.randn(N, *latent_shape(model, batch.target_images.shape[1:3])), {}
    with torch.no_grad():
        condition = model.encode_condition(prompts)
        for index in range(config.rollout_steps):
            velocity = model.predict_velocity(latents, sigmas[index].expand(N), condition)
            step = sde_step(config.sampler, latents, velocity, sigmas, index, config.eta)
            following = step.mean + step.std * torch.randn_like(latents)
            kept[index] = (latents, following, log_prob(config.sampler, step, following))
            latents = following
        images = to_uint8(decode_latents(model.vae, latents)).numpy()
    rolled = time.perf_counter()
    groups = [Group(f"{i}", batch.task, prompt, tuple(images[i * G : i * G + G]), {}) for i, prompt in enumerate(batch.prompts)]
    scores = below([reward(group) for group in groups])
    asked = time.perf_counter()
    advantage = advantages(scores, torch.ones(1), G, 0.02, config.advantage_clip)
    with torch.no_grad():
        condition = model.encode_condition(prompts)
    for index in trained:
        before, following, old = kept[index]
        velocity = model.predict_velocity(before, sigmas[index].expand(N), condition)
        new = log_prob(config.sampler, sde_step(config.sampler, before, velocity, sigmas, index, config.eta), following)
        (clipped_ratio_loss(new, old, advantage, config.clip_range).mean() / len(trained)).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    ended = time.perf_counter()
    return {"rollout_s": rolled - began, "reward_s": asked - rolled, "update_s": ended - asked, "seconds": ended - began}


def measure(root: Path, judge: FakeJudge, changes: dict[str, Any], pairs: int) -> dict[str, Any]:
    params = yaml.safe_load((root / "params.yaml").read_text())
    params["mr_grpo"] |= settings(judge, **changes)
    params["mixture"]["mr_grpo"]["auxiliary"] = None
    (root / "params.yaml").write_text(yaml.safe_dump(params))
    with begin_stage(root, "mr_grpo", StopRequest()) as run:
        config = run.params.mr_grpo
        torch.manual_seed(0)
        model = load_foundation(root / "outputs" / "foundation" / "model", run.params.model).eval()
        trained = freeze_for(model, "mr_grpo")
        state = TrainState(trained, build_optimizer(trained.values(), config.optimizer))
        work = Reinforcement(run, build_accelerator(run.params.launch), model, None, state, Tracker(run))
        alone = config.model_copy(update={"stochastic_steps": ALIKE["stochastic_steps"]})
        reward = Preference(config.preference, run.folder / "plain.jsonl")  # type: ignore[arg-type]
        rows: dict[str, list[dict[str, float]]] = {"ours": [], "plain": []}
        for pair in range(pairs + 1):  # the first warms up
            batch = work.loader.batch(1000 + pair)
            for name in ("ours", "plain") if pair % 2 else ("plain", "ours"):
                mine = name == "ours"
                rows[name].append(ours(work, state) if mine else plain(model, batch, alone, reward, state.optimizer))
        work.scoring.close()
    medians = {name: {key: statistics.median(row[key] for row in each[1:]) for key in each[0]} for name, each in rows.items()}
    pairs_of = list(zip(rows["ours"][1:], rows["plain"][1:], strict=True))
    return medians | {
        "faster": statistics.median(b["seconds"] / a["seconds"] for a, b in pairs_of),
        "hidden": statistics.median(1 - a["reward_s"] / b["reward_s"] for a, b in pairs_of),
    }


def main() -> None:
    set_environment()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--latency", type=float, default=0.2, help="seconds the judge takes for an answer")
    arguments = parser.parse_args()
    judge = FakeJudge(delay=arguments.latency, prefer=lambda first, second: 1 if first > second else 2)
    results = []
    with tempfile.TemporaryDirectory(prefix="rollout_") as folder:
        with quiet():
            build(Path(folder), 1)
        (Path(folder) / "outputs" / "sft").symlink_to("foundation")
        print(f"{'':<15}{'':<7}{'rollout s':>10}{'reward s':>10}{'update s':>10}{'whole s':>9}{'faster':>8}{'hidden':>8}")
        for name, changes in VARIANTS.items():
            with quiet():
                row = measure(Path(folder), judge, changes, arguments.pairs)
            goal = "stochastic_steps" in changes
            row |= {"variant": name, "met": not goal or (row["faster"] >= FASTER and row["hidden"] >= HIDDEN)}
            results.append(row)
            for who in ("plain", "ours"):
                times = "".join(f"{row[who][key]:>{width}.2f}" for key, width in zip(row[who], (10, 10, 10, 9), strict=True))
                said = f"{row['faster']:>7.2f}x{row['hidden']:>8.0%}" if who == "ours" else ""
                goals = f"  goals {FASTER:g}x, {HIDDEN:.0%}: {'met' if row['met'] else 'MISSED'}" if goal and who == "ours" else ""
                print(f"{name:<15}{who:<7}{times}{said}{goals}", flush=True)
    judge.close()
    if arguments.json:
        write_json(arguments.json, results)
    sys.exit(0 if all(row["met"] for row in results) else 1)


if __name__ == "__main__":
    main()
