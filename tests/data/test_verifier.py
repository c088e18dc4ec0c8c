"""The verifier's two errors, counted: refusing the truth, and accepting something else."""

from functools import cache

import numpy as np
import pytest
from scipy import ndimage

from data.config import EDITS, KINDS
from data.drawn import BACKGROUND, DrawnSample, draw_image_edit, draw_text_to_image, render
from data.verifier import verify

PARTS = {
    "single": {"count", "shape", "color", "binding"},
    "position": {"count", "shape", "color", "binding", "position"},
    "relation": {"count", "shape", "color", "binding", "relation"},
    "count": {"count", "shape", "color", "binding"},
    "two": {"count", "shape", "color", "binding"},
    "word": {"word", "color"},
} | dict.fromkeys(EDITS, {"kept", "edited", "count"})


@cache
def drawn(kind: str, number: int = 300) -> list[DrawnSample]:
    draw = draw_image_edit if kind in EDITS else draw_text_to_image
    return [draw("train", 9, index, {kind: 1.0}) for index in range(number)]


@pytest.mark.parametrize("kind", [*KINDS, *EDITS])
def test_the_truth_always_passes(kind):
    for sample in drawn(kind):
        verdict = verify(sample.scene, sample.target, sample.task)
        assert verdict.strict, (sample.prompt, verdict.parts)
        assert set(verdict.parts) == PARTS[kind]


@pytest.mark.parametrize("kinds", [KINDS, EDITS])
def test_the_picture_of_another_prompt_passes_less_than_once_in_a_hundred(kinds):
    samples = [sample for i in range(200) for sample in (drawn(kind)[i] for kind in kinds)]
    pairs = [(a, b) for a, b in zip(samples, samples[7:], strict=False) if a.prompt != b.prompt]
    wrong = sum(verify(a.scene, b.target, a.task).strict for a, b in pairs)
    assert len(pairs) > 700
    assert wrong < 0.01 * len(pairs)


@pytest.mark.parametrize("kind", EDITS)
def test_a_source_left_as_it_was_never_passes(kind):
    assert not any(verify(sample.scene, sample.references[0], sample.task).strict for sample in drawn(kind))


def test_an_empty_picture_passes_nothing():
    empty = np.broadcast_to(np.array(BACKGROUND, np.uint8), (64, 64, 3))
    assert not any(verify(drawn(kind)[0].scene, empty, drawn(kind)[0].task).strict for kind in KINDS)


def test_a_swapped_colour_keeps_count_and_shape_but_breaks_the_binding():
    sample = next(
        s for s in drawn("two") if len({o["color"] for o in s.scene["objects"]}) == len({o["shape"] for o in s.scene["objects"]}) == 2
    )
    first, second = sample.scene["objects"]
    swapped = render([first | {"color": second["color"]}, second | {"color": first["color"]}])
    verdict = verify(sample.scene, swapped, sample.task)
    assert verdict.parts == {"count": 1.0, "shape": 1.0, "color": 1.0, "binding": 0.0}
    assert not verdict.strict


def test_a_thing_nobody_asked_for_breaks_the_count_and_halves_the_rest():
    sample = next(s for s in drawn("single") if s.scene["objects"][0]["y"] > 16)
    (thing,) = sample.scene["objects"]
    other = {"shape": "cross" if thing["shape"] != "cross" else "circle", "color": "red" if thing["color"] != "red" else "blue"}
    crowded = render([thing, thing | other | {"x": 8.0, "y": 8.0}])
    assert verify(sample.scene, crowded, sample.task).parts == {"count": 0.0, "shape": 0.5, "color": 0.5, "binding": 0.5}


@pytest.mark.parametrize("kind", EDITS)
def test_a_source_left_as_it_was_is_kept_but_not_edited(kind):
    counted = {"recolor": 1.0, "move": 1.0, "add": 0.0, "remove": 0.0}[kind]
    for sample in drawn(kind)[:20]:
        assert verify(sample.scene, sample.references[0], sample.task).parts == {"kept": 1.0, "edited": 0.0, "count": counted}


def test_a_relation_the_other_way_round_fails_on_the_relation_alone():
    sample = drawn("relation")[0]
    first, second = sample.scene["objects"]
    places = [{axis: o[axis] for axis in "xy"} for o in (first, second)]
    turned = render([first | places[1], second | places[0]])
    assert {name for name, value in verify(sample.scene, turned, sample.task).parts.items() if value < 1} == {"relation"}


def test_an_edit_that_drops_a_bystander_is_not_kept():
    sample = next(s for s in drawn("recolor") if len(s.scene["target"]) == 3)
    without = [o for i, o in enumerate(sample.scene["target"]) if i in (sample.scene["edited"], (sample.scene["edited"] + 1) % 3)]
    assert verify(sample.scene, render(without), sample.task).parts == {"kept": 0.5, "edited": 1.0, "count": 0.0}


def test_slightly_soft_pictures_of_a_model_still_pass():
    """A blur of 0.6 pixels and noise of 10 levels: nineteen in twenty read as before."""
    rng = np.random.default_rng(0)
    read = []
    for kind in (*KINDS, *EDITS):
        for sample in drawn(kind)[:30]:
            soft = ndimage.gaussian_filter(sample.target.astype(float), (0.6, 0.6, 0)) + rng.normal(0, 10, sample.target.shape)
            read.append(verify(sample.scene, soft.clip(0, 255).astype(np.uint8), sample.task).strict)
    assert np.mean(read) > 0.9


@pytest.mark.parametrize("image", [np.zeros((32, 32, 3), np.uint8), np.zeros((64, 64, 3), np.float32)])
def test_an_image_of_another_size_or_type_is_refused(image):
    with pytest.raises(ValueError, match=r"verify reads uint8 \(64, 64, 3\); got"):
        verify(drawn("single")[0].scene, image, "text_to_image")
