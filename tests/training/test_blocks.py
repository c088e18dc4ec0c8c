"""Compiled and checkpointed blocks compute what plain ones do."""

import copy
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from data.loader import Loader
from model.config import ModelConfig
from model.connector import Encoder, EncoderLayer
from model.dit import build_dit
from runtime.files import read_json
from training.sharding import checkpoint_activations, compile_blocks
from training.stages import freeze_for
from training.supervised import batch_loss, load_parent

from .conftest import begin, nano_params


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


def test_checkpointed_activations_keep_less_and_give_the_same_losses_and_gradients(built: Path):
    """SFT with LoRA and its dropout: the layers' second run draws the masks of the first."""

    def kept_and_gradients(checkpointing: bool) -> tuple[int, Tensor, dict[str, Tensor]]:
        with begin(built, "latents") as run:
            model = load_parent(run, "alignment")
            trained = freeze_for(model, "sft", run.params.sft.lora)
            assert run.params.sft.lora is not None and run.params.sft.lora.dropout > 0
            torch.manual_seed(1)
            for head in (model.connector.projector_2, model.connector.projector_3):
                torch.nn.init.normal_(head.weight, std=0.5)  # fresh ones are zero, and no gradient passes
            model.train()
            if checkpointing:
                checkpoint_activations(model)
            mixture = read_json(built / "outputs" / "mixture" / "sft.json")
            batch = next(batch for batch in Loader(mixture, built / "outputs" / "shards", 4) if batch.task == "image_edit")
            kept: dict[int, int] = {}

            def note(tensor: Tensor) -> Tensor:
                kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
                return tensor

            torch.manual_seed(0)
            with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
                loss_B = batch_loss(model, model, batch, run.params.sft, "sft")
            loss_B.mean().backward()
            return sum(kept.values()), loss_B.detach(), {name: p.grad for name, p in trained.items() if p.grad is not None}

    plain, checkpointed = kept_and_gradients(False), kept_and_gradients(True)
    assert checkpointed[0] < 0.7 * plain[0]
    torch.testing.assert_close(checkpointed[1], plain[1], rtol=0, atol=0)
    assert any("lora" in name and gradient.any() for name, gradient in plain[2].items())
    torch.testing.assert_close(checkpointed[2], plain[2], rtol=1e-5, atol=1e-8)
