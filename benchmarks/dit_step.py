"""One training step (forward, backward) of the DiT on rows of mixed shapes, against lists padded into one dense mask.

    python benchmarks/dit_step.py [--json FILE] [--pairs N] [--shapes tiny eighth]

The other side is the straightforward version: every row's target and references are padded to the longest row, prompts to the longest
prompt, and attention runs under a dense (B, 1, L, L) mask with its diagonal set. Both use the same weights; velocities are compared first.
Times are medians of interleaved pairs; memory is what tensors hold at the highest moment of a step.
Goals: mixed rows at least 1.3x faster at no more than 0.7x the memory; uniform rows not slower than 3%.
"""

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import yaml
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from model.config import ModelConfig
from model.dit import DeepGenTransformer, build_dit
from model.joint_block import Batched

ROOT = Path(__file__).resolve().parents[1]
THREADS = 2
FASTER, SLOWER, MEMORY = 1.3, 1.03, 0.7


@dataclass(frozen=True)
class Rows:
    latents: list[Tensor]
    references: list[list[Tensor]]
    prompt_embeds: Tensor
    pooled: Tensor
    timesteps: Tensor
    lengths: list[int]


def build(shape: str) -> tuple[DeepGenTransformer, int, Sequence[int]]:
    """The DiT, rows a batch, and latent sides of images of 256..512 pixels, scaled so that a CPU step takes seconds."""
    torch.manual_seed(0)
    if shape == "tiny":  # 64 pixels stand for 512, f16
        config = ModelConfig.model_validate(yaml.safe_load((ROOT / "presets" / "tiny.yaml").read_text())["model"])
        return build_dit(config.dit, config.vae.latent_channels), 32, (2, 3, 4)
    dit = DeepGenTransformer(  # SD3.5-Medium at an eighth of its width: 24 blocks, 13 of them dual; half the sides, f8
        num_layers=24,
        attention_head_dim=64,
        num_attention_heads=3,
        joint_attention_dim=512,
        caption_projection_dim=192,
        pooled_projection_dim=256,
        pos_embed_max_size=384,
        dual_attention_layers=tuple(range(13)),
        qk_norm="rms_norm",
    )
    return dit, 8, (16, 20, 24, 28, 32)


def draw_rows(dit: DeepGenTransformer, count: int, sides: Sequence[int], mixed: bool) -> Rows:
    """0-2 references, sides and prompt lengths drawn with a fixed seed; or one shape, one reference and one length for all."""
    rng, config = random.Random(7), dit.config

    def latent() -> Tensor:
        height, width = (rng.choice(sides), rng.choice(sides)) if mixed else (sides[-1], sides[-1])
        return torch.randn(config.in_channels, height, width)

    lengths = [rng.randint(24, 64) for _ in range(count)] if mixed else [48] * count
    return Rows(
        latents=[latent() for _ in range(count)],
        references=[[latent() for _ in range(rng.randint(0, 2) if mixed else 1)] for _ in range(count)],
        prompt_embeds=torch.randn(count, max(lengths), config.joint_attention_dim),
        pooled=torch.randn(count, config.pooled_projection_dim),
        timesteps=torch.rand(count) * 1000,
        lengths=lengths,
    )


def ours(dit: DeepGenTransformer, rows: Rows) -> list[Tensor]:
    return dit.forward_ragged(rows.latents, rows.prompt_embeds, rows.pooled, rows.timesteps, rows.references, rows.lengths)


class Dense(Batched):
    """Both attentions under dense masks."""

    def __init__(self, joint: Tensor, image: Tensor) -> None:
        super().__init__(joint)
        object.__setattr__(self, "image", image)

    def attend_in_image(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=self.image)


