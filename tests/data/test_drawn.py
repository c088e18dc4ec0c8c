import numpy as np
import pytest

from data.config import EDITS, KINDS
from data.drawn import COLORS, HELD_OUT, LETTERS, VOCABULARY, DrawnSample, draw_image_edit, draw_text_to_image, held_out, repainted

SPLITS = ("train", "validation", "evaluation")
ALL = [("text_to_image", kind) for kind in KINDS] + [("image_edit", kind) for kind in (*EDITS, "pick")]


def draw(task: str, split: str, index: int, kinds: dict[str, float], seed: int = 5) -> DrawnSample:
    return (draw_image_edit if task == "image_edit" else draw_text_to_image)(split, seed, index, kinds)


def spoken(prompt: str) -> list[str]:
    """The words of a prompt; a word in capitals is spoken letter by letter."""
    return [part for word in prompt.split() for part in (list(word) if word.isupper() else [word])]


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


def pictures(sample: DrawnSample) -> list[list[dict]]:
    return [sample.scene[name] for name in ("objects", "source", "second", "target") if name in sample.scene]


@pytest.mark.parametrize(("kind", "number"), [("word", 250), ("single", 150), ("position", 80)])
def test_no_picture_belongs_to_two_splits(kind, number):
    """A shape has few places in whole pixels, a word few of two letters: so many draws a split would be sure to meet."""
    seen: dict[str, set[object]] = {}
    for split in SPLITS:
        samples = [draw("text_to_image", split, i, {kind: 1.0}) for i in range(number)]
        seen[split] = {
            str([o.get("word", o.get("shape")), o["color"], round(o["x"]), round(o["y"])]) for s in samples for o in pictures(s)[0]
        }
        seen[split] |= {s.target.tobytes() for s in samples}
    assert not seen["train"] & seen["validation"]
    assert not seen["train"] & seen["evaluation"]
    assert not seen["validation"] & seen["evaluation"]


@pytest.mark.parametrize("task", ["text_to_image", "image_edit"])
def test_training_never_combines_what_is_held_out_and_evaluation_does(task):
    def combined(split: str, number: int) -> set[tuple[str, str]]:
        samples = (draw(task, split, i, {kind: 1.0}) for of, kind in ALL if of == task for i in range(number))
        return {(o["color"], o["shape"]) for s in samples for objects in pictures(s) for o in objects if "shape" in o}

    assert not combined("train", 60) & set(HELD_OUT)
    assert combined("evaluation", 15) >= set(HELD_OUT)


def test_a_held_out_combination_is_told_wherever_it_stands():
    purple, plain = {"shape": "triangle", "color": "purple"}, {"shape": "circle", "color": "purple"}
    assert held_out({"objects": [plain, purple]})
    assert held_out({"source": [purple], "target": [plain]})
    assert held_out({"source": [plain], "second": [purple], "target": [plain]})
    assert not held_out({"objects": [plain, {"word": "CAT", "color": "purple"}]})


def test_every_prompt_is_of_the_closed_vocabulary_and_uses_nearly_all_of_it():
    said = set()
    for task, kind in ALL:
        for index in range(100):
            said.update(spoken(draw(task, "train", index, {kind: 1.0}).prompt))
    assert said <= set(VOCABULARY)
    assert set(VOCABULARY) - said <= {"one"}  # only an answer: "how many" objects
    assert list(VOCABULARY) == sorted(set(VOCABULARY))


@pytest.mark.parametrize(("task", "kind"), [("text_to_image", "word"), ("image_edit", "word")])
def test_words_are_two_to_four_letters_as_the_prompt_writes_them_from_the_left_edge(task, kind):
    lengths = set()
    for index in range(60):
        sample = draw(task, "train", index, {kind: 1.0})
        word = (sample.scene.get("objects") or sample.scene["target"])[0]
        assert word["word"] in sample.prompt.split()
        assert set(word["word"]) <= set(LETTERS)
        assert word["x"] == 0
        lengths.add(len(word["word"]))
        rows, columns = np.nonzero((sample.target == np.array(COLORS[word["color"]])).all(-1))
        beside = columns[(rows >= word["y"]) & (rows < word["y"] + 16)]
        assert set(beside // 16) == set(range(len(word["word"])))
    assert lengths == {2, 3, 4}


def test_kinds_come_as_often_as_their_weights_say():
    samples = [draw("text_to_image", "train", i, {"single": 3.0, "count": 1.0}) for i in range(400)]
    share = sum(sample.kind == "single" for sample in samples) / len(samples)
    assert abs(share - 0.75) < 0.07  # three standard errors


@pytest.mark.parametrize("kind", [*EDITS, "pick"])
def test_an_edit_comes_with_its_references_and_changes_the_picture(kind):
    for index in range(20):
        sample = draw("image_edit", "train", index, {kind: 1.0})
        assert len(sample.references) == (2 if kind in ("combine", "pick") else 1)
        copies = [bool((reference == sample.target).all()) for reference in sample.references]
        if kind == "pick":
            assert copies == [word in sample.prompt.split() for word in ("first", "second")]
        else:
            assert not any(copies)
        for image in (*sample.references, sample.target):
            assert (image.shape, image.dtype) == ((64, 64, 3), np.uint8)


def test_combining_takes_the_shape_of_one_picture_and_the_color_of_the_other():
    for index in range(40):
        sample = draw("image_edit", "train", index, {"combine": 1.0})
        (first,), (second,), (target,) = (sample.scene[name] for name in ("source", "second", "target"))
        shape, color = (first, second) if sample.prompt.index("first") < sample.prompt.index("second") else (second, first)
        assert target == shape | {"color": color["color"]}


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ("the color of snow", {"color": "white"}),
        ("the color of a banana", {"color": "yellow"}),
        ("with three sides", {"shape": "triangle"}),
        ("like a plus", {"shape": "cross"}),
        ("as a person has eyes", 2),
        ("as a triangle has corners", 3),
        ("as a car has wheels", 4),
        ("opposite the top left", (56, 56)),
        ("opposite the bottom left", (56, 8)),
    ],
)
def test_a_clue_means_what_a_reader_takes_it_to_mean(said, meant):
    samples = (draw("text_to_image", "train", i, {"reasoning": 1.0}) for i in range(200))
    scenes = [sample.scene["objects"] for sample in samples if said in sample.prompt]
    assert scenes
    for objects in scenes:
        if isinstance(meant, dict):
            assert all(o[key] == value for o in objects for key, value in meant.items())
        elif isinstance(meant, int):
            assert len(objects) == meant
        else:
            assert max(abs(objects[0]["x"] - meant[0]), abs(objects[0]["y"] - meant[1])) < 1


