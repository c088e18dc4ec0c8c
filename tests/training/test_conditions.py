"""What each prompt tells the DiT is computed once, and alone."""

from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from data.loader import Batch, Loader
from model.deepgen import DeepGen
from model.weights import load_foundation
from runtime.files import read_json
from runtime.params import load_params
from training.conditions import Conditions, size_of


@pytest.fixture(scope="module")
def model(built: Path) -> DeepGen:
    torch.manual_seed(0)
    model = load_foundation(built / "outputs" / "foundation" / "model", load_params(built / "params.yaml").model).eval()
    with torch.no_grad():  # a fresh connector says nothing at all
        for parameter in model.connector.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def batches(built: Path) -> dict[str, Batch]:
    loader = Loader(read_json(built / "outputs" / "mixture" / "sft.json"), built / "outputs" / "shards", 4)
    return {batch.task: batch for batch in islice(loader, 6)}


@pytest.mark.parametrize("task", ["text_to_image", "image_edit"])
def test_a_prompt_is_read_once_and_what_it_tells_does_not_depend_on_its_neighbours(model: DeepGen, batches: dict[str, Batch], task: str):
    batch, conditions = batches[task], Conditions(model)
    whole = conditions.of(batch, range(4))
    pictures = batch.reference_images[0] if batch.reference_images else batch.prompts
    assert conditions.computed == len({(prompt, str(picture)) for prompt, picture in zip(batch.prompts, pictures, strict=True)})
    again = conditions.of(batch, [2, 0])
    assert conditions.computed <= 4
    for place, row in enumerate([2, 0]):
        alone = Conditions(model).of(batch, [row])
        length = int(alone.prompt_lengths[0])
        for found, at in ((whole, row), (again, place)):
            assert int(found.prompt_lengths[at]) == length
            assert torch.equal(found.prompt_embeds[at, :length], alone.prompt_embeds[0, :length])
            assert torch.equal(found.pooled_prompt_embeds[at], alone.pooled_prompt_embeds[0])


def test_it_is_what_the_model_says_of_the_batch(model: DeepGen, batches: dict[str, Batch]):
    batch = batches["text_to_image"]
    with torch.no_grad():
        together = model.encode_condition(batch.prompts)
    ours = Conditions(model).of(batch, range(4))
    assert torch.equal(ours.prompt_lengths, together.prompt_lengths)
    torch.testing.assert_close(ours.pooled_prompt_embeds, together.pooled_prompt_embeds, rtol=1e-4, atol=1e-5)


def test_one_prompt_with_other_references_is_another(model: DeepGen, batches: dict[str, Batch]):
    batch, conditions = batches["image_edit"], Conditions(model)
    other = replace(batch, reference_images=tuple(255 - np.asarray(images) for images in batch.reference_images))
    first, second = conditions.of(batch, [0]), conditions.of(other, [0])
    assert conditions.computed == 2 and not torch.equal(first.pooled_prompt_embeds, second.pooled_prompt_embeds)


def test_the_other_branch_has_the_same_references_and_its_own_words(model: DeepGen, batches: dict[str, Batch]):
    batch, conditions = batches["image_edit"], Conditions(model)
    told, empty = conditions.of(batch, [0]), conditions.of(batch, [0], prompt="")
    assert conditions.computed == 2
    assert not torch.equal(told.pooled_prompt_embeds, empty.pooled_prompt_embeds)


def test_what_was_asked_for_longest_ago_makes_room(model: DeepGen, batches: dict[str, Batch]):
    batch = replace(batches["text_to_image"], prompts=("a red circle", "a blue cross", "a green square", "a red star"))
    one = size_of(Conditions(model).of(batch, [0]))
    conditions = Conditions(model, limit=int(2.5 * one))
    conditions.of(batch, [0, 1])
    conditions.of(batch, [0])
    conditions.of(batch, [2])  # the second prompt goes
    conditions.of(batch, [0])
    assert conditions.computed == 3 and conditions.bytes <= 2.5 * one
    conditions.of(batch, [1])
    assert conditions.computed == 4
