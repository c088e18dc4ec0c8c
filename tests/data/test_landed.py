"""A part that follows what lands: its paths move to the new snapshot, its content is pinned, the rest of params.yaml stays."""

from pathlib import Path

import pytest

from data.adding import CannotAdd, change_in_params, landed_part
from data.config import PartConfig
from data.pinning import content_digest

LINE = '    own: {path: landing/own/a/list.json, images: landing/own/a/images, content: aa, min_scores: {x: 1.0}}  # "mine"'


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for snapshot in ("a", "b"):
        folder = tmp_path / "landing" / "own" / snapshot
        (folder / "images").mkdir(parents=True)
        (folder / "list.json").write_text(snapshot)
        (folder / "_SUCCESS").touch()
    (tmp_path / "params.yaml").write_text(f"data:\n  parts:\n{LINE}\n    other: {{path: landing/own/a/list.json}}\n")
    return tmp_path


def part(**more: str) -> PartConfig:
    paths = {"path": "landing/own/a/list.json", "images": "landing/own/a/images"} | more
    return PartConfig.model_validate({"source": "edit_json", "task": "image_edit", "split": "train", "licence": "CC0-1.0"} | paths)


def test_list_and_images_move_together_and_what_is_there_is_pinned(root: Path):
    moved = landed_part(root, "landing", "own", {"own": part()}, "b")
    assert (moved.path, moved.images) == ("landing/own/b/list.json", "landing/own/b/images")
    assert moved.content == content_digest(moved, root) != content_digest(part(), root)
    change_in_params(root / "params.yaml", "own", moved)
    text = LINE.replace("own/a", "own/b").replace("content: aa", f"content: {moved.content}")
    assert (root / "params.yaml").read_text() == f"data:\n  parts:\n{text}\n    other: {{path: landing/own/a/list.json}}\n"


def test_an_absolute_path_stays_one_and_a_place_elsewhere_stays_there(root: Path):
    (root / "pictures").mkdir()
    before = part(path=str(root / "landing" / "own" / "a" / "list.json"), images="pictures")
    moved = landed_part(root, str(root / "landing"), "own", {"own": before}, "b")
    assert (moved.path, moved.images) == (str(root.resolve() / "landing" / "own" / "b" / "list.json"), "pictures")


@pytest.mark.parametrize(
    ("landing", "name", "snapshot", "words"),
    [
        (None, "own", "b", "retrain.landing: null"),
        ("landing", "own", "c", "has no _SUCCESS"),
        ("landing", "other", "b", "has no 'other'.*--name other"),
    ],
)
def test_what_can_not_land_is_refused_with_what_to_do(root: Path, landing: str | None, name: str, snapshot: str, words: str):
    (root / "landing" / "other" / "b").mkdir(parents=True)
    (root / "landing" / "other" / "b" / "_SUCCESS").touch()
    with pytest.raises(CannotAdd, match=words):
        landed_part(root, landing, name, {"own": part()}, snapshot)


def test_a_part_that_reads_elsewhere_is_not_taken_over(root: Path):
    for path in ("elsewhere.json", "landing/own", "landing/own/../x.json"):
        with pytest.raises(CannotAdd, match="no snapshot in .*/landing/own; write one there first"):
            landed_part(root, "landing", "own", {"own": part(path=path)}, "b")


def test_params_of_another_layout_stay_as_they_are(root: Path):
    params = root / "params.yaml"
    params.write_text('data:\n  parts:\n    own:\n      path: "landing/own/a/list.json"\n')
    with pytest.raises(CannotAdd, match="Write under data.parts.own:\n  path: landing/own/b/list.json"):
        change_in_params(params, "own", landed_part(root, "landing", "own", {"own": part()}, "b"))
    assert '"landing/own/a/list.json"' in params.read_text()
