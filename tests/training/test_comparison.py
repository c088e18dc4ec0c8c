"""Two evaluations side by side: of the same samples, or not at all."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from runtime.exits import Plain
from runtime.files import write_json
from training.comparison import save_comparison

SIDE = 64


def evaluation(folder: Path, color: tuple[int, int, int], right: bool, measured_on: str = "set") -> Path:
    """What `training evaluate` keeps, of one image and one edit."""
    share = {"n": 1, "strict": float(right), "interval_95": [0.0, 1.0]}
    rows = {task: [{"key": task, "prompt": f"a {task}", "strict": right}] for task in ("text_to_image", "image_edit")}
    write_json(folder / "gates.json", {"evaluation_set_digest": measured_on})
    write_json(folder / "metrics.json", {task: share | {"kinds": {"single": share}} for task in rows})
    write_json(folder / "samples.json", rows)
    (folder / "images").mkdir()
    for name in ("text_to_image", "image_edit"):
        Image.new("RGB", (SIDE, SIDE), color).save(folder / "images" / f"{name}.png")
    for name in ("source-0", "target"):
        Image.new("RGB", (SIDE, SIDE), (0, 0, 255)).save(folder / "images" / f"image_edit.{name}.png")
    return folder


def test_each_sample_is_shown_as_both_drew_it_between_its_source_and_its_target(tmp_path: Path):
    red, green = evaluation(tmp_path / "a", (255, 0, 0), False), evaluation(tmp_path / "b", (0, 255, 0), True)
    saved = save_comparison({"champion": red, "challenger": green}, tmp_path / "out")
    assert sorted(path.name for path in saved) == ["accuracy.png", "samples_image_edit.png", "samples_text_to_image.png"]

    def middles(name: str, columns: int) -> list[tuple[int, ...]]:
        pixels = np.asarray(Image.open(tmp_path / "out" / name).convert("RGB"))
        width = pixels.shape[1] // columns
        return [tuple(int(value) for value in pixels[SIDE, width * i + width // 2]) for i in range(columns)]

    assert middles("samples_text_to_image.png", 2) == [(255, 0, 0), (0, 255, 0)]
    assert middles("samples_image_edit.png", 4) == [(0, 0, 255), (255, 0, 0), (0, 255, 0), (0, 0, 255)]


def test_evaluations_of_different_sets_are_not_shown_side_by_side(tmp_path: Path):
    one, other = evaluation(tmp_path / "a", (1, 1, 1), True), evaluation(tmp_path / "b", (1, 1, 1), True, "another set")
    with pytest.raises(Plain, match="different evaluation sets: champion on set, challenger on another set"):
        save_comparison({"champion": one, "challenger": other}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_without_an_evaluation_is_named(tmp_path: Path):
    with pytest.raises(Plain, match=f"challenger: there is no evaluation in {tmp_path / 'none'}"):
        save_comparison({"champion": evaluation(tmp_path / "a", (1, 1, 1), True), "challenger": tmp_path / "none"}, tmp_path / "out")
