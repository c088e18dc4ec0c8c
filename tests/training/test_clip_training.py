"""The small CLIP: near misses are misses, a stop costs nothing, and what is stored is what was measured."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import CLIPModel

from data.config import KINDS
from data.drawn import SIDE, VOCABULARY, draw_text_to_image
from model.clip import build_clip, embed_pictures, embed_prompts
from runtime.exits import Interrupted
from training import clip_training
from training.clip_training import contrastive_loss, draw_pairs, holds, measure_clip, spoil, train_clip
from training.config import CLIPTrainingConfig
from training.tokenizer import build_tokenizer

TOKENIZER = build_tokenizer(VOCABULARY, 128)


def settings(**changed: float) -> CLIPTrainingConfig:
    small = {"steps": 4, "batch_size": 4, "lr": 2e-3, "width": 32, "layers": 1, "save_every": 2}
    return CLIPTrainingConfig.model_validate(small | changed)


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clip_training, "RETRIEVED_FROM", 4)
    monkeypatch.setattr(clip_training, "TEST_GROUPS", 1)


def test_a_stop_and_a_resume_give_the_weights_of_an_uninterrupted_run(tmp_path: Path):
    train_clip(settings(), TOKENIZER, 0, tmp_path / "whole", lambda: False)
    asked = iter([False, False, False, True])
    with pytest.raises(Interrupted):
        train_clip(settings(), TOKENIZER, 0, tmp_path / "resumed", lambda: next(asked))
    train_clip(settings(), TOKENIZER, 0, tmp_path / "resumed", lambda: False)
    whole, resumed = ((tmp_path / name / "clip" / "model.safetensors").read_bytes() for name in ("whole", "resumed"))
    assert whole == resumed


def test_what_is_stored_is_small_and_scores_as_it_was_measured(tmp_path: Path):
    measured = train_clip(settings(steps=1, width=64, layers=3), TOKENIZER, 0, tmp_path, lambda: False)
    stored = CLIPModel.from_pretrained(tmp_path / "clip", dtype=torch.float32)
    assert measure_clip(stored, TOKENIZER) == measured
    assert {file.name for file in (tmp_path / "clip").iterdir()} == {"config.json", "model.safetensors"}
    assert (tmp_path / "clip" / "model.safetensors").stat().st_size < 1_000_000


def test_it_learns_the_few_pairs_that_it_sees():
    torch.manual_seed(0)
    clip = build_clip(32, 1, SIDE, TOKENIZER)
    pairs = draw_pairs("single", 8, "train", 0)
    optimizer = torch.optim.AdamW(clip.parameters(), lr=3e-3)
    first, _ = contrastive_loss(clip, TOKENIZER, pairs)
    for _ in range(150):
        loss, right = contrastive_loss(clip, TOKENIZER, pairs)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < first / 2 and right >= 0.75


def test_a_spoiled_picture_is_never_what_was_asked_for_and_the_target_always_is():
    rng = np.random.default_rng(0)
    for kind in KINDS:
        for index in range(30):
            scene = draw_text_to_image("train", 0, index, {kind: 1.0}).scene
            assert holds(scene, scene["objects"])
            assert not holds(scene, spoil(scene, rng))


def test_another_pictures_caption_counts_as_right_where_it_is_true_of_this_one():
    pairs = draw_pairs("single", 60, "train", 0)
    asked = [prompt.split()[-2:] for prompt in pairs.prompts]
    same = torch.tensor([[a == b for b in asked] for a in asked])
    assert same.sum() > 60 and torch.equal(pairs.fits[:, :60], same)


def test_words_after_a_prompts_end_change_nothing():
    torch.manual_seed(0)
    clip = build_clip(32, 1, SIDE, TOKENIZER).eval()
    with torch.no_grad():
        alone = embed_prompts(clip, TOKENIZER, ["a red circle"])
        padded = embed_prompts(clip, TOKENIZER, ["a red circle", "as many red circles as a square has sides"])
        other = embed_prompts(clip, TOKENIZER, ["a blue circle"])
    torch.testing.assert_close(alone[0], padded[0])
    assert not torch.allclose(alone, other)


def test_embeddings_are_of_length_one():
    clip = build_clip(32, 1, SIDE, TOKENIZER)
    for embedded in (embed_prompts(clip, TOKENIZER, ["a red circle"]), embed_pictures(clip, torch.rand(3, 3, SIDE, SIDE))):
        torch.testing.assert_close(embedded.norm(dim=-1), torch.ones(len(embedded)))


def test_a_prompt_longer_than_its_places_is_refused():
    with pytest.raises(ValueError, match="a prompt of 30 tokens; this CLIP reads at most 23"):
        embed_prompts(build_clip(32, 1, SIDE, TOKENIZER), TOKENIZER, ["a " * 30])
