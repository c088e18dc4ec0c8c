"""The stand-in DiT: generation and editing, with any number of references, learned from the plain text encoder by flow matching."""

import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed, nn

from data.drawn import DrawnSample, draw_image_edit, draw_text_to_image, repainted
from model.deepgen import DeepGen
from model.flow import interpolate, sigmas_at, velocity_target
from model.generate import latent_shape
from model.sampler import initial_noise, sample_euler
from model.vae import decode_latents, encode_images, to_uint8
from runtime.keys import seed_from
from training.batching import batched, reference_pixels, stack_pixels
from training.config import DiTTrainingConfig
from training.losses import flow_matching_loss
from training.muon import Muon
from training.optim import EMA
from training.randomness import coin_flips, quantiles, sample_noise
from training.steps import train_steps
from training.text_encoder import PlainTextEncoder, word_ids

TASKS = ("text_to_image", "image_edit")
STAGE = "foundation"  # part of the name of every draw


def train_dit(
    model: DeepGen,
    encoder: PlainTextEncoder,
    settings: DiTTrainingConfig,
    seed: int,
    folder: Path,
    stop: Callable[[], bool],
    evaluation_samples: int,
    rank: int = 0,
    ranks: int = 1,
) -> dict[str, Any]:
    """Train `model.dit` and `encoder`, which end as their averages, with checkpoints in `folder`; what was measured (on rank 0).

    A step sees `batch_size` samples over all ranks, drawn by their position in the stream: any number of ranks computes the same sum.
    """
    named = {f"dit.{n}": p for n, p in model.dit.named_parameters()} | {f"text.{n}": p for n, p in encoder.named_parameters()}
    optimizers = build_optimizers(named, settings)
    ema = EMA(named, settings.ema_decay)
    share = settings.batch_size // ranks

    def step(i: int) -> dict[str, float]:
        first = i * settings.batch_size + rank * share
        sums = backward(model, encoder, list(range(first, first + share)), settings, seed)
        losses = add_up(list(named.values()), sums)
        norm = nn.utils.clip_grad_norm_(named.values(), settings.max_grad_norm)
        for optimizer in optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * learning_rate_factor(i, settings)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        ema.update()
        if rank == 0 and (i + 1) % settings.score_every == 0 and i + 1 < settings.steps:
            with averaged(ema):
                scores = score_foundation(model, encoder, settings.score_samples, settings.sampling_steps)
            tell_scores(folder.parent / "dit_scores.jsonl", i + 1, scores)
        return losses | {"norm": norm.item()}

    state = {"dit": model.dit, "text": encoder, "ema": ema} | optimizers
    train_steps("dit", settings.steps, step, state, folder, settings.save_every, stop, rank)
    ema.copy_to_parameters()
    if rank != 0:
        return {}
    scores = score_foundation(model, encoder, evaluation_samples, settings.sampling_steps)
    tell_scores(folder.parent / "dit_scores.jsonl", settings.steps, scores)
    return {"samples_seen": settings.steps * settings.batch_size, "strict": scores}


def build_optimizers(named: dict[str, nn.Parameter], settings: DiTTrainingConfig) -> dict[str, torch.optim.Optimizer]:
    """AdamW for all, or Muon for the attention's and feed-forward's matrices of the DiT and AdamW for the rest."""
    matrices = [
        p
        for n, p in named.items()
        if settings.optimizer == "muon" and n.startswith("dit.transformer_blocks.") and "norm" not in n and p.ndim == 2
    ]
    taken = {id(p) for p in matrices}
    rest = [p for p in named.values() if id(p) not in taken]
    decay = settings.weight_decay
    optimizers: dict[str, torch.optim.Optimizer] = {
        "adamw": torch.optim.AdamW(rest, lr=settings.lr, betas=(0.9, 0.98), weight_decay=decay, fused=True)
    }
    if matrices:
        optimizers["muon"] = Muon(matrices, settings.muon_lr or settings.lr, weight_decay=decay)
    for optimizer in optimizers.values():
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    return optimizers


def learning_rate_factor(step: int, settings: DiTTrainingConfig) -> float:
    """Share of the peak in step `step` (0 first): up, constant, and down to 2% over the last `decay_share`.

    Before the decay begins it does not depend on `steps`, which may be changed until then.
    """
    up = min(1.0, (step + 1) / settings.warmup)
    begins = round(settings.steps * (1 - settings.decay_share))
    if step < begins:
        return up
    gone = (step - begins) / (settings.steps - begins)
    return up * (0.02 + 0.98 * (1 - gone if settings.decay == "linear" else 0.5 * (1 + math.cos(math.pi * gone))))


def backward(
    model: DeepGen, encoder: PlainTextEncoder, positions: Sequence[int], settings: DiTTrainingConfig, seed: int
) -> dict[str, tuple[float, int]]:
    """Add up the gradients of these samples, each over `batch_size`; by task their losses' sum and number."""
    groups: dict[int, list[tuple[int, DrawnSample]]] = defaultdict(list)
    for position in positions:
        sample = sample_at(position, settings, seed)
        groups[len(sample.references)].append((position, sample))
    told = {task: (0.0, 0) for task in TASKS}
    for _, group in sorted(groups.items()):
        losses = sample_losses(model, encoder, [s for _, s in group], [position for position, _ in group], settings, seed)
        (losses.sum() / settings.batch_size).backward()
        total, count = told[group[0][1].task]
        told[group[0][1].task] = total + losses.sum().item(), count + len(group)
    return told


