"""Ours against tensors that the reference implementation computed (tests/golden)."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from model.connector import StackedChannelBridging
from model.dit import DeepGenTransformer

GOLDEN = Path(__file__).parents[1] / "golden"


def load(name: str) -> tuple[dict, dict[str, torch.Tensor]]:
    with safe_open(GOLDEN / f"{name}_reference.safetensors", "pt") as file:
        return json.loads(file.metadata()["json"]), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def assert_agrees(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert (ours - theirs).abs().max() <= 1e-5 * max(1.0, theirs.abs().max().item())


@pytest.mark.parametrize("case", [0, 1])
def test_the_connector_computes_what_the_reference_does(case: int):
    facts, tensors = load("scb")
    shape = facts["connector"]
    connector = StackedChannelBridging(
        vlm_hidden_size=facts["vlm_hidden_size"],
        stacked_layers=tuple(range(facts["num_stacked_layers"])),
        num_think_tokens=0,
        hidden_size=shape["hidden_size"],
        intermediate_size=shape["intermediate_size"],
        layers=shape["num_hidden_layers"],
        heads=shape["num_attention_heads"],
        joint_attention_dim=facts["joint_attention_dim"],
        pooled_projection_dim=facts["pooled_projection_dim"],
    )
    weights = {key.removeprefix("weights."): value for key, value in tensors.items() if key.startswith("weights.")}
    connector.load_state_dict(weights | {"think_tokens": connector.think_tokens})
    with torch.no_grad():
        prompt_embeds, pooled = connector(tensors[f"case{case}.stacked_hidden_states"])
    assert_agrees(prompt_embeds, tensors[f"case{case}.prompt_embeds"])
    assert_agrees(pooled, tensors[f"case{case}.pooled_prompt_embeds"])


@pytest.mark.parametrize("case", [0, 1, 2, 3])
def test_the_dit_computes_what_the_reference_does(case: int):
    facts, tensors = load("dit")
    dit = DeepGenTransformer(**facts["config"]).eval()
    dit.load_state_dict({key.removeprefix("weights."): value for key, value in tensors.items() if key.startswith("weights.")})
    entry = facts["cases"][case]
    for row in range(len(entry["sizes"])):  # sizes differ within a case, so row by row
        references = entry.get("refs", [[]] * len(entry["sizes"]))[row]
        with torch.no_grad():
            velocity = dit(
                tensors[f"case{case}.latents.{row}"][None],
                tensors[f"case{case}.prompt_embeds"][row : row + 1],
                tensors[f"case{case}.pooled_prompt_embeds"][row : row + 1],
                tensors[f"case{case}.timestep"][row : row + 1],
                tuple(tensors[f"case{case}.reference_latents.{row}.{j}"][None] for j in range(len(references))),
            )
        assert_agrees(velocity[0], tensors[f"case{case}.velocity.{row}"])
