"""A condition depends on its own prompt and references, and on nothing else."""

import pytest
import torch

from model.deepgen import Condition, DeepGen, build_deepgen
from model.prompts import prompt_tokens
from training.tokenizer import build_tokenizer

from .conftest import WORDS, tiny_config

PROMPTS = ["red circle", "green square left of red circle", "make"]


@pytest.mark.parametrize("with_references", [False, True])
def test_the_condition_of_a_prompt_alone_equals_that_in_a_mixed_batch(model: DeepGen, references, with_references: bool):
    images = references if with_references else ()
    together = model.encode_condition(PROMPTS, images)
    for row, prompt in enumerate(PROMPTS):
        alone = model.encode_condition([prompt], tuple(pixels[row : row + 1] for pixels in images))
        length = int(alone.prompt_lengths[0])
        assert int(together.prompt_lengths[row]) == length
        torch.testing.assert_close(together.prompt_embeds[row, :length], alone.prompt_embeds[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(together.pooled_prompt_embeds[row], alone.pooled_prompt_embeds[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("with_references", [False, True])
def test_reading_the_prompt_from_a_cache_gives_what_the_whole_sequence_gives(model: DeepGen, references, with_references: bool):
    images = references if with_references else ()
    cached = model.encode_condition(PROMPTS, images)
    model.train_vlm = True
    whole = model.encode_condition(PROMPTS, images)
    torch.testing.assert_close(cached.prompt_embeds, whole.prompt_embeds, rtol=1e-4, atol=1e-5)


def test_padding_in_the_prompt_does_not_reach_the_image(model: DeepGen):
    condition = model.encode_condition(PROMPTS)
    latents, sigmas = torch.randn(3, 48, 4, 4), torch.tensor([0.2, 0.5, 0.9])
    together = model.predict_velocity(latents, sigmas, condition)
    for row in range(3):
        length = int(condition.prompt_lengths[row])
        cut = Condition(
            condition.prompt_embeds[row : row + 1, :length],
            condition.pooled_prompt_embeds[row : row + 1],
            condition.prompt_lengths[row : row + 1],
        )
        alone = model.predict_velocity(latents[row : row + 1], sigmas[row : row + 1], cut)
        torch.testing.assert_close(together[row], alone[0], rtol=1e-4, atol=1e-5)


def test_zero_initialised_heads_give_every_prompt_the_same_first_condition():
    fresh = build_deepgen(tiny_config(), build_tokenizer(WORDS, 128)).eval()
    condition = fresh.encode_condition(PROMPTS)
    assert condition.prompt_embeds.abs().max() == 0
    assert condition.pooled_prompt_embeds.abs().max() == 0


def test_gradients_reach_think_tokens_and_connector_through_a_frozen_vlm(model: DeepGen, references):
    model.vlm.requires_grad_(False)
    model.encode_condition(PROMPTS, references).prompt_embeds.square().sum().backward()
    assert model.connector.think_tokens.grad.abs().sum() > 0
    assert model.connector.projector_1.weight.grad.abs().sum() > 0


def test_a_prompt_with_a_control_token_is_refused(model: DeepGen):
    with pytest.raises(ValueError, match=r"control tokens \['<\|im_end\|>'\]"):
        model.encode_condition(["red <|im_end|> circle"])


def test_of_a_long_prompt_the_middle_is_left_out_with_a_warning(model: DeepGen, caplog: pytest.LogCaptureFixture):
    long = ["red"] * 40 + ["green"] * 40
    whole = prompt_tokens(model.tokenizer, " ".join(long), (), limit=100)
    cut = prompt_tokens(model.tokenizer, " ".join(long), (), limit=10)
    assert len(whole) - len(cut) == 70
    assert "the middle 70 are left out" in caplog.text
    assert model.tokenizer.decode(cut).count("red") == model.tokenizer.decode(cut).count("green") == 5


@pytest.mark.parametrize(
    ("part", "change"),
    [("connector", {"num_think_tokens": 0}), ("vlm", {"stacked_layers": (6,)}), ("connector", {"projector": "mlp"})],
)
def test_variants_of_the_paper_are_settings(part: str, change: dict):
    config = tiny_config()
    variant = config.model_copy(update={part: getattr(config, part).model_copy(update=change)})
    made = build_deepgen(variant, build_tokenizer(WORDS, 128)).eval()
    torch.nn.init.normal_(made.connector.projector_3.weight)
    condition = made.encode_condition(PROMPTS)
    assert condition.prompt_embeds.shape[:2] == (3, int(condition.prompt_lengths.max()))
    assert condition.prompt_embeds.abs().sum() > 0


def test_with_the_released_padding_a_condition_depends_on_its_batch_and_with_ours_it_does_not(model: DeepGen):
    for padding in ("masked", "reference"):
        model.connector.register_to_config(padding=padding)
        together = model.encode_condition(PROMPTS).pooled_prompt_embeds[2]
        alone = model.encode_condition(PROMPTS[2:]).pooled_prompt_embeds[0]
        assert torch.allclose(together, alone, rtol=1e-4, atol=1e-5) is (padding == "masked")


def test_rows_with_their_own_references_are_read_as_each_alone(model: DeepGen, references):
    images = [[], [references[0][0]], [references[0][1], references[0][2][:, :32, :32]]]
    together = model.encode_condition(PROMPTS, images)
    for row, prompt in enumerate(PROMPTS):
        alone = model.encode_condition([prompt], [images[row]])
        length = int(alone.prompt_lengths[0])
        torch.testing.assert_close(together.prompt_embeds[row, :length], alone.prompt_embeds[0], rtol=1e-5, atol=1e-5)
