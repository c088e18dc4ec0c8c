"""Compiled blocks compute what plain ones do."""

import copy
import os
import shutil
from types import SimpleNamespace

import pytest
import torch

from model.config import ModelConfig
from model.connector import Encoder
from model.dit import build_dit
from training.sharding import compile_blocks

from .conftest import nano_params

compiler = os.environ.get("CXX", "g++")
needs_compiler = pytest.mark.skipif(shutil.which(compiler) is None, reason="no C++ compiler")


@pytest.mark.slow
@needs_compiler
def test_compiled_blocks_have_the_velocity_and_the_gradients_of_plain_ones():
    torch.manual_seed(0)
    params = nano_params()["model"]
    params["dit"] |= {"layers": 1, "dual_attention_layers": 0}
    config = ModelConfig.model_validate(params)
    dit = build_dit(config.dit, config.vae.latent_channels)
    encoder = Encoder(64, 128, 1, 2)
    compiled, compiled_encoder = copy.deepcopy(dit), copy.deepcopy(encoder)
    compile_blocks(SimpleNamespace(dit=compiled, connector=SimpleNamespace(connector=compiled_encoder)))  # type: ignore[arg-type]
    latents, prompt, pooled = torch.randn(2, 16, 8, 8), torch.randn(2, 5, 64), torch.randn(2, 32)
    sides = []
    for transformer, reader in ((dit, encoder), (compiled, compiled_encoder)):
        velocity = transformer(latents, reader(prompt, None), pooled, torch.tensor([100.0, 700.0]))
        velocity.square().mean().backward()
        gradients = {name: p.grad for module in (transformer, reader) for name, p in module.named_parameters() if p.grad is not None}
        sides.append((velocity.detach(), gradients))
    torch.testing.assert_close(sides[1][0], sides[0][0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sides[1][1], sides[0][1], rtol=1e-4, atol=1e-5)
    counters = torch._dynamo.utils.counters["stats"]
    assert counters["unique_graphs"] >= 2, "nothing was compiled"
