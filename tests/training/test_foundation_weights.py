"""The foundation that ships: its files are those it tells of, and they do what it tells."""

from pathlib import Path

import pytest
import torch
from transformers import CLIPModel

from data.drawn import draw_image_edit, draw_text_to_image
from data.verifier import verify
from model.weights import load_foundation
from runtime.files import read_json, sha256_file
from runtime.keys import seed_from
from runtime.params import load_params
from training.dit_training import draw_images
from training.scoring import wilson_interval
from training.text_encoder import load_text_encoder
from training.vlm_training import AMPLITUDE_GATE, GATED, attribute_amplitude

REPO = Path(__file__).parents[2]
FOUNDATION = REPO / "foundation"
PROVENANCE = read_json(FOUNDATION / "provenance.json")
SHAPES = load_params(REPO / "presets" / "tiny.yaml").model
SAMPLES = 96  # a task


@pytest.fixture(scope="module")
def model():
    torch.set_num_threads(1)
    return load_foundation(FOUNDATION, SHAPES).eval()


def test_every_file_is_the_one_that_was_shipped_and_all_are_at_most_15_mb():
    found = {name: sha256_file(FOUNDATION / name) for name in PROVENANCE["files"]}
    assert found == PROVENANCE["files"]
    assert {"transformer", "vlm", "vae", "clip", "tokenizer", "text_encoder.safetensors"} == {name.split("/")[0] for name in found}
    assert sum((FOUNDATION / name).stat().st_size for name in found) <= 15_000_000


@pytest.mark.parametrize(("task", "draw"), [("text_to_image", draw_text_to_image), ("image_edit", draw_image_edit)])
def test_it_draws_and_edits_as_well_as_it_says(model, task, draw):
    """On the first of the samples that were scored when it was trained, within the intervals of both counts."""
    samples = [draw("evaluation", seed_from("foundation evaluation"), i) for i in range(SAMPLES)]
    seeds = [seed_from("foundation evaluation", i) for i in range(SAMPLES)]
    images = draw_images(model, load_text_encoder(FOUNDATION, SHAPES), samples, seeds, 12)
    right = sum(verify(sample.scene, image, task).strict for sample, image in zip(samples, images, strict=True))
    low, high = wilson_interval(right, SAMPLES)
    assert low <= PROVENANCE["measured"]["dit"]["strict"][task]["strict"] <= high


def test_what_prompts_say_moves_the_last_think_token_in_every_stacked_layer(model):
    amplitude = attribute_amplitude(model)
    assert min(min(amplitude[name]) for name in GATED) >= AMPLITUDE_GATE
    for name, layers in PROVENANCE["measured"]["vlm"]["amplitude"].items():
        assert amplitude[name] == pytest.approx(layers, abs=0.02), "of bfloat16 weights"


def test_the_clip_that_ships_loads():
    clip = CLIPModel.from_pretrained(FOUNDATION / "clip", dtype=torch.float32)
    assert all(torch.isfinite(value).all() for value in clip.state_dict().values())
