"""What a preset's model weighs, without allocating it: `python -m model summary --preset deepgen-5b`."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml

from model.config import ModelConfig
from model.deepgen import DeepGen, build_connector
from model.dit import build_dit
from model.lora import add_lora
from model.parts import BELONGS, TRAINED, part_of
from model.prompts import SPECIAL_TOKENS
from model.vae import build_vae
from model.vlm import build_vlm

BF16, FP32 = 2, 4  # bytes


def build_on_meta(config: ModelConfig) -> DeepGen:
    """Every part with shapes and no storage; its tokenizer is absent."""
    with torch.device("meta"):
        return DeepGen(
            vlm=build_vlm(config.vlm, {token: i for i, token in enumerate(SPECIAL_TOKENS)}),
            connector=build_connector(config),
            dit=build_dit(config.dit, config.vae.latent_channels),
            vae=build_vae(config.vae),
            tokenizer=None,  # type: ignore[arg-type]  # no text is read
            timestep_shift=config.timestep_shift,
            max_prompt_tokens=config.vlm.max_prompt_tokens,
        )


def count_parts(model: DeepGen) -> dict[str, int]:
    """Parameters by part."""
    counts = dict.fromkeys(BELONGS, 0)
    for name, parameter in model.named_parameters():
        counts[part_of(name)] += parameter.numel()
    return counts


def training_bytes(trained: int, frozen: int) -> int:
    """Weights and gradients in bf16, and for what trains a float32 copy and AdamW's two moments; activations are not in it."""
    return BF16 * frozen + (BF16 + BF16 + 3 * FP32) * trained


def summarise(path: Path) -> Iterator[str]:
    """Lines of the table for a params file or preset."""
    raw: dict[str, Any] = yaml.safe_load(path.read_text())
    model = build_on_meta(ModelConfig.model_validate(raw["model"]))
    lora = raw.get("sft", {}).get("lora")
    if lora is not None:
        with torch.device("meta"):
            add_lora(model, **lora)
    counts = count_parts(model)
    scb = counts["connector"] + counts["think_tokens"]
    yield f"{'part':<13} {'parameters':>15}  trains in"
    for part, count in counts.items():
        stages = [stage for stage, parts in TRAINED.items() if part in parts]
        yield f"{part:<13} {count:>15,}  {', '.join(stages) or '-'}"
    yield f"{'SCB':<13} {scb:>15,}  connector and think tokens"
    total = sum(counts.values()) - counts["vlm_lora"]
    yield f"{'total':<13} {total:>15,}  without LoRA"
    yield ""
    yield f"{'':<13} {'trained':>15}  bf16 weights, gradients and AdamW, without activations"
    yield f"{'inference':<13} {'-':>15}  {BF16 * total / 2**30:.1f} GiB (weights alone)"
    for stage, parts in TRAINED.items():
        present = total + (counts["vlm_lora"] if "vlm_lora" in parts else 0)
        trained = sum(counts[part] for part in parts)
        yield f"{stage:<13} {trained:>15,}  {training_bytes(trained, present - trained) / 2**30:.1f} GiB"
