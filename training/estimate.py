"""What training takes on given GPUs: hours, samples/s, memory a rank and cost by stage, each figure with its formula and basis."""

import argparse
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from data.planning import Rate, Row
from model.config import ModelConfig
from model.flops import Flops, image_tokens, mfu, rollout_flops, supervised_flops, total, vision_tokens
from model.lora import add_lora
from model.parts import TRAINED
from model.summary import build_on_meta, count_parts
from runtime.exits import Plain
from runtime.files import write_json
from runtime.params import STAGES, Params
from training.config import SupervisedConfig

GIB = 2**30
FP32 = 4  # bytes
SHARDINGS = ("ddp", "zero2", "fsdp2")


class EstimateRefused(Plain):
    """The figures asked for don't exist: an unknown GPU or rate, or a batch that does not divide."""


@dataclass(frozen=True)
class GPU:
    """As published: dense bf16 peak in FLOP/s, memory in bytes, memory bandwidth in bytes/s."""

    peak: float
    memory: float
    bandwidth: float


GPUS = {
    "a100": GPU(312e12, 80e9, 2.039e12),  # SXM, 80 GB
    "h100": GPU(989.4e12, 80e9, 3.35e12),  # SXM
    "h200": GPU(989.4e12, 141e9, 4.8e12),  # SXM
}

ASSUMED = {
    "utilisation_alignment": Rate(0.35, "of 1", "FLOPs done / (seconds x peak); measure it with --measure"),
    "utilisation_sft": Rate(0.40, "of 1", "the goal on one H200; measure it with --measure"),
    "utilisation_mr_grpo": Rate(0.35, "of 1", "measure it with --measure"),
    "bandwidth_share": Rate(0.8, "of 1", "of the published memory bandwidth that copies reach"),
    "price_per_gpu_hour": Rate(3.0, "USD", "a placeholder, nobody's offer: put your own into --rates"),
}


def read_rates(path: Path) -> dict[str, float]:
    """The `rates` of a JSON file, any of ASSUMED's keys; what else the file holds is its own.

    Raises:
        EstimateRefused: naming the file, the key or value that can't be used, and what is allowed.
    """
    try:
        held = json.loads(path.read_text())
    except ValueError as error:
        raise EstimateRefused(f"{path} is not JSON: {error}") from error
    rates = held.get("rates") if isinstance(held, dict) else None
    if not isinstance(rates, dict) or set(rates) - set(ASSUMED):
        unknown = sorted(set(rates) - set(ASSUMED)) if isinstance(rates, dict) else "no rates"
        raise EstimateRefused(f'{path}: holds {unknown}; expected {{"rates": {{name: number}}}} with any of {list(ASSUMED)}.')
    for key, value in rates.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise EstimateRefused(f"{path}: rates.{key} is {value!r}; expected a number above 0, in {ASSUMED[key].unit}.")
    return {key: float(value) for key, value in rates.items()}


# --- work ---------------------------------------------------------------------------------------------------------------------------


def references_of(task: str) -> int:
    return 1 if task == "image_edit" else 0


def task_shares(params: Params, stage: str) -> dict[str, float]:
    """Share of each task in what the stage reads."""
    ratio = params.mixture[stage].ratio  # type: ignore[index]
    return {task: times / sum(ratio.values()) for task, times in ratio.items() if times > 0}


def reads_latents(params: Params, stage: str, task: str) -> bool:
    """Whether every part of the task comes with its latents, so that the autoencoder is skipped."""
    parts = [name for name in params.mixture[stage].parts if params.data.parts[name].task == task]  # type: ignore[index]
    return set(parts) <= set(params.latents.parts)


def task_flops(params: Params, stage: str, task: str, prompt_tokens: int) -> list[Flops]:
    """A sample of one task of alignment or sft."""
    section: SupervisedConfig = getattr(params, stage)
    return supervised_flops(
        params.model,
        stage,
        params.data.image_size,
        prompt_tokens,
        references_of(task),
        section.lora.rank if section.lora else None,
        reads_latents(params, stage, task),
        params.latents.vision and reads_latents(params, stage, task),
        params.launch.gradient_checkpointing,
    )


