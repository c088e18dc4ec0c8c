"""An update of MR-GRPO at the tiny preset's size, against the order of work of the reference implementation on the same model.

    python benchmarks/rollout.py [--json FILE] [--pairs N] [--latency SECONDS]

Both draw 16 prompts, 8 images each, by 50 steps; a judge on loopback, in a process of its own, compares every two images of a group in both
orders and takes 200 ms for each answer. The plain version reads the prompt of every image, and again for the update; adds noise in every
step; asks about group after group and waits for each; trains 30 of the 50 steps, one at a time. Ours reads each prompt once, rolls out 8
groups while the judge looks at the 8 before, and trains the steps of its window: once as many as the plain version, once 4 neighbours, as
MixGRPO (arXiv 2507.21802) does. Times are medians of interleaved pairs, in seconds an update; ratios are medians of the pairs' own. hidden:
what of the plain version's waiting for the judge ours does not wait. Up to 512 requests are under way (`concurrency`, by default 32): all
of a pass in ours, the 56 of a group in the plain version.
Goals: the window at least twice as fast as plain, and at least 80% hidden.
"""

import argparse
import asyncio
import contextlib
import multiprocessing
import socket
import statistics
import sys
import tempfile
import time
import zlib
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import yaml
from aiohttp import web

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
from runtime.progress import Progress
from runtime.stage import begin_stage
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
MODEL = "judge"
ALIKE = {
    "prompts_per_step": 16,
    "group_size": 8,
    "rollout_prompts": 8,
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
VARIANTS: dict[str, dict[str, Any]] = {"same 30 steps": {}, "window of 4": {"stochastic_steps": 4, "window": "neighbours"}}


def judge(delay: float, port: Connection) -> None:
    """Any image is as good as another: which place wins is drawn from the request.

    The tests' FakeJudge looks at each image, in a thread for each connection: on two cores that would be measured too.
    """
    listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
    port.send(listener.getsockname()[1])

    async def models(_: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": MODEL}]})

    async def answer(request: web.Request) -> web.Response:
        place = zlib.crc32(await request.read()) % 2 + 1
        await asyncio.sleep(delay)
        return web.json_response({"model": MODEL, "choices": [{"message": {"content": f"<answer>Image {place} is better</answer>"}}]})

    app = web.Application()
    app.add_routes([web.get("/v1/models", models), web.post("/v1/chat/completions", answer)])
    web.run_app(app, sock=listener, print=None)


def settings(endpoint: str, **changes: Any) -> dict[str, Any]:
    preference = {"endpoint": endpoint, "model": MODEL, "replay_share": 0.0, "concurrency": 512}
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


def measure(root: Path, endpoint: str, changes: dict[str, Any], pairs: int) -> dict[str, Any]:
    params = yaml.safe_load((root / "params.yaml").read_text())
    params["mr_grpo"] |= settings(endpoint, **changes)
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
        with Progress(pairs + 1, "pair", f"{config.stochastic_steps} steps trained") as progress:
            for pair in range(pairs + 1):  # the first warms up
                batch = work.loader.batch(1000 + pair)
                for name in ("ours", "plain") if pair % 2 else ("plain", "ours"):
                    mine = name == "ours"
                    rows[name].append(ours(work, state) if mine else plain(model, batch, alone, reward, state.optimizer))
                with contextlib.redirect_stdout(sys.stderr):  # the table stands alone
                    progress.update(**{name: each[-1]["seconds"] for name, each in rows.items()})
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
    mine, theirs = multiprocessing.Pipe()
    server = multiprocessing.get_context("spawn").Process(target=judge, args=(arguments.latency, theirs), daemon=True)
    server.start()
    endpoint = f"http://127.0.0.1:{mine.recv()}/v1"
    results = []
    with tempfile.TemporaryDirectory(prefix="rollout_") as folder:
        with quiet():
            build(Path(folder), 1)
        (Path(folder) / "outputs" / "sft").symlink_to("foundation")
        print(f"{'':<15}{'':<7}{'rollout s':>10}{'reward s':>10}{'update s':>10}{'whole s':>9}{'faster':>8}{'hidden':>8}")
        for name, changes in VARIANTS.items():
            with quiet():
                row = measure(Path(folder), endpoint, changes, arguments.pairs)
            goal = "stochastic_steps" in changes
            row |= {"variant": name, "met": not goal or (row["faster"] >= FASTER and row["hidden"] >= HIDDEN)}
            results.append(row)
            for who in ("plain", "ours"):
                times = "".join(f"{row[who][key]:>{width}.2f}" for key, width in zip(row[who], (10, 10, 10, 9), strict=True))
                said = f"{row['faster']:>7.2f}x{row['hidden']:>8.0%}" if who == "ours" else ""
                goals = f"  goals {FASTER:g}x, {HIDDEN:.0%}: {'met' if row['met'] else 'MISSED'}" if goal and who == "ours" else ""
                print(f"{name:<15}{who:<7}{times}{said}{goals}", flush=True)
    server.terminate()
    if arguments.json:
        write_json(arguments.json, results)
    sys.exit(0 if all(row["met"] for row in results) else 1)


if __name__ == "__main__":
    main()
