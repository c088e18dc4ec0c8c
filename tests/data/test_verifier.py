"""The verifier's two errors, counted: refusing the truth, and accepting something else."""

from functools import cache

import numpy as np
import pytest
from scipy import ndimage

from data.config import EDITS, KINDS
from data.drawn import BACKGROUND, CELL, DrawnSample, draw_image_edit, draw_text_to_image, render
from data.verifier import Found, find_objects, read_word, verify

WHOLE = {"count", "shape", "color", "binding"}
PARTS = {("text_to_image", kind): WHOLE for kind in KINDS}
PARTS |= {
    ("text_to_image", "position"): WHOLE | {"position"},
    ("text_to_image", "relation"): WHOLE | {"relation"},
    ("text_to_image", "word"): {"word", "color", "count"},
}
PARTS |= {("image_edit", kind): {"kept", "edited", "count"} for kind in (*EDITS, "pick")}
PARTS["image_edit", "word"] = {"kept", "edited", "count", "word"}

WORD = {"word": "CAT", "color": "red", "x": 0, "y": 16}
ASKED = {"kind": "word", "objects": [WORD]}
DOT = {"shape": "circle", "color": "blue", "x": 40.0, "y": 56.0, "radius": 6.0}
REWORD = {"kind": "word", "like": "word", "source": [WORD | {"word": "HAT"}, DOT], "target": [WORD, DOT], "edited": 0}


@cache
def drawn(task: str, kind: str, number: int = 300) -> list[DrawnSample]:
    draw = draw_image_edit if task == "image_edit" else draw_text_to_image
    return [draw("train", 9, index, {kind: 1.0}) for index in range(number)]


def content(sample: DrawnSample) -> list[tuple[str, str]]:
    return sorted((o.get("word", o.get("shape")), o["color"]) for o in sample.scene.get("objects", sample.scene.get("target")))


@pytest.mark.parametrize(("task", "kind"), PARTS)
def test_the_truth_always_passes(task, kind):
    for sample in drawn(task, kind):
        verdict = verify(sample.scene, sample.target, sample.task)
        assert verdict.strict, (sample.prompt, verdict.parts)
        may = {"position"} if kind == "reasoning" and task == "text_to_image" and "position" in sample.scene else set()
        assert set(verdict.parts) == PARTS[task, kind] | may


@pytest.mark.parametrize("task", ["text_to_image", "image_edit"])
def test_another_picture_passes_less_than_once_in_a_hundred(task):
    samples = [sample for i in range(75) for kind in PARTS if kind[0] == task for sample in [drawn(*kind)[i]]]
    kinds = len(samples) // 75  # so that of one kind, and of two
    pairs = [(a, b) for off in (kinds, 3) for a, b in zip(samples, samples[off:], strict=False) if content(a) != content(b)]
    wrong = sum(verify(a.scene, b.target, a.task).strict for a, b in pairs)
    assert len(pairs) > 900
    assert wrong < 0.01 * len(pairs)


@pytest.mark.parametrize("kind", [*EDITS, "pick"])
def test_a_source_left_as_it_was_never_passes(kind):
    for sample in drawn("image_edit", kind)[:150]:
        for reference in sample.references:
            assert kind == "pick" and (reference == sample.target).all() or not verify(sample.scene, reference, sample.task).strict


def test_an_empty_picture_passes_nothing():
    empty = np.broadcast_to(np.array(BACKGROUND, np.uint8), (64, 64, 3))
    assert not any(verify(drawn(task, kind)[0].scene, empty, task).strict for task, kind in PARTS if task == "text_to_image")


def test_a_swapped_colour_keeps_count_and_shape_but_breaks_the_binding():
    sample = next(
        s
        for s in drawn("text_to_image", "two")
        if len({o["color"] for o in s.scene["objects"]}) == len({o["shape"] for o in s.scene["objects"]}) == 2
    )
    first, second = sample.scene["objects"]
    swapped = render([first | {"color": second["color"]}, second | {"color": first["color"]}])
    verdict = verify(sample.scene, swapped, sample.task)
    assert verdict.parts == {"count": 1.0, "shape": 1.0, "color": 1.0, "binding": 0.0}
    assert not verdict.strict


