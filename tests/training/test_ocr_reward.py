"""Text in images as a reward: what a prompt quotes, how near what was read comes to it, and a real engine on rendered words."""

import random
import socket
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from data.prompts import read_prompts
from training.rewards import ocr
from training.rewards.ocr import OCR, NoOCR, extend, nearness, quoted, similarity, word_accuracy
from training.rewards.scores import Group

SAMPLES = Path(__file__).parents[3] / "shared" / "samples" / "prompts" / "deepgen_rl"


def group_of(prompt: str, *images: np.ndarray, task: str = "text_to_image") -> Group:
    return Group("0:x", task, prompt, images or (np.zeros((8, 8, 3), np.uint8),), {})


@pytest.mark.parametrize(
    ("prompt", "strings"),
    [
        ('a sign that says "OPEN" and one that says "Closed now"', ("OPEN", "Closed now")),
        ("a shop called “Bean & Leaf”, and a poster „Guten Tag“", ("Bean & Leaf", "Guten Tag")),
        ("une affiche «Bonjour»", ("Bonjour",)),
        ("the baker's sign isn't readable", ()),
        ('an empty "" and a blank " "', ()),
        ('one quote " only', ()),
    ],
)
def test_all_strings_in_double_quotes_are_asked_for(prompt: str, strings: tuple[str, ...]):
    assert quoted(prompt) == strings


@pytest.mark.skipif(not SAMPLES.is_dir(), reason="shared samples are absent")
def test_of_the_real_prompts_those_for_text_all_quote_something_and_the_others_do_not():
    texts = read_prompts(next(SAMPLES.rglob("unigenbench_train_data_ocr*")))
    general = read_prompts(next(SAMPLES.rglob("unigenbench_train_data_general*")))
    assert all(quoted(prompt) for prompt in texts) and len(texts) > 100
    assert sum(bool(quoted(prompt)) for prompt in general) == 0


@pytest.mark.parametrize(("one", "other", "apart"), [("kitten", "sitting", 3), ("", "abc", 3), ("abc", "abc", 0), ("flaw", "lawn", 2)])
def test_the_distance_is_levenshteins(one: str, other: str, apart: int):
    for text, read in ((one, other), (other, one)):
        row = np.arange(len(text) + 1)
        assert extend(row, text, read)[-1] == apart
        assert extend(extend(row, text, read[:3]), text, read[3:])[-1] == apart, "read in two pieces"


def test_the_nearest_run_of_lines_is_that_of_all_runs_compared_one_by_one():
    rng = random.Random(0)
    for _ in range(200):
        text, *lines = ("".join(rng.choices("abc", k=rng.randint(1, 6))) for _ in range(rng.randint(1, 6)))
        runs = ["".join(lines[first:last]) for first in range(len(lines)) for last in range(first + 1, len(lines) + 1)]
        assert nearness(text, lines) == max((1 - apart(text, run) / max(len(text), len(run)) for run in runs), default=0.0)
    assert nearness("abcdefghij", ["abcdefghix", "j"]) == 1 - 1 / 11, "nearly as good without its end"


@cache
def apart(one: str, other: str) -> int:
    """The edit distance by its definition."""
    if not one or not other:
        return len(one) + len(other)
    return min(apart(one[1:], other) + 1, apart(one, other[1:]) + 1, apart(one[1:], other[1:]) + (one[0] != other[0]))


def test_a_string_is_as_near_as_its_best_match_among_lines_and_runs_of_them():
    assert similarity(["Grand Opening"], ["GRAND", "opening"]) == 1.0
    assert similarity(["open"], ["open", "closed until tomorrow"]) == 1.0
    assert similarity(["open"], ["opan"]) == 0.75
    assert similarity(["open"], []) == 0.0
    assert similarity(["open", "closed now"], ["open"]) == pytest.approx((4 + 9 * (1 - 6 / 9)) / 13)


def test_a_word_counts_as_often_as_it_is_quoted():
    assert word_accuracy(["ha ha"], ["ha"]) == 0.5
    assert word_accuracy(["Big Sale"], ["sale, BIG!"]) == 1.0
    assert word_accuracy(["Big Sale"], ["bigsale"]) == 0.0


def test_a_prompt_that_quotes_nothing_and_an_edit_are_not_asked_about():
    reward = OCR(["ocr", "ocr_words"], read=lambda image: 1 / 0)  # type: ignore[arg-type, return-value]
    for group in (group_of("a red circle"), group_of('write "HI"', task="image_edit")):
        scores = reward(group)
        assert not scores.applies.any() and scores.coverage == 1.0
    assert reward.facts() == {"ocr/images": 0.0, "ocr/failed": 0.0}


def test_an_image_that_the_engine_fails_on_is_missing_and_not_nought():
    def read(image: np.ndarray) -> list[str]:
        if image[0, 0, 0] == 0:
            raise RuntimeError("no memory")
        return ["hi"]

    reward = OCR(["ocr_words", "ocr"], read)
    scores = reward(group_of('"hi"', np.zeros((8, 8, 3), np.uint8), np.ones((8, 8, 3), np.uint8)))
    assert scores.valid.tolist() == [[False, False], [True, True]] and scores.values[1].tolist() == [1.0, 1.0]
    assert scores.applies.all() and reward.facts() == {"ocr/images": 2.0, "ocr/failed": 1.0}


def rendered(*lines: tuple[str, int]) -> np.ndarray:
    image = Image.new("RGB", (512, 512), (235, 235, 225))
    pen = ImageDraw.Draw(image)
    for i, (text, size) in enumerate(lines):
        pen.text((40, 80 + 150 * i), text, font=ImageFont.load_default(size=size), fill=(150, 20, 30))
    return np.asarray(image)


@pytest.mark.parametrize("package", ["rapidocr", "onnxruntime"])
def test_without_either_package_it_says_what_to_install(package: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(NoOCR, match=r'need rapidocr and onnxruntime: pip install -c constraints\.txt "\.\[ocr\]"'):
        ocr.rapidocr()


@pytest.mark.slow
def test_the_engine_of_the_package_reads_rendered_words_without_a_network(monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object) -> None:
        raise AssertionError("it goes to the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    reward = OCR(["ocr", "ocr_words"])
    images = rendered(("Grand Opening", 48), ("Sale", 64)), rendered(("Grand Closing", 48)), rendered()
    scores = reward(group_of('a poster "Grand Opening" and below "Sale"', *images))
    assert scores.valid.all() and scores.values[0].tolist() == [1.0, 1.0]
    assert 0.3 < scores.values[1, 0] < 0.8 and scores.values[1, 1] == pytest.approx(1 / 3)
    assert scores.values[2].tolist() == [0.0, 0.0]
