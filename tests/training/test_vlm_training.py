"""The stand-in VLM: its think tokens come to carry what a prompt says, a stop costs nothing, and a collapsed one is refused."""

from pathlib import Path

import numpy as np
import pytest
import torch

from data.drawn import VOCABULARY
from model.config import ModelConfig
from model.deepgen import DeepGen, build_deepgen
from model.vlm import prepare_prompts, stacked_hidden_states
from runtime.exits import Interrupted
from runtime.params import load_params
from training import vlm_training
from training.config import VLMTrainingConfig
from training.tokenizer import build_tokenizer
from training.vlm_training import (
    CollapsedVLM,
    ReadOut,
    Turn,
    attribute_amplitude,
    check_amplitude,
    draw_think_tokens,
    draw_turns,
    initialise,
    losses,
    question,
    train_vlm,
    turns_of,
)

REPO = Path(__file__).parents[2]


def small_model() -> DeepGen:
    shapes = load_params(REPO / "presets" / "tiny.yaml").model.model_dump()
    shapes["vlm"] |= {"hidden_size": 64, "intermediate_size": 128, "layers": 2, "heads": 2, "kv_heads": 1, "stacked_layers": (2, 1)}
    shapes["connector"] |= {"num_think_tokens": 4}
    shapes["dit"] |= {"layers": 1}
    torch.manual_seed(0)
    return build_deepgen(ModelConfig.model_validate(shapes), build_tokenizer(VOCABULARY, 128))


def settings(**changed: float) -> VLMTrainingConfig:
    return VLMTrainingConfig.model_validate({"steps": 4, "batch_size": 8, "lr": 2e-3, "image_share": 0.3, "save_every": 2} | changed)


@pytest.fixture
def ungated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vlm_training, "AMPLITUDE_GATE", 0.0)
    monkeypatch.setattr(vlm_training, "TEST_TURNS", 4)


def weights(model: DeepGen) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.vlm.state_dict().items()}


def test_the_read_out_makes_attributes_move_the_think_tokens_of_every_layer():
    model = small_model()
    initialise(model, settings(), 0)
    head = ReadOut(model, 0)
    model.vlm.model.visual.requires_grad_(False)
    optimizer = torch.optim.AdamW(
        [{"params": [p for p in model.vlm.parameters() if p.requires_grad]}, {"params": head.parameters(), "lr": 2e-2}], lr=2e-3
    )
    turns = [Turn(prompt, "") for prompt in vlm_training.VARIED["color"]] * 4
    fresh = attribute_amplitude(model)["color"]
    for step in range(60):
        losses(model, head, turns, *draw_think_tokens(model, len(turns), 0, step))[2].backward()
        optimizer.step()
        optimizer.zero_grad()
    trained = attribute_amplitude(model)["color"]
    assert all(after > 3 * before for before, after in zip(fresh, trained, strict=True)), f"{fresh} -> {trained}"


def test_a_stop_and_a_resume_give_the_weights_of_an_uninterrupted_run(ungated: None, tmp_path: Path):
    whole, resumed = small_model(), small_model()
    measured = train_vlm(whole, settings(), 0, tmp_path / "whole", lambda: False)
    asked = iter([False, False, False, True])
    with pytest.raises(Interrupted):
        train_vlm(resumed, settings(), 0, tmp_path / "resumed", lambda: next(asked))
    torch.manual_seed(1)  # nothing may come from the global generator
    resumed = small_model()
    assert train_vlm(resumed, settings(), 0, tmp_path / "resumed", lambda: False) == measured
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, resumed.vlm.state_dict()[name]), name


def test_the_gate_names_layers_and_figures_and_leaves_the_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(vlm_training, "AMPLITUDE_GATE", 2.0)
    monkeypatch.setattr(vlm_training, "TEST_TURNS", 4)
    with pytest.raises(CollapsedVLM, match=r"color layer 2 0\.\d+, layer 1 0\.\d+; shape .*at least 2.0 .*Raise vlm.steps"):
        train_vlm(small_model(), settings(steps=1), 0, tmp_path, lambda: False)
    assert (tmp_path / "vlm" / "model.safetensors").is_file()


