"""The challenger's page shows it beside the champion, whose pictures were kept when it was registered."""

from pathlib import Path

import pytest
from PIL import Image

from orchestration.comparison import COMPARISON, side_by_side
from orchestration.registry import CHALLENGER, GATES, KEPT, Registry
from tests.orchestration.conftest import Toy
from tests.orchestration.promoting import challenge, edit_gates, second_model

pytestmark = pytest.mark.slow


def compared(registry: Registry) -> tuple[dict[str, Path], str]:
    challenger = registry.by_alias(CHALLENGER)
    assert challenger is not None
    return side_by_side(registry, challenger)


def test_a_challenger_is_shown_beside_the_champion_as_that_was_when_it_was_evaluated(copy: Toy):
    second_model(copy)
    for image in (copy.root / GATES.parent / "images").iterdir():
        Image.new("RGB", (256, 256), (255, 0, 0)).save(image)
    registry = challenge(copy)
    pictures, told = compared(registry)
    assert told == "beside champion version 1"
    assert sorted(pictures) == [f"beside the champion: {name}" for name in ("accuracy", "samples_image_edit", "samples_text_to_image")]
    shown = Image.open(pictures["beside the champion: samples_text_to_image"]).convert("RGB")
    left, right = (shown.getpixel((shown.width * quarter // 4, 70)) for quarter in (1, 3))
    assert len(set(left)) == 1, "the champion's is the gray one that it was registered with"
    assert right == (255, 0, 0)
    logged = registry.client.list_artifacts(registry.by_alias(CHALLENGER).run_id, COMPARISON)
    assert len(logged) == 3


def test_the_champion_is_not_shown_beside_itself(copy: Toy):
    assert compared(challenge(copy)) == ({}, "version 1 is the champion")


def test_a_challenger_of_another_evaluation_set_is_not_compared_and_says_so(copy: Toy):
    second_model(copy)
    edit_gates(copy, evaluation_set_digest="0" * 64)
    pictures, told = compared(challenge(copy))
    assert pictures == {} and "measured on different evaluation sets" in told


def test_another_models_evaluation_is_not_shown_as_the_challengers(copy: Toy):
    second_model(copy)
    edit_gates(copy, model_digest="0" * 64)
    assert compared(challenge(copy)) == ({}, "the evaluation on disk is not of these weights")


def test_where_the_champions_pictures_are_gone_it_is_said(copy: Toy):
    second_model(copy)
    registry = challenge(copy)
    for folder in (copy.root / "outputs" / "mlflow" / "artifacts").rglob(KEPT):
        folder.rename(folder.with_name("elsewhere"))
    assert compared(registry) == ({}, "the pictures of champion version 1 were not kept when it was registered")