def sample_at(position: int, settings: DiTTrainingConfig, seed: int) -> DrawnSample:
    """The sample at a position of the stream; edits stand evenly among captions."""
    edit = math.floor((position + 1) * settings.edit_share) > math.floor(position * settings.edit_share)
    if not edit:
        return draw_text_to_image("train", seed_from("dit", seed), position, settings.kinds)
    sample = draw_image_edit("train", seed_from("dit", seed), position, settings.edits)
    (repaint,) = coin_flips(settings.repainted, "repaint", seed, STAGE, [position])
    return repainted(sample, seed_from("dit", seed), position) if repaint else sample


def sample_losses(
    model: DeepGen, encoder: PlainTextEncoder, samples: Sequence[DrawnSample], positions: list[int], settings: DiTTrainingConfig, seed: int
) -> Tensor:
    """(B,) losses of samples with as many references each."""
    dropped = coin_flips(settings.text_dropout, "dropout", seed, STAGE, positions)
    prompts = ["" if drop else sample.prompt for drop, sample in zip(dropped, samples, strict=True)]
    with torch.no_grad():
        target = encode_images(model.vae, stack_pixels([sample.target for sample in samples]))
        references = tuple(encode_images(model.vae, pixels) for pixels in reference_pixels(samples))
    noise = sample_noise(target, seed, STAGE, positions)
    sigmas = sigmas_at(quantiles(seed, STAGE, positions), "logit_normal", model.shift_for(target.shape[-2:]))
    condition = encoder(*word_ids(model.tokenizer, prompts))
    velocity = model.predict_velocity(interpolate(target, noise, sigmas), sigmas, condition, references)
    return flow_matching_loss(velocity, velocity_target(target, noise))


def add_up(parameters: list[nn.Parameter], losses: dict[str, tuple[float, int]]) -> dict[str, float]:
    """Sum gradients and losses over the ranks in one call; by task the mean loss of those that had any."""
    for parameter in parameters:
        if parameter.grad is None:  # the last block's text branch, or a row of references that no sample had
            parameter.grad = torch.zeros_like(parameter)
    sums = torch.tensor([number for pair in losses.values() for number in pair])
    if distributed.is_initialized():
        flat = torch.cat([sums, *(parameter.grad.flatten() for parameter in parameters)])  # type: ignore[union-attr]
        distributed.all_reduce(flat)
        sums, *gradients = flat.split([len(sums), *(parameter.numel() for parameter in parameters)])
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient.view_as(parameter)
    return {task: (total / count).item() for task, (total, count) in zip(losses, sums.view(-1, 2), strict=True) if count}


@contextmanager
def averaged(ema: EMA) -> Iterator[None]:
    """The averages in place of the weights."""
    held = {name: parameter.detach().clone() for name, parameter in ema.parameters.items()}
    ema.copy_to_parameters()
    yield
    with torch.no_grad():
        for name, parameter in ema.parameters.items():
            parameter.copy_(held[name])


def tell_scores(log: Path, step: int, scores: dict[str, Any]) -> None:
    """Print the scores, and append them to `log` as one JSON line."""
    for task, score in scores.items():
        kinds = "  ".join(f"{kind} {value:.2f}" for kind, value in score["kinds"].items())
        print(f"dit step {step}: {task} {score['strict']:.3f} ({score['n']} samples)  {kinds}", flush=True)
    with open(log, "a") as handle:
        handle.write(json.dumps({"step": step} | scores) + "\n")


def score_foundation(model: DeepGen, encoder: PlainTextEncoder, count: int, sampling_steps: int) -> dict[str, Any]:
    """Strict accuracy of the DiT from the plain text encoder, without guidance: by task n, strict, and kinds."""
    from data.verifier import verify

    scores: dict[str, Any] = {}
    seed = seed_from("foundation evaluation")
    for task, draw in zip(TASKS, (draw_text_to_image, draw_image_edit), strict=True):
        samples = [draw("evaluation", seed, i) for i in range(count)]
        images = draw_images(model, encoder, samples, [seed_from("foundation evaluation", i) for i in range(count)], sampling_steps)
        kinds: dict[str, list[bool]] = defaultdict(list)
        for sample, image in zip(samples, images, strict=True):
            kinds[sample.kind].append(verify(sample.scene, image, task).strict)
        scores[task] = {
            "n": count,
            "strict": round(sum(map(sum, kinds.values())) / count, 4),
            "kinds": {kind: round(sum(values) / len(values), 4) for kind, values in sorted(kinds.items())},
        }
    return scores


@torch.no_grad()
def draw_images(
    model: DeepGen, encoder: PlainTextEncoder, samples: Sequence[Any], seeds: Sequence[int], steps: int, batch_size: int = 128
) -> np.ndarray:
    """uint8 (N, H, W, 3): what the DiT makes of the samples' prompts and references, each from its own seed.

    Args:
        samples: of one size, with any number of references; DrawnSample, or what has its prompt, target and references.
    """
    images = np.zeros((len(samples), *samples[0].target.shape), np.uint8)
    groups: dict[int, list[int]] = defaultdict(list)
    for i, sample in enumerate(samples):
        groups[len(sample.references)].append(i)
    shape = latent_shape(model, images.shape[1:3])
    for rows in (batch for group in groups.values() for batch in batched(group, batch_size)):
        condition = encoder(*word_ids(model.tokenizer, [samples[i].prompt for i in rows]))
        references = tuple(encode_images(model.vae, pixels) for pixels in reference_pixels([samples[i] for i in rows]))
        noise = initial_noise(shape, [seeds[i] for i in rows])
        velocity = lambda x, s: model.predict_velocity(x, s, condition, references)  # noqa: E731, B023
        latents = sample_euler(velocity, noise, steps, model.shift_for(shape[1:]))
        images[list(rows)] = to_uint8(decode_latents(model.vae, latents)).numpy()
    return images
