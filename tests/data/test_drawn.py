import numpy as np
import pytest

from data.config import EDITS, KINDS
from data.drawn import COLORS, VOCABULARY, DrawnSample, draw_image_edit, draw_text_to_image

SPLITS = ("train", "validation", "evaluation")


def draw(task: str, split: str, index: int, kinds: dict[str, float], seed: int = 5) -> DrawnSample:
    return (draw_image_edit if task == "image_edit" else draw_text_to_image)(split, seed, index, kinds)


def content(sample: DrawnSample) -> tuple[str, ...]:
    """The prompt and every object with its place in whole pixels: what no two splits may share."""
    objects = [*sample.scene.get("objects", ()), *sample.scene.get("source", ()), *sample.scene.get("target", ())]
    return (sample.prompt, *(str([o.get("word", o.get("shape")), o["color"], round(o["x"]), round(o["y"])]) for o in objects))


@pytest.mark.parametrize("task", ["text_to_image", "image_edit"])
def test_a_sample_depends_on_its_address_alone(task):
    kinds = EDITS if task == "image_edit" else KINDS
    alone = draw(task, "train", 7, kinds)
    after_others = [draw(task, "train", index, kinds) for index in range(8)][7]
    assert (alone.prompt, alone.scene) == (after_others.prompt, after_others.scene)
    np.testing.assert_array_equal(alone.target, after_others.target)
    assert alone.scene != draw(task, "train", 7, kinds, seed=6).scene


def test_the_order_of_kinds_in_params_changes_no_draw():
    backwards = dict(reversed(KINDS.items()))
    assert [draw("text_to_image", "train", i, KINDS).prompt for i in range(20)] == [
        draw("text_to_image", "train", i, backwards).prompt for i in range(20)
    ]


@pytest.mark.parametrize(("task", "kind"), [("text_to_image", "word"), ("text_to_image", "single"), ("image_edit", "recolor")])
def test_no_scene_belongs_to_two_splits(task, kind):
    """There are 384 scenes of a word in all, so 120 draws a split would be sure to meet."""
    seen = {split: {content(draw(task, split, i, {kind: 1.0})) for i in range(120)} for split in SPLITS}
    assert not seen["train"] & seen["validation"]
    assert not seen["train"] & seen["evaluation"]
    assert not seen["validation"] & seen["evaluation"]


def test_every_prompt_is_of_the_closed_vocabulary_and_uses_nearly_all_of_it():
    said = set()
    for task, kinds in (("text_to_image", KINDS), ("image_edit", EDITS)):
        for kind in kinds:
            for index in range(120):
                said.update(draw(task, "train", index, {kind: 1.0}).prompt.split())
    assert said <= set(VOCABULARY)
    assert set(VOCABULARY) - said == {"one"}  # only an answer: "how many" objects
    assert list(VOCABULARY) == sorted(set(VOCABULARY))


def test_kinds_come_as_often_as_their_weights_say():
    samples = [draw("text_to_image", "train", i, {"single": 3.0, "count": 1.0}) for i in range(400)]
    share = sum(sample.kind == "single" for sample in samples) / len(samples)
    assert abs(share - 0.75) < 0.07  # three standard errors


def test_an_edit_changes_the_picture_and_comes_with_one_reference():
    for index in range(40):
        sample = draw("image_edit", "train", index, EDITS)
        (source,) = sample.references
        assert source.shape == sample.target.shape == (64, 64, 3)
        assert source.dtype == sample.target.dtype == np.uint8
        assert (source != sample.target).any()


def middle(image: np.ndarray, color: tuple[int, int, int]) -> tuple[float, float]:
    """Mean (x, y) of the pixels of exactly that colour."""
    rows, columns = np.nonzero((image == np.array(color)).all(-1))
    return columns.mean(), rows.mean()


def test_words_of_place_mean_what_a_reader_takes_them_to_mean():
    """Read from the pixels, since drawing and verifying share their notion of left."""
    for sample in (draw("text_to_image", "train", i, {"relation": 1.0}) for i in range(150)):
        first, second = sample.scene["objects"]
        if first["color"] == second["color"]:
            continue
        (ax, ay), (bx, by) = (middle(sample.target, COLORS[o["color"]]) for o in (first, second))
        told = {"left of": ax < bx, "right of": ax > bx, "above": ay < by, "below": ay > by}
        assert sample.prompt.startswith(f"a {first['color']} {first['shape']} {sample.scene['relation']} a {second['color']}")
        assert told[sample.scene["relation"]], sample.prompt
    for sample in (draw("text_to_image", "train", i, {"position": 1.0}) for i in range(40)):
        x, y = middle(sample.target, COLORS[sample.scene["objects"][0]["color"]])
        assert sample.prompt.endswith(f"in the {'top' if y < 20 else 'bottom'} {'left' if x < 20 else 'right'}")
        assert not 20 < x < 44 and not 20 < y < 44


def test_captions_are_english():
    said = {draw("text_to_image", "train", i, {"count": 1.0}).prompt for i in range(300)}
    assert {"two red crosses", "three green circles", "four blue squares", "two white triangles"} <= said
