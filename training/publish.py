"""The end of a training stage: a folder with the model, its numbers and its pictures, swapped in as one."""

import shutil
from collections.abc import Sequence
from typing import Any

import torch

from data.loader import read_part
from model.deepgen import DeepGen
from model.flow import interpolate, sigmas_at, velocity_target
from model.vae import encode_images
from model.weights import save_model
from runtime.files import read_json, write_json
from runtime.stage import StageRun
from training.batching import batched, one_size_batches, reference_pixels, stack_pixels
from training.losses import flow_matching_loss
from training.pictures import save_curves, save_grid
from training.randomness import quantiles, sample_noise
from training.scoring import score
from training.tracking import Tracker

BOARD = 16  # fixed prompts a task on a stage's sample grid
HELD_OUT = 64  # samples a task in the held-out loss


def publish_stage(run: StageRun, stage: str, model: DeepGen, history: Sequence[dict[str, float]], tracker: Tracker) -> None:
    """Write `outputs/<stage>/`: model/, metrics.json, history.json, curves.png, grid.png; report it to MLflow and Dagster."""
    folder = run.folder / "out"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    model.eval()
    save_model(model, folder / "model")
    metrics: dict[str, Any] = {
        "steps": len(history),
        "held_out_loss": {"before": read_json(run.folder / "before.json"), "after": held_out_loss(run, model)},
    }
    for name in ("loss", "reward"):
        series = [row[name] for row in history if name in row]
        if series:
            share = max(1, len(series) // 10)
            metrics |= {f"{name}_first": sum(series[:share]) / share, f"{name}_last": sum(series[-share:]) / share}
    write_json(folder / "metrics.json", metrics)
    write_json(folder / "history.json", list(history))
    names = [
        name for name in ("loss", "loss_text_to_image", "loss_image_edit", "reward", "reward_strict") if any(name in row for row in history)
    ]
    save_curves(history, names, folder / "curves.png", stage)
    draw_board(run, model, folder / "grid.png")
    for picture in ("curves.png", "grid.png"):
        tracker.picture(folder / picture)
    numbers = {name: value for name, value in metrics.items() if isinstance(value, (int, float))}
    losses = {f"held_out_loss_{when}_{task}": value for when, row in metrics["held_out_loss"].items() for task, value in row.items()}
    tracker.result(**losses)
    shown = {"curves": run.out / "curves.png", "samples": run.out / "grid.png"}
    run.publish(folder)
    run.report(numbers | losses, shown)


def remember_start(run: StageRun, model: DeepGen) -> None:
    """Measure the held-out loss before the first step, once a run folder."""
    if not (run.folder / "before.json").exists():
        write_json(run.folder / "before.json", held_out_loss(run, model))


@torch.no_grad()
def held_out_loss(run: StageRun, model: DeepGen) -> dict[str, float]:
    """Mean flow-matching loss by task on evaluation samples, at fixed noise and sigmas: the same question before and after."""
    losses: dict[str, float] = {}
    training = model.training
    model.eval()
    for part in run.params.evaluation.parts:
        samples = list(read_part(run.root / "outputs" / "shards" / part, HELD_OUT))
        total, seen = 0.0, 0
        for batch in one_size_batches(samples, 32):
            positions = list(range(seen, seen + len(batch)))
            target = encode_images(model.vae, stack_pixels([sample.target for sample in batch], model.device))
            references = reference_pixels(batch, model.device)
            noise = sample_noise(target, 0, "held_out", positions)
            sigmas = sigmas_at(quantiles(0, "held_out", positions), "uniform", model.shift_for(target.shape[-2:])).to(model.device)
            reference_latents = tuple(encode_images(model.vae, pixels) for pixels in references)
            velocity = model(
                interpolate(target, noise, sigmas),
                sigmas,
                reference_latents,
                prompts=[s.prompt for s in batch],
                reference_images=references,
            )
            total += flow_matching_loss(velocity, velocity_target(target, noise)).sum().item()
            seen += len(batch)
        losses[samples[0].task] = total / seen
    model.train(training)
    return losses


def draw_board(run: StageRun, model: DeepGen, path: Any) -> None:
    """Fixed prompts and seeds: generated images, and edits as source, result, target."""
    config = run.params.evaluation
    rows, captions = [], []
    for part in config.parts:
        samples = list(read_part(run.root / "outputs" / "shards" / part, BOARD))
        scored = score(model, samples, config.sampling_steps, config.guidance, config.batch_size, config.seed)
        for group in batched(scored, 8 if not samples[0].references else 3):
            rows.append(
                [
                    image
                    for row in group
                    for image in ((*row.sample.references, row.image, row.sample.target) if row.sample.references else (row.image,))
                ]
            )
            captions.append(
                [
                    text
                    for row in group
                    for text in ((row.sample.prompt, "result", "target") if row.sample.references else (row.sample.prompt,))
                ]
            )
    save_grid(rows, path, captions, scale=2)
