"""What is drawn beside the loss at every log step: loss by timestep, gradient norm by part, samples and tokens a second, utilisation."""

import math
import time
from collections import defaultdict

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from data.loader import Batch
from model.deepgen import DeepGen
from model.flops import mfu, supervised_flops, total
from model.flow import sigmas_at
from model.generate import latent_shape
from model.parts import part_of
from model.prompts import prompt_tokens
from runtime.params import Params
from training.config import SupervisedConfig
from training.measure import peak_of
from training.randomness import quantiles

BINS = 4  # of sigma, equally wide


class Curves:
    """Sums since the last row. Nothing of it is saved: the first row after a resume covers the steps since then.

    Tokens are the DiT's image tokens, of targets and references, and those of the prompts as written (no template, padding or think
    tokens, none dropped). Model FLOPs are those of images that are square and of the batch's mean prompt, its template included.
    """

    def __init__(self, accelerator: Accelerator, model: DeepGen, params: Params, stage: str) -> None:
        self.accelerator, self.model, self.params, self.stage = accelerator, model, params, stage
        self.config: SupervisedConfig = getattr(params, stage)
        self.peak = peak_of(accelerator.device, params.launch.precision)
        self.template = len(prompt_tokens(model.tokenizer, "", [], model.max_prompt_tokens))
        self.reset()

    def reset(self) -> None:
        self.losses: list[tuple[Tensor, Tensor]] = []  # loss, sigma: (B,) each
        self.samples, self.tokens, self.flops, self.since = 0, 0, 0.0, time.monotonic()

    def due(self, step: int) -> bool:
        return step % self.config.log_every == 0 or step == self.config.steps

    def add(self, batch: Batch, loss_B: Tensor) -> None:
        """One micro-batch of this rank."""
        model, config = self.model, self.config
        target = tuple(batch.latents.arrays[0].shape[-2:] if batch.latents else latent_shape(model, batch.target_images.shape[1:3])[1:])
        shift = model.shift_for(target)
        sigmas = sigmas_at(quantiles(config.seed, self.stage, list(batch.positions)), config.timestep_sampling, shift)
        self.losses.append((loss_B.detach(), sigmas))
        sizes = [target, *(latent_shape(model, images.shape[1:3])[1:] for images in batch.reference_images)]
        image_tokens = sum(height * width for height, width in sizes) // model.dit.config.patch_size**2
        written = sum(len(ids) for ids in model.tokenizer(list(batch.prompts)).input_ids)
        self.samples += len(batch.prompts)
        self.tokens += len(batch.prompts) * image_tokens + written
        self.flops += self.model_flops(batch, target, self.template + written // len(batch.prompts))

    def model_flops(self, batch: Batch, target: tuple[int, ...], tokens: int) -> float:
        """Of a micro-batch whose targets' latents are `target` (h, w) and whose prompts have so many tokens."""
        config, cached = self.params.model, batch.latents
        rows = supervised_flops(
            config,
            self.stage,
            round(math.sqrt(target[0] * target[1])) * config.vae.downscale,
            tokens,
            len(batch.reference_images),
            self.config.lora.rank if self.config.lora else None,
            cached_latents=cached is not None,
            cached_vision=cached is not None and bool(cached.vision),
        )
        return len(batch.prompts) * total(rows).model

    def row(self, step: int, trained: dict[str, nn.Parameter]) -> dict[str, float]:
        """The row of a log step, nothing at others. Call it with the gradients of the whole step, before they are clipped, and `reset`
        once the step is taken."""
        if not self.due(step):
            return {}
        values = loss_by_sigma(self.accelerator, self.losses) | gradient_norms(trained)
        counts = torch.tensor([self.samples, self.tokens, self.flops / 1e9], dtype=torch.float32, device=self.accelerator.device)
        samples, tokens, gflops = self.accelerator.reduce(counts, "sum").tolist()
        seconds = max(time.monotonic() - self.since, 1e-9)
        values |= {"samples_per_s": samples / seconds, "tokens_per_s": tokens / seconds}
        values["mfu"] = mfu(1e9 * gflops / self.accelerator.num_processes, seconds, self.peak)
        return values


def loss_by_sigma(accelerator: Accelerator, losses: list[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Mean loss in each bin of sigma that was drawn from, over all ranks; each pair is loss and sigma, (B,) both.

    Losses that are no finite number are left out: their steps were skipped, and `guards.jsonl` has them.
    """
    loss_N = torch.cat([loss for loss, _ in losses]).float()
    bin_N = (torch.cat([sigmas for _, sigmas in losses]) * BINS).long().clamp(max=BINS - 1).to(loss_N.device)
    sums, finite_N = torch.zeros(2, BINS, device=loss_N.device), loss_N.isfinite()
    sums[0].index_add_(0, bin_N, loss_N.where(finite_N, 0.0))
    sums[1].index_add_(0, bin_N, finite_N.float())
    totals, counts = accelerator.reduce(sums, "sum").tolist()
    names = [f"loss_by_sigma/{index / BINS:.2f}-{(index + 1) / BINS:.2f}" for index in range(BINS)]
    return {name: total / count for name, total, count in zip(names, totals, counts, strict=True) if count}


def gradient_norms(trained: dict[str, nn.Parameter]) -> dict[str, float]:
    """L2 norm of the gradients of each part that trains."""
    parts: dict[str, list[Tensor]] = defaultdict(list)
    for name, parameter in trained.items():
        if parameter.grad is not None:
            parts[part_of(name)].append(parameter.grad)
    norms = {part: nn.utils.get_total_norm(gradients) for part, gradients in parts.items()}
    return {f"grad_norm/{part}": float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm) for part, norm in norms.items()}