def test_an_edit_that_must_be_worked_out_is_like_a_plain_one():
    likes = set()
    for index in range(80):
        sample = draw("image_edit", "train", index, {"reasoning": 1.0})
        likes.add(sample.scene["like"])
        if "with three sides" in sample.prompt:
            (changed,) = [o for o in sample.scene["source"] if o["shape"] == "triangle"]
            assert changed not in sample.scene["target"]
    assert likes == {"recolor", "remove", "move"}


def shapes_and_colors(pictures_of: list[list[dict]]) -> list[tuple[str, tuple[int, ...]]]:
    return [(o.get("shape", ""), tuple(o["color"])) for objects in pictures_of for o in objects if not isinstance(o["color"], str)]


def test_repainted_edits_ask_for_the_same_in_colors_that_no_prompt_names():
    named = 0
    for i in range(150):
        plain = draw_image_edit("train", 3, i, EDITS | {"pick": 0.1})
        other = repainted(plain, 3, i)
        assert (other.prompt, other.kind) == (plain.prompt, plain.kind)
        for objects, before in zip(pictures(other), pictures(plain), strict=True):
            paints = {b["color"]: o["color"] for o, b in zip(objects, before, strict=True)}
            assert [o | {"color": None} for o in objects] == [o | {"color": None} for o in before], "only colours change"
            assert [paints[b["color"]] for b in before] == [o["color"] for o in objects], "what was of one colour still is"
        kept = {o["color"] for objects in pictures(other) for o in objects if isinstance(o["color"], str)}
        asked = plain.scene["target"][plain.scene["edited"]]["color"] if plain.scene["like"] in ("recolor", "add", "replace") else None
        assert kept == ({asked} if asked else set())
        named += bool(asked)
        if plain.kind == "combine":
            assert other.scene["target"][0]["color"] in [o["color"] for o in (*other.scene["source"], *other.scene["second"])]
        np.testing.assert_array_equal(repainted(plain, 3, i).target, other.target)
    assert named > 30


def test_no_repainted_shape_comes_near_a_color_that_is_held_out_for_it():
    held = {shape: np.array(COLORS[color]) for color, shape in HELD_OUT}
    seen = [pair for i in range(400) for pair in shapes_and_colors(pictures(repainted(draw_image_edit("train", 4, i), 4, i)))]
    assert {shape for shape, _ in seen} >= set(held)
    for shape, color in seen:
        nearest = min(COLORS, key=lambda name: np.linalg.norm(np.subtract(color, COLORS[name])))
        assert (nearest, shape) not in HELD_OUT
        assert shape not in held or np.linalg.norm(color - held[shape]) >= 100
    with_circles = [color for shape, color in seen if shape == "circle"]
    assert any(np.linalg.norm(np.subtract(color, COLORS["purple"])) < 60 for color in with_circles), "shapes of no such rule get any"


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
        a, b, relation = *(f"a {o['color']} {o['shape']}" for o in (first, second)), sample.scene["relation"]
        assert sample.prompt in (f"{a} {relation} {b}", f"{relation} {b} there is {a}")
        assert told[relation], sample.prompt
    for sample in (draw("text_to_image", "train", i, {"position": 1.0}) for i in range(40)):
        x, y = middle(sample.target, COLORS[sample.scene["objects"][0]["color"]])
        assert f"in the {'top' if y < 20 else 'bottom'} {'left' if x < 20 else 'right'}" in sample.prompt
        assert not 20 < x < 44 and not 20 < y < 44


def test_captions_are_english_in_more_than_one_phrasing():
    said = {draw("text_to_image", "train", i, {"count": 1.0}).prompt for i in range(500)}
    assert {"two red crosses", "there are three green circles", "four blue squares", "there are two white triangles"} <= said