def test_one_layer_of_one_attribute_below_the_gate_is_enough(tmp_path: Path):
    good = {"color": [0.5, 0.2], "shape": [0.5, 0.3], "number": [0.4, 0.4], "letter": [0.1, 0.1]}
    check_amplitude(good, (2, 1), tmp_path)
    with pytest.raises(CollapsedVLM, match="shape layer 2 0.5, layer 1 0.19"):
        check_amplitude(good | {"shape": [0.5, 0.19]}, (2, 1), tmp_path)


def test_think_tokens_see_the_prompt_alone_as_when_a_picture_is_made():
    """Beside an answer, which they must not see, they come to the states that they have without one."""
    model = small_model().eval()
    rng = np.random.default_rng(0)
    turns = [Turn("a red circle", "blue"), *turns_of("image", 2, "train", 0, rng), Turn("two blue squares and a cross", "one two three")]
    said = [vlm_training._said(model, turn) for turn in turns]
    answers = [model.tokenizer.encode(turn.answer, add_special_tokens=False) for turn in turns]
    think = torch.randn(4, model.vlm.config.text_config.hidden_size)
    with torch.no_grad():
        states, _, _, last = vlm_training._run(model, turns, said, answers, think.expand(len(turns), -1, -1), torch.arange(4))
        pixels = [list(vlm_training.stack_pixels(turn.pictures)) if turn.pictures else [] for turn in turns]
        batch = prepare_prompts(model.vlm, said, pixels, 4, model.tokenizer.pad_token_id)
        alone, _ = stacked_hidden_states(model.vlm, batch, think, (2,), train_vlm=False)
    rows = torch.arange(len(turns))
    torch.testing.assert_close(states[2][rows, last], alone[rows, batch.lengths + 3])


def test_the_read_out_ignores_what_all_prompts_of_a_batch_share():
    model = small_model()
    head = ReadOut(model, 0)
    states = torch.randn(4, 2, 64)
    same = states[:1].expand(4, -1, -1)
    assert torch.allclose(head(same), head.bias.view(1, 2, vlm_training.READ_WORDS, -1).expand(4, -1, -1, -1), atol=1e-5)
    assert not torch.allclose(head(states)[0], head(states)[1])


def test_answers_are_of_the_scene():
    objects = [{"shape": "circle", "color": "red"}, {"word": "CAT", "color": "blue"}]
    asked = {question(objects, np.random.default_rng(i)) for i in range(40)}
    assert asked == {
        ("? what color is the circle", "red"),
        ("? what color is the word", "blue"),
        ("? what is red", "circle"),
        ("? what is blue", "CAT"),
        ("? how many", "two"),
    }


def test_a_question_with_two_answers_is_not_asked():
    objects = [{"shape": "circle", "color": "red"}, {"shape": "circle", "color": "blue"}]
    asked = {question(objects, np.random.default_rng(i)) for i in range(40)}
    assert asked == {None, ("? what is red", "circle"), ("? what is blue", "circle"), ("? how many", "two")}


def test_pictures_come_one_and_two_at_a_time():
    batches = [draw_turns(settings(image_share=1.0, batch_size=4), 0, step) for step in range(40)]
    assert {len(turn.pictures) for _, turns in batches for turn in turns} == {1, 2}
    assert all(len({len(turn.pictures) for turn in turns}) == 1 for _, turns in batches)


def test_a_letter_more_in_the_answer_is_a_token_more_to_get_right():
    model = small_model()
    think = torch.zeros(1, 1, 64), torch.tensor([0])
    head = ReadOut(model, 0)
    assert [len(losses(model, head, [Turn("a red circle", word)], *think)[1]) for word in ("red", "CAT")] == [2, 4]