def test_a_thing_nobody_asked_for_breaks_the_count_and_halves_the_rest():
    sample = next(s for s in drawn("text_to_image", "single") if s.scene["objects"][0]["y"] > 16)
    (thing,) = sample.scene["objects"]
    other = {"shape": "cross" if thing["shape"] != "cross" else "circle", "color": "red" if thing["color"] != "red" else "blue"}
    crowded = render([thing, thing | other | {"x": 8.0, "y": 8.0}])
    assert verify(sample.scene, crowded, sample.task).parts == {"count": 0.0, "shape": 0.5, "color": 0.5, "binding": 0.5}


@pytest.mark.parametrize("kind", ["recolor", "move", "replace", "add", "remove"])
def test_a_source_left_as_it_was_is_kept_but_not_edited(kind):
    counted = float(kind not in ("add", "remove"))
    for sample in drawn("image_edit", kind)[:20]:
        assert verify(sample.scene, sample.references[0], sample.task).parts == {"kept": 1.0, "edited": 0.0, "count": counted}


def test_a_relation_the_other_way_round_fails_on_the_relation_alone():
    sample = drawn("text_to_image", "relation")[0]
    first, second = sample.scene["objects"]
    places = [{axis: o[axis] for axis in "xy"} for o in (first, second)]
    turned = render([first | places[1], second | places[0]])
    assert {name for name, value in verify(sample.scene, turned, sample.task).parts.items() if value < 1} == {"relation"}


def test_a_corner_that_was_to_be_worked_out_is_asked_for_in_pixels():
    sample = next(s for s in drawn("text_to_image", "reasoning") if "position" in s.scene)
    (thing,) = sample.scene["objects"]
    elsewhere = render([thing | {"x": 64 - thing["x"], "y": 64 - thing["y"]}])  # the corner that the caption names
    assert {name for name, value in verify(sample.scene, elsewhere, sample.task).parts.items() if value < 1} == {"position"}


def test_an_edit_that_drops_a_bystander_is_not_kept():
    sample = next(s for s in drawn("image_edit", "recolor") if len(s.scene["target"]) == 3)
    without = [o for i, o in enumerate(sample.scene["target"]) if i in (sample.scene["edited"], (sample.scene["edited"] + 1) % 3)]
    assert verify(sample.scene, render(without), sample.task).parts == {"kept": 0.5, "edited": 1.0, "count": 0.0}


@pytest.mark.parametrize(("kind", "edited"), [("recolor", 0.0), ("replace", 0.0), ("move", 0.0), ("add", 1.0), ("combine", 1.0)])
def test_the_place_of_what_was_edited_counts_unless_it_was_free(kind, edited):
    sample = next(s for s in drawn("image_edit", kind) if all(max(abs(o["x"] - 40), abs(o["y"] - 24)) > 17 for o in s.scene["target"]))
    objects = [dict(o) for o in sample.scene["target"]]
    objects[sample.scene["edited"]] |= {"x": 40.0, "y": 24.0}
    assert verify(sample.scene, render(objects), sample.task).parts == {"kept": 1.0, "edited": edited, "count": 1.0}


def test_combining_must_leave_the_object_alone():
    sample = next(s for s in drawn("image_edit", "combine") if s.scene["target"][0]["y"] > 32)
    crowded = render([*sample.scene["target"], DOT | {"x": 8.0, "y": 8.0}])
    assert verify(sample.scene, crowded, sample.task).parts == {"kept": 1.0, "edited": 1.0, "count": 0.0}


@pytest.mark.parametrize(
    ("written", "right"),
    [("CAT", 1.0), ("CAN", 2 / 3), ("CA", 2 / 3), ("CATS", 2 / 3), ("ACT", 1 / 3), ("XUNE", 0.0), ("HOLE", 0.0)],
)
def test_a_word_is_scored_by_its_character_error_rate(written, right):
    """Levenshtein: CAT to ACT takes two letters of three; more errors than letters are not below 0."""
    verdict = verify(ASKED, render([WORD | {"word": written}]), "text_to_image")
    assert verdict.parts == {"word": pytest.approx(right), "color": 1.0, "count": 1.0}
    assert verdict.strict == (written == "CAT")
    edited = verify(REWORD, render([WORD | {"word": written}, DOT]), "image_edit")
    assert edited.parts == {"kept": 1.0, "edited": float(written == "CAT"), "count": 1.0, "word": pytest.approx(right)}


