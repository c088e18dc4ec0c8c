"""CLIP similarity as a reward: the shipped one tells a true picture from a spoiled one, and reads what it can of any prompt."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from data.drawn import draw_text_to_image, render
from model.clip import embed_pictures, embed_prompts
from training.batching import stack_pixels
from training.rewards.clip import CLIPSimilarity, NoCLIP
from training.rewards.scores import Group

from .conftest import REPO

CLIP, TOKENIZER = REPO / "foundation" / "clip", REPO / "foundation" / "tokenizer"


@pytest.fixture(scope="module")
def clip() -> CLIPSimilarity:
    return CLIPSimilarity(CLIP, TOKENIZER, torch.device("cpu"))


def group_of(prompt: str, images: list[np.ndarray], task: str = "text_to_image") -> Group:
    return Group("0:x", task, prompt, tuple(images), {})


def test_the_true_picture_of_a_drawn_prompt_is_nearer_than_other_prompts_pictures(clip: CLIPSimilarity):
    samples = [draw_text_to_image("evaluation", 1, i, {"single": 1.0}) for i in range(8)]
    images = [render(sample.scene["objects"]) for sample in samples]
    right = sum(int(clip(group_of(sample.prompt, images)).values[:, 0].argmax()) == i for i, sample in enumerate(samples))
    assert right >= 6  # by chance, one


def test_its_values_are_the_cosines_that_the_model_was_measured_by(clip: CLIPSimilarity):
    sample = draw_text_to_image("evaluation", 1, 0, {"single": 1.0})
    images = [render(sample.scene["objects"]), np.full((64, 64, 3), 200, np.uint8)]
    scores = clip(group_of(sample.prompt, images))
    cosines = embed_pictures(clip.clip, stack_pixels(images)) @ embed_prompts(clip.clip, clip.tokenizer, [sample.prompt]).T
    torch.testing.assert_close(scores.values, cosines, rtol=0, atol=1e-6)
    assert scores.valid.all() and scores.applies.all()


def test_an_edit_is_not_asked_about(clip: CLIPSimilarity):
    scores = clip(group_of("make it red", [np.zeros((64, 64, 3), np.uint8)] * 2, "image_edit"))
    assert not scores.applies.any() and scores.coverage == 1.0


def test_of_a_long_prompt_the_beginning_is_read_and_the_cut_is_told(clip: CLIPSimilarity):
    clip.facts()
    image = np.zeros((64, 64, 3), np.uint8)
    long = clip(group_of("a red circle " * 40, [image])).values
    assert clip.facts() == {"clip/prompts_cut": 1.0}
    assert torch.equal(long, clip(group_of("a red circle " * 30, [image])).values)
    clip(group_of("a red circle", [image]))
    assert clip.facts() == {"clip/prompts_cut": 0.5}


def test_pictures_of_another_size_are_scaled(clip: CLIPSimilarity):
    sample = draw_text_to_image("evaluation", 1, 0, {"single": 1.0})
    small = render(sample.scene["objects"])
    large = np.asarray(small.repeat(4, 0).repeat(4, 1))
    values = clip(group_of(sample.prompt, [large])).values - clip(group_of(sample.prompt, [small])).values
    assert values.abs().max() < 0.05


def test_what_is_missing_is_named(tmp_path: Path):
    shutil.copy(CLIP / "config.json", tmp_path)
    with pytest.raises(NoCLIP, match=r"model\.safetensors is missing.*take clip out of mr_grpo\.rewards"):
        CLIPSimilarity(tmp_path, TOKENIZER, torch.device("cpu"))
