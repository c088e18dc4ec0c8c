"""A DeepGen of a few thousand weights, with a tokenizer of a few words."""

from pathlib import Path

import pytest
import torch
import yaml

from model.config import ModelConfig
from model.deepgen import DeepGen, build_deepgen
from training.tokenizer import build_tokenizer

REPO = Path(__file__).parents[2]
WORDS = ["red", "green", "circle", "square", "make", "remove", "left", "of"]


def tiny_config() -> ModelConfig:
    return ModelConfig.model_validate(yaml.safe_load((REPO / "presets" / "tiny.yaml").read_text())["model"])


@pytest.fixture
def model() -> DeepGen:
    """Fresh weights; the zero-initialised heads are given some, so that conditions differ."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    made = build_deepgen(tiny_config(), build_tokenizer(WORDS, 128)).eval()
    for head in (made.connector.projector_2, made.connector.projector_3):
        torch.nn.init.normal_(head.weight, std=0.1)
    return made


@pytest.fixture
def references() -> tuple[torch.Tensor, ...]:
    return (torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1,)