def test_a_word_in_another_colour_or_in_two_is_not_in_the_colour_asked_for():
    other = render([WORD | {"color": "white"}])
    assert verify(ASKED, other, "text_to_image").parts == {"word": 1.0, "color": 0.0, "count": 1.0}
    two = render([WORD])
    two[:, :CELL] = other[:, :CELL]
    assert read_word(two) == ("CAT", None)
    halves = [render([WORD | {"word": "CE", "color": color}]) for color in ("blue", "purple")]
    every_letter_in_two = np.where((np.arange(64) % CELL < CELL // 2)[:, None], *halves)
    assert read_word(every_letter_in_two) == ("CE", None)


def test_anything_beside_a_word_breaks_the_count_alone():
    assert verify(ASKED, render([WORD, DOT]), "text_to_image").parts == {"word": 1.0, "color": 1.0, "count": 0.0}


def test_letters_are_read_with_their_rows_and_columns():
    words = [WORD | {"word": "TEN", "x": CELL}, WORD | {"word": "SO", "y": 48, "color": "green"}]
    image = render([*words, DOT])
    assert sorted(find_objects(image), key=lambda f: f.y) == [
        Found("TEN", "red", 16, 16),
        Found("SO", "green", 0, 48),
        Found("circle", "blue", 40.0, 56.0),
    ]
    assert read_word(image) == ("TEN SO", None)
    apart = render([WORD | {"word": "C"}, WORD | {"word": "T", "x": 2 * CELL}])
    assert read_word(apart) == ("C T", "red")


def test_a_letter_that_fits_no_glyph_is_unknown_and_an_error():
    image = render([WORD])
    ink = image[16:32, 16:32].max((0, 1))
    image[16:32, 16:32] = BACKGROUND
    image[19:23, 19:23] = image[25:29, 25:29] = ink
    assert read_word(image) == ("C?T", "red")
    assert verify(ASKED, image, "text_to_image").parts == {"word": pytest.approx(2 / 3), "color": 1.0, "count": 1.0}


def test_a_word_that_should_have_stayed_must_stay_where_and_as_it_was():
    scene = {"kind": "recolor", "like": "recolor", "source": [WORD, DOT | {"color": "red"}], "target": [WORD, DOT], "edited": 1}
    assert verify(scene, render([WORD, DOT]), "image_edit").strict
    for changed in ({"y": 32}, {"color": "white"}, {"word": "HAT"}):
        assert verify(scene, render([WORD | changed, DOT]), "image_edit").parts == {"kept": 0.0, "edited": 1.0, "count": 1.0}


def test_a_changed_word_must_be_where_the_old_one_was_and_in_its_colour():
    for changed, right in (({"y": 32}, 0.0), ({"color": "white"}, 1.0)):
        parts = verify(REWORD, render([WORD | changed, DOT]), "image_edit").parts
        assert parts == {"kept": 1.0, "edited": 0.0, "count": 1.0, "word": right}


def soft(sample: DrawnSample, noise: float, blur: float) -> np.ndarray:
    rng = np.random.default_rng(0)
    image = ndimage.gaussian_filter(sample.target.astype(float), (blur, blur, 0)) + rng.normal(0, noise, sample.target.shape)
    return image.round().clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize(("noise", "blur", "share"), [(10, 0, 0.99), (0, 0.5, 0.99), (10, 0.5, 0.95)])
def test_slightly_soft_pictures_of_a_model_still_pass(noise, blur, share):
    samples = [sample for kind in PARTS for sample in drawn(*kind)[:25]]
    assert np.mean([verify(s.scene, soft(s, noise, blur), s.task).strict for s in samples]) > share


@pytest.mark.parametrize("image", [np.zeros((32, 32, 3), np.uint8), np.zeros((64, 64, 3), np.float32)])
def test_an_image_of_another_size_or_type_is_refused(image):
    with pytest.raises(ValueError, match=r"verify reads uint8 \(64, 64, 3\); got"):
        verify(ASKED, image, "text_to_image")
