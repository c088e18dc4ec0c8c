"""Our code on tensors that the reference implementation computed: `python -m model check-reference FILE...`.

A file holds `weights.*` in published names, inputs and outputs of cases, and the shapes in its metadata; nothing is known beforehand.
"""

import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from model import vlm as qwen
from model.config import VLMConfig
from model.connector import StackedChannelBridging
from model.dit import DeepGenTransformer
from model.published import load_strictly, our_name

TOLERANCE = 1e-5  # of max(1, the largest expected value)


@dataclass(frozen=True)
class Agreement:
    """One output of one case: largest absolute error, and what is allowed."""

    case: str
    output: str
    error: float
    allowed: float

    @property
    def holds(self) -> bool:
        return self.error <= self.allowed  # False for NaN


class Golden:
    """A file's metadata and tensors; `Golden.case(n)` gives the tensors of one case without its prefix."""

    def __init__(self, path: Path) -> None:
        with safe_open(path, "pt") as file:
            self.facts: dict[str, Any] = json.loads(file.metadata()["json"])
            self.tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        self.weights = self.under("weights.")
        self.cases = sorted({int(found[1]) for name in self.tensors if (found := re.match(r"case(\d+)\.", name))})

    def case(self, number: int) -> dict[str, Tensor]:
        return self.under(f"case{number}.")

    def under(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose names begin with `prefix`, without it."""
        return {name.removeprefix(prefix): tensor for name, tensor in self.tensors.items() if name.startswith(prefix)}


def compare(case: str, output: str, ours: Tensor, theirs: Tensor) -> Agreement:
    """Shapes that differ are an infinite error."""
    error = (ours - theirs).abs().max().item() if ours.shape == theirs.shape else float("inf")
    return Agreement(case, output, error, TOLERANCE * max(1.0, theirs.abs().max().item()))


def print_agreements(files: Sequence[Path], check: Callable[[Path], Iterator[Agreement]]) -> None:
    """A line an output of every case; exits with 1 where one differs by more than is allowed."""
    failed = 0
    print(f"{'file':<34} {'case':<12} {'output':<22} {'max error':>10} {'allowed':>10}")
    for path in files:
        for row in check(path):
            failed += not row.holds
            mark = "" if row.holds else "  DIFFERS"
            print(f"{path.name:<34} {row.case:<12} {row.output:<22} {row.error:>10.2e} {row.allowed:>10.2e}{mark}", flush=True)
    if failed:
        sys.exit(f"{failed} outputs differ from the reference by more than is allowed")


@torch.no_grad()
def check_file(path: Path) -> Iterator[Agreement]:
    """Agreements of every output of every case in `path`.

    Raises:
        ValueError: a file of a kind that is not of the DiT, SCB or the condition.
    """
    golden = Golden(path)
    names = golden.case(golden.cases[0]) if golden.cases else {}
    if "velocity.0" in names:
        yield from _check_dit(golden)
    elif "input_ids" in names:
        yield from _check_condition(golden)
    elif "stacked_hidden_states" in names:
        yield from _check_connector(golden)
    else:
        raise ValueError(f"{path}: holds {sorted(names)[:4]}...; expected cases of the DiT, of SCB or of the condition.")


def _check_dit(golden: Golden) -> Iterator[Agreement]:
    dit = DeepGenTransformer(**golden.facts["config"]).eval()
    load_strictly(dit, golden.weights, "the DiT")
    for number in golden.cases:
        case = golden.case(number)
        latents = list(_numbered(case, "latents"))
        references = [list(_numbered(case, f"reference_latents.{row}")) for row in range(len(latents))]
        prompt = case["prompt_embeds"]
        lengths = [prompt.shape[1]] * len(latents)
        velocities = dit.forward_ragged(latents, prompt, case["pooled_prompt_embeds"], case["timestep"], references, lengths)
        for row, velocity in enumerate(velocities):
            yield compare(f"case{number}", f"velocity.{row}", velocity, case[f"velocity.{row}"])


def _connector(golden: Golden, vlm_hidden_size: int, layers: tuple[int, ...], think_tokens: int, padding: str) -> StackedChannelBridging:
    facts = golden.facts
    connector = StackedChannelBridging(
        vlm_hidden_size=vlm_hidden_size,
        stacked_layers=layers,
        num_think_tokens=think_tokens,
        hidden_size=facts["connector"]["hidden_size"],
        intermediate_size=facts["connector"]["intermediate_size"],
        layers=facts["connector"]["num_hidden_layers"],
        heads=facts["connector"]["num_attention_heads"],
        joint_attention_dim=facts["joint_attention_dim"],
        pooled_projection_dim=facts["pooled_projection_dim"],
        padding=padding,
    )
    ours = {our_name(name): tensor for name, tensor in golden.weights.items()}
    parts = {name.removeprefix("connector."): tensor for name, tensor in ours.items() if name.startswith("connector.")}
    load_strictly(connector, parts, "SCB")
    return connector.eval()


def _check_connector(golden: Golden) -> Iterator[Agreement]:
    layers = tuple(range(golden.facts["num_stacked_layers"]))
    connector = _connector(golden, golden.facts["vlm_hidden_size"], layers, 0, "masked")
    for number in golden.cases:
        case = golden.case(number)
        prompt_embeds, pooled = connector(case["stacked_hidden_states"])
        yield compare(f"case{number}", "prompt_embeds", prompt_embeds, case["prompt_embeds"])
        yield compare(f"case{number}", "pooled_prompt_embeds", pooled, case["pooled_prompt_embeds"])


def _check_condition(golden: Golden) -> Iterator[Agreement]:
    """From token ids and pixels: image tokens, positions, hidden states and both conditions, all computed by us."""
    facts = golden.facts
    vlm = _vlm(golden)
    layers = tuple(facts["stacked_layers"])
    connectors = {
        padding: _connector(golden, facts["vlm_text"]["hidden_size"], layers, facts["num_think_tokens"], padding)
        for padding in ("masked", "reference")
    }
    for number in golden.cases:
        case, name = golden.case(number), f"case{number}"
        real = case["attention_mask"].bool()
        padded = not bool(real.all())
        connector = connectors["reference" if padded else "masked"]
        tokens = [ids[row].tolist() for ids, row in zip(case["input_ids"], real, strict=True)]
        images = list(_numbered(case, "reference_pixels"))
        references = _deal(vlm, tokens, images)
        batch = qwen.prepare_prompts(vlm, tokens, references, len(connector.think_tokens), facts["special"]["pad"], left=padded)
        if images:
            assert batch.image_embeds is not None, "images give embeddings"
            yield compare(name, "image_embeds", batch.image_embeds, case["image_embeds"])
        yield compare(name, "position_ids", batch.position_ids.float(), case["position_ids"].float())
        states, mask = qwen.stacked_hidden_states(vlm, batch, connector.think_tokens, layers, train_vlm=False)
        yield compare(name, "stacked_hidden_states", states, case["stacked_hidden_states"])
        prompt_embeds, pooled = connector(states, None if padded else mask)
        yield compare(name, "prompt_embeds", prompt_embeds, case["prompt_embeds"])
        yield compare(name, "pooled_prompt_embeds", pooled, case["pooled_prompt_embeds"])


def _vlm(golden: Golden) -> Any:
    text, vision, special = golden.facts["vlm_text"], golden.facts["vlm_vision"], golden.facts["special"]
    config = VLMConfig.model_validate(
        {
            "hidden_size": text["hidden_size"],
            "intermediate_size": text["intermediate_size"],
            "layers": text["num_hidden_layers"],
            "heads": text["num_attention_heads"],
            "kv_heads": text["num_key_value_heads"],
            "rope_theta": text["rope_theta"],
            "rms_norm_eps": text["rms_norm_eps"],
            "mrope_section": text["rope_scaling"]["mrope_section"],
            "vocab_size": text["vocab_size"],
            "stacked_layers": golden.facts["stacked_layers"],
            "vision": {
                "depth": vision["depth"],
                "hidden_size": vision["hidden_size"],
                "intermediate_size": vision["intermediate_size"],
                "heads": vision["num_heads"],
                "patch_size": vision["patch_size"],
                "spatial_merge_size": vision["spatial_merge_size"],
                "window_size": vision["window_size"],
                "full_attention_blocks": vision["fullatt_block_indexes"],
            },
        }
    )
    token_ids = {
        "<|endoftext|>": special["pad"],
        "<|im_end|>": special["pad"],
        "<|image_pad|>": special["image_token_id"],
        "<|video_pad|>": text["vocab_size"],  # a token that no file holds
        "<|vision_start|>": special["vision_start"],
        "<|vision_end|>": special["vision_end"],
    }
    vlm = qwen.build_vlm(config, token_ids).eval()
    prefix = "lmm."
    load_strictly(vlm, {n.removeprefix(prefix): t for n, t in golden.weights.items() if n.startswith(prefix)}, "the VLM")
    return vlm


def _numbered(tensors: dict[str, Tensor], prefix: str) -> Iterator[Tensor]:
    """prefix.0, prefix.1, ... as far as they go."""
    i = 0
    while f"{prefix}.{i}" in tensors:
        yield tensors[f"{prefix}.{i}"]
        i += 1


def _deal(vlm: Any, tokens: list[list[int]], images: list[Tensor]) -> list[list[Tensor]]:
    """Give each row the images that its image tokens stand for, in order."""
    left, rows = list(images), []
    for ids in tokens:
        wanted, mine = ids.count(vlm.config.image_token_id), []
        while wanted > 0:
            mine.append(left.pop(0))
            wanted -= qwen.image_token_count(vlm, *mine[-1].shape[-2:])
        rows.append(mine)
    return rows