def dense(dit: DeepGenTransformer, rows: Rows) -> list[Tensor]:
    """Lists padded into one batch, an outer product of real tokens as mask."""
    embedded = [
        torch.cat([dit.pos_embed(t[None]) for t in (target, *references)], dim=1)[0]
        for target, references in zip(rows.latents, rows.references, strict=True)
    ]
    image = torch.nn.utils.rnn.pad_sequence(embedded, batch_first=True)
    real_image = torch.arange(image.shape[1]) < torch.tensor([len(tokens) for tokens in embedded])[:, None]
    real_prompt = torch.arange(rows.prompt_embeds.shape[1]) < torch.tensor(rows.lengths)[:, None]

    def outer(real: Tensor) -> Tensor:
        return ((real[:, :, None] & real[:, None, :]) | torch.eye(real.shape[1], dtype=torch.bool))[:, None]

    layout = Dense(outer(torch.cat([real_image, real_prompt], dim=1)), outer(real_image))
    temb = dit.time_text_embed(rows.timesteps, rows.pooled)
    image = dit.run_blocks(image, dit.context_embedder(rows.prompt_embeds), temb, layout)
    patches = dit.read_out(image, temb, layout)
    return [dit.unpatchify(patches[i : i + 1], *target.shape[-2:])[0] for i, target in enumerate(rows.latents)]


Version = Callable[[DeepGenTransformer, Rows], list[Tensor]]
VERSIONS: dict[str, Version] = {"ours": ours, "dense": dense}


def step(version: Version, dit: DeepGenTransformer, rows: Rows) -> None:
    loss = torch.stack([velocity.square().mean() for velocity in version(dit, rows)]).mean()
    loss.backward()
    dit.zero_grad(set_to_none=True)


def peak_mib(version: Version, dit: DeepGenTransformer, rows: Rows) -> float:
    """MiB that tensors hold at the highest moment of one step, beyond what they held before it: a running sum of the allocator's events."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        step(version, dit, rows)
    held, highest = 0, 0
    for event in sorted(record.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            highest = max(highest, held)
    return highest / 2**20


def compare(shape: str, mixed: bool, pairs: int) -> dict:
    dit, count, sides = build(shape)
    rows = draw_rows(dit, count, sides, mixed)
    with torch.no_grad():
        for mine, other in zip(ours(dit, rows), dense(dit, rows), strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-4)
    times: dict[str, list[float]] = {name: [] for name in VERSIONS}
    for pair in range(pairs + 1):  # the first warms up
        for name in VERSIONS if pair % 2 else reversed(VERSIONS):
            began = time.perf_counter()
            step(VERSIONS[name], dit, rows)
            if pair:
                times[name].append(time.perf_counter() - began)
    seconds = {name: statistics.median(values) for name, values in times.items()}
    memory = {name: peak_mib(version, dit, rows) for name, version in VERSIONS.items()}
    speedup, share = seconds["dense"] / seconds["ours"], memory["ours"] / memory["dense"]
    met = (speedup >= FASTER and share <= MEMORY) if mixed else speedup >= 1 / SLOWER
    return {
        "shape": shape,
        "rows": "mixed" if mixed else "uniform",
        "ours_s": seconds["ours"],
        "dense_s": seconds["dense"],
        "speedup": speedup,
        "ours_mib": memory["ours"],
        "dense_mib": memory["dense"],
        "memory_share": share,
        "goal": f">= {FASTER}x, <= {MEMORY} memory" if mixed else f">= {1 / SLOWER:.2f}x",
        "met": met,
    }


def main() -> None:
    torch.set_num_threads(THREADS)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--shapes", nargs="+", default=["tiny", "eighth"], choices=["tiny", "eighth"])
    arguments = parser.parse_args()
    print(f"{'shape':<8}{'rows':<9}{'ours s':>8}{'dense s':>9}{'speedup':>9}{'ours MiB':>10}{'dense MiB':>11}{'share':>7}  goal")
    results = []
    for shape in arguments.shapes:
        for mixed in (True, False):
            row = compare(shape, mixed, arguments.pairs)
            results.append(row)
            print(
                f"{row['shape']:<8}{row['rows']:<9}{row['ours_s']:>8.3f}{row['dense_s']:>9.3f}{row['speedup']:>8.2f}x{row['ours_mib']:>10.0f}"
                f"{row['dense_mib']:>11.0f}{row['memory_share']:>7.2f}  {row['goal']}: {'met' if row['met'] else 'MISSED'}",
                flush=True,
            )
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))
    sys.exit(0 if all(row["met"] for row in results) else 1)


if __name__ == "__main__":
    main()
