"""CLIP similarity as a reward: the shipped one tells a true picture from a spoiled one, and reads what it can of any prompt."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from string import ascii_lowercase

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from data.drawn import VOCABULARY, draw_text_to_image, render
from model.clip import embed_pictures, embed_prompts
from training.batching import stack_pixels
from training.rewards.clip import CLIPSimilarity, NoCLIP
from training.rewards.scores import Group
from training.tokenizer import build_tokenizer

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


def without_a_tensor(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def of_another_kind(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "siglip"}))


def with_more_words(folder: Path) -> None:
    build_tokenizer([*VOCABULARY, "aquarelle"], 400).save_pretrained(folder)


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (without_a_tensor, r"model\.safetensors lacks visual_projection\.weight \(1 of its tensors\)"),
        (of_another_kind, "config.json: model_type is 'siglip', the reward clip reads 'clip'"),
        (with_more_words, r"109 words, and the CLIP in .* has rows for 108"),
    ],
)
def test_a_folder_that_would_score_by_chance_or_fail_in_the_run_is_refused(tmp_path: Path, spoil: Callable[[Path], None], told: str):
    shutil.copytree(CLIP, tmp_path / "clip")
    spoil(tmp_path / "clip")
    with pytest.raises(NoCLIP, match=told):
        CLIPSimilarity(tmp_path / "clip", TOKENIZER, torch.device("cpu"))


def test_a_clip_with_a_tokenizer_and_a_preprocessor_of_its_own_scores_as_transformers_does(tmp_path: Path):
    words = ["<|startoftext|>", "<|endoftext|>", *ascii_lowercase, *(f"{letter}</w>" for letter in ascii_lowercase), "red</w>", "re"]
    tokenizer = CLIPTokenizer({word: i for i, word in enumerate(words)}, [("r", "e"), ("re", "d</w>")])
    tokenizer.save_pretrained(tmp_path)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=32)
    processor.save_pretrained(tmp_path)
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = tower | {"vocab_size": len(tokenizer), "max_position_embeddings": 8, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    torch.manual_seed(0)
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=tower | {"image_size": 32, "patch_size": 8}, projection_dim=16)).eval()
    clip.save_pretrained(tmp_path)
    coarse = np.random.default_rng(0).integers(0, 256, (3, 6, 6, 3), np.uint8)
    images = [np.asarray(Image.fromarray(image).resize((48, 48), Image.Resampling.BICUBIC)) for image in coarse]
    reward = CLIPSimilarity(tmp_path, tmp_path / "nowhere", torch.device("cpu"))
    for prompt in ("red cat", "a red cat on a mat in a hat"):
        ids = tokenizer(prompt, truncation=True, max_length=8, return_tensors="pt")
        pixels = processor(images, return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            expected = clip(**ids, pixel_values=pixels).logits_per_image / clip.logit_scale.exp()
        values = reward(group_of(prompt, images)).values
        torch.testing.assert_close(values, expected, rtol=0, atol=2e-3)  # Pillow resizes in whole numbers
        assert (values[0] - values[1]).abs() > 1e-2, "pictures are told apart by more than that"
    assert reward.facts() == {"clip/prompts_cut": 0.5}
