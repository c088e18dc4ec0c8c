"""Compiled blocks compute what plain ones do."""

import copy
import os
import shutil
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from model.config import ModelConfig
from model.connector import Encoder, EncoderLayer
from model.dit import build_dit
from training.sharding import compile_blocks

from .conftest import nano_params


def step(dit: Any, encoder: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Velocity of a reading of made-up prompts, and every gradient."""
    draw = torch.Generator().manual_seed(1)
    latents, prompt, pooled = (torch.randn(*shape, generator=draw) for shape in ((2, 16, 8, 8), (2, 5, 64), (2, 32)))
    velocity = dit(latents, encoder(prompt, None), pooled, torch.tensor([100.0, 700.0]))
    velocity.square().mean().backward()
    return velocity.detach(), {name: p.grad for part in (dit, encoder) for name, p in part.named_parameters() if p.grad is not None}


@pytest.mark.slow
def test_blocks_are_captured_whole_and_have_the_velocity_and_gradients_of_plain_ones():
    torch.manual_seed(0)
    config = ModelConfig.model_validate(nano_params()["model"])
    plain = build_dit(config.dit, config.vae.latent_channels), Encoder(64, 128, 2, 2)
    compiled = copy.deepcopy(plain)
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    model: Any = SimpleNamespace(dit=compiled[0], connector=SimpleNamespace(connector=compiled[1]))
    compile_blocks(model, backend="aot_eager")
    (velocity, gradients), (expected, their) = step(*compiled), step(*plain)
    torch.testing.assert_close(velocity, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradients, their, rtol=1e-4, atol=1e-6)
    assert counters["stats"]["unique_graphs"] >= 2 and not counters["graph_break"]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="no C++ compiler")
def test_a_block_is_compiled_on_a_cpu():
    torch.manual_seed(0)
    layer = EncoderLayer(16, 32, 2)
    compiled = copy.deepcopy(layer)
    compiled.compile()
    x = torch.randn(2, 4, 16)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, None), layer(x, None), rtol=1e-5, atol=1e-5)