def stage_flops(params: Params, stage: str, prompt_tokens: int) -> list[Flops]:
    """A sample of the stage, tasks mixed by their ratio; of mr_grpo an image."""
    if stage == "mr_grpo":
        config = params.mr_grpo
        return rollout_flops(
            params.model,
            params.data.image_size,
            prompt_tokens,
            config.group_size,
            config.rollout_steps,
            config.stochastic_steps,
            config.kl_weight > 0,
            config.auxiliary_per_image,
            params.launch.gradient_checkpointing,
        )
    rows: dict[str, Flops] = {}
    for task, share in task_shares(params, stage).items():
        for row in task_flops(params, stage, task, prompt_tokens):
            before = rows.get(row.part, Flops(row.part, 0, 0))
            forward, backward = before.forward + share * row.forward, before.backward + share * row.backward
            rows[row.part] = Flops(row.part, forward, backward, before.recomputed + share * row.recomputed)
    return list(rows.values())


def batch_of(params: Params, stage: str) -> tuple[int, int]:
    """Samples (images of mr_grpo) a step over all ranks, and a micro-batch on one."""
    if stage == "mr_grpo":
        return params.mr_grpo.prompts_per_step * params.mr_grpo.group_size, params.mr_grpo.micro_batch_size
    section: SupervisedConfig = getattr(params, stage)
    return section.batch_size, section.micro_batch_size


# --- memory -------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Weights:
    """Parameters of a stage: present and not trained, trained, and those of the largest block."""

    frozen: int
    trained: int
    largest_block: int


def weights_of(params: Params, stage: str) -> Weights:
    """Counted on a model without storage."""
    model = build_on_meta(params.model)
    lora = params.sft.lora if stage == "sft" else None
    if lora is not None:
        with torch.device("meta"):
            add_lora(model, lora.rank, lora.alpha, lora.dropout)
    counts = count_parts(model)
    trained = sum(counts[part] for part in TRAINED[stage])
    blocks = [*model.dit.transformer_blocks, *model.vlm.model.language_model.layers, *model.connector.connector.layers]
    frozen = sum(counts.values()) - trained
    if stage == "mr_grpo" and params.mr_grpo.kl_weight:
        frozen += counts["dit"]  # the reference
    return Weights(frozen, trained, max(sum(p.numel() for p in block.parameters()) for block in blocks))


def activation_elements(config: ModelConfig, stage: str, side: int, prompt_tokens: int, references: int, checkpointing: bool) -> float:
    """Numbers that one sample keeps for its backward pass.

    A block keeps about so many widths a token: DiT 24 (its second attention 9 more), language model 13 and 4 of its inner width, connector
    9 and 2 of its inner width; a frozen part two thirds of it, for its weights need no gradient. With checkpointing a block keeps its
    input, and one block at a time keeps all.
    """
    vlm, scb, dit = config.vlm, config.connector, config.dit
    P, T = prompt_tokens + references * vision_tokens(vlm, side), scb.num_think_tokens
    N, M = (1 + references) * image_tokens(config, side), P + T
    D = dit.heads * dit.head_dim
    reading = 0 if stage == "mr_grpo" else P + T if stage == "sft" else T  # tokens of the language model with a gradient
    frozen = 1.0 if "dit" in TRAINED[stage] else 2 / 3
    per_layer = frozen * reading * (13 * vlm.hidden_size + 4 * vlm.intermediate_size)
    per_block, second = frozen * (N + M) * 24 * D, frozen * N * 9 * D
    bridge = 0 if stage == "mr_grpo" else scb.layers * M * (9 * scb.hidden_size + 2 * scb.intermediate_size)
    bridge += 0 if stage == "mr_grpo" else M * len(vlm.stacked_layers) * vlm.hidden_size
    if checkpointing:
        inputs = vlm.layers * reading * vlm.hidden_size + dit.layers * (N + M) * D
        return inputs + max(per_layer, per_block + second) + bridge
    return vlm.layers * per_layer + dit.layers * per_block + dit.dual_attention_layers * second + bridge


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank."""

    weights: float
    gradients: float
    moments: float
    average: float
    activations: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.moments + self.average + self.activations


def memory_of(params: Params, stage: str, weights: Weights, ranks: int, sharding: str, prompt_tokens: int) -> Memory:
    """Of a rank under `sharding`: `ddp` (all on every rank), `zero2` (gradients and moments divided, weights whole: fsdp2 that doesn't
    reshard) or `fsdp2` (everything divided, and two of the largest blocks gathered).

    Weights are float32, frozen ones too; with bf16 autocast keeps a copy of those that train until the step is over.
    """
    wide = params.launch.precision == "bf16"
    compute = 2 if wide else FP32
    copies = 2 if wide else 0
    states = 1.0 if sharding == "ddp" else 1 / ranks
    count = weights.frozen + weights.trained
    if sharding == "fsdp2":
        held = states * FP32 * count + 2 * (FP32 + copies) * weights.largest_block
    else:
        held = FP32 * count + copies * weights.trained
    whole = states if sharding == "fsdp2" else 1.0
    references = max(references_of(task) for task in task_shares(params, stage))
    elements = activation_elements(
        params.model, stage, params.data.image_size, prompt_tokens, references, params.launch.gradient_checkpointing
    )
    ema = whole * FP32 * weights.trained if getattr(params, stage).ema_decay else 0.0
    activations = batch_of(params, stage)[1] * elements * compute
    return Memory(held, states * FP32 * weights.trained, states * 2 * FP32 * weights.trained, ema, activations)


# --- figures ------------------------------------------------------------------------------------------------------------------------


def estimate_stage(
    params: Params, stage: str, gpu: GPU, gpus: int, rates: Mapping[str, float], prompt_tokens: int, sharding: str = "zero2"
) -> list[Row]:
    """The figures of one stage on so many GPUs.

    rates: measured ones, by ASSUMED's keys; what is absent is assumed, and each row's basis says so.

    Raises:
        EstimateRefused: the batch does not divide into micro-batches on so many GPUs.
    """
    batch, micro = batch_of(params, stage)
    if gpus < 1 or batch % (gpus * micro):
        raise EstimateRefused(f"--gpus {gpus}: {stage} has {batch // micro} micro-batches a step; expected a divisor of that number.")
    rate = {key: assumed.value for key, assumed in ASSUMED.items()} | dict(rates)
    utilisation, steps = f"utilisation_{stage}", getattr(params, stage).steps
    flops, weights = total(stage_flops(params, stage, prompt_tokens)), weights_of(params, stage)
    memory = {name: memory_of(params, stage, weights, gpus, name, prompt_tokens) for name in SHARDINGS}
    work = flops.done * batch / gpus
    passes = batch // (gpus * micro) * (4 if params.launch.gradient_checkpointing else 3)
    if stage == "mr_grpo":
        passes = passes * params.mr_grpo.stochastic_steps + batch // (gpus * micro) * params.mr_grpo.rollout_steps
    width = 2 if params.launch.precision == "bf16" else FP32
    optimizer = 7 * FP32 * weights.trained / (gpus if sharding != "ddp" else 1)
    moved = passes * width * (weights.frozen + weights.trained) + optimizer + 2 * batch / gpus / micro * memory[sharding].activations
    computing, moving = work / (gpu.peak * rate[utilisation]), moved / (gpu.bandwidth * rate["bandwidth_share"])
    seconds = max(computing, moving)
    hours = steps * seconds / 3600
    unit, both = ("images" if stage == "mr_grpo" else "samples"), (utilisation, "bandwidth_share")

    def row(name: str, value: float, unit: str, formula: str, *uses: str) -> Row:
        missing = [key for key in uses if key not in rates]
        basis = "counted" if not uses else "measured" if not missing else f"assumed {', '.join(missing)}"
        return Row(f"{stage}: {name}", value, unit, formula, basis)

    rows = [
        row("forward", flops.forward / 1e12, "TFLOP", f"one of the {unit}, tasks by their ratio; {prompt_tokens} text tokens a prompt"),
        row("backward", flops.backward / 1e12, "TFLOP", "trained 2 x forward, frozen on the way 1 x (its attention 2 x), the rest 0"),
        row("recomputed", flops.recomputed / 1e12, "TFLOP", "gradient checkpointing: one more forward of what has a backward"),
        row("a step of a GPU", work / 1e12, "TFLOP", f"(forward + backward + recomputed) x {batch} {unit} / {gpus} GPUs"),
        row("a step of a GPU", moved / 1e9, "GB moved", f"{passes} passes over the weights + optimizer + 2 x activations ({sharding})"),
        row("computing", computing, "s", f"TFLOP / (peak x {utilisation})", utilisation),
        row("moving", moving, "s", "GB / (bandwidth x bandwidth_share)", "bandwidth_share"),
        row("speed", batch / seconds, f"{unit}/s", f"{batch} / max(computing, moving); exchange between GPUs not counted", *both),
        row("MFU", mfu(flops.model * batch / gpus, seconds, gpu.peak), "of 1", "(forward + backward) / (seconds x peak)", *both),
        row("time", hours, "h", f"{steps} steps x max(computing, moving)", *both),
        row("cost", hours * gpus * rate["price_per_gpu_hour"], "USD", f"h x {gpus} x price_per_gpu_hour", *both, "price_per_gpu_hour"),
    ]
    kept = "4 B + 2 B of a bf16 copy" if width == 2 else "4 B"
    divided = {"ddp": "nothing divided", "zero2": "gradients, moments / ranks", "fsdp2": "all / ranks, two blocks gathered"}
    kept_bytes = 3 * FP32 * weights.trained + (FP32 * weights.trained if memory["ddp"].average else 0)
    folders = getattr(params, stage).keep_checkpoints + 1
    disk = folders * kept_bytes + FP32 * (weights.frozen + weights.trained)
    rows.append(row("disk", disk / 1e9, "GB", f"{folders} checkpoints of trained weights, moments and average, and one whole model"))
    for name, held in memory.items():
        parts = {"weights": held.weights, "gradients": held.gradients, "moments": held.moments, "average": held.average}
        shown = " + ".join(f"{part} {value / GIB:.3g}" for part, value in (parts | {"activations": held.activations}).items() if value)
        fits = "fits" if held.total < 0.9 * gpu.memory else "does NOT fit 0.9 of the GPU's memory"
        formula = f"{shown}; trained {kept}, 4 B gradient, 8 B moments, frozen 4 B; {divided[name]}; {fits}"
        rows.append(Row(f"{stage}: memory, {name}", held.total / GIB, "GiB", formula, "counted, activations by a stated rule"))
    return rows


def print_rows(rows: list[Row], rates: Mapping[str, float]) -> None:
    """A line a figure, then the rates that went into them."""
    for row in rows:
        value = f"{row.value:,.0f}" if row.value >= 1000 else f"{row.value:,.3g}"
        print(f"{row.name:28}{value:>12} {row.unit:10}= {row.formula}  [{row.basis}]")
    print(f"\n{'rate':24}{'value':>12}  unit")
    for key, assumed in ASSUMED.items():
        origin = "measured or given" if key in rates else f"assumed: {assumed.why}"
        print(f"{key:24}{rates.get(key, assumed.value):12.4g}  {assumed.unit:8}{origin}")


def run_estimate(params: Params, arguments: argparse.Namespace) -> None:
    """The command: print the figures, or with --measure time this machine and print predicted against measured."""
    if arguments.prompt_tokens < 3:
        raise EstimateRefused(f"--prompt-tokens {arguments.prompt_tokens}: expected at least 3.")
    if arguments.image_size is not None:
        multiple = params.model.vae.downscale * params.model.dit.patch_size
        if arguments.image_size < multiple or arguments.image_size % multiple:
            raise EstimateRefused(f"--image-size {arguments.image_size}: expected a multiple of {multiple}, above 0.")
        # Not checked as a recipe: the preset's parts may be drawn at one size only, and the question is what others would take.
        params = params.model_copy(update={"data": params.data.model_copy(update={"image_size": arguments.image_size})})
    rates = read_rates(arguments.rates) if arguments.rates else {}
    if arguments.measure:
        from training.measure import measure_stages

        found = measure_stages(params, arguments.prompt_tokens)
        text: dict[str, Any] = {"rates": {f"utilisation_{stage}": row["utilisation"] for stage, row in found["stages"].items()}} | found
        print(json.dumps(text, indent=1))
        if arguments.out:
            write_json(arguments.out, text)
        return
    if arguments.gpu not in GPUS:
        raise EstimateRefused(f"--gpu {arguments.gpu}: unknown; allowed: {', '.join(GPUS)}.")
    gpu, gpus = GPUS[arguments.gpu], params.launch.processes if arguments.gpus is None else arguments.gpus
    rows = [row for stage in STAGES for row in estimate_stage(params, stage, gpu, gpus, rates, arguments.prompt_tokens)]
    hours = sum(row.value for row in rows if row.name.endswith(": time"))
    print(
        f"{params.preset} on {gpus} x {arguments.gpu}: {gpu.peak / 1e12:.4g} TFLOP/s bf16 dense, {gpu.memory / 1e9:.4g} GB, "
        f"{gpu.bandwidth / 1e12:.4g} TB/s each, as published; images of {params.data.image_size} pixels a side\n"
    )
    print_rows(rows, rates)
    if arguments.json:
        price = rates.get("price_per_gpu_hour", ASSUMED["price_per_gpu_hour"].value)
        write_json(arguments.json, {"gpu": arguments.gpu, "gpus": gpus, "price_per_gpu_hour": price, "rows": [asdict(row) for row in rows]})
    print(f"\nall stages: {hours:,.3g} h, {hours * gpus:,.4g} GPU-h")
