from typing import Any

import pytest
from pydantic import ValidationError

from data.config import DataConfig, MixtureConfig, PartConfig

PART = {"source": "drawn", "task": "text_to_image", "split": "train", "samples": 8, "seed": 1, "licence": "CC0-1.0"}
DATA: dict[str, Any] = {"image_size": 64, "shard_samples": 4, "store": None, "parts": {"captions": PART}}
MIXTURE = {"seed": 1, "ratio": {"image_edit": 1, "text_to_image": 3}, "parts": {"captions": 1.0, "edits": 1.0}}


def test_the_settings_of_the_readme_are_taken_as_written():
    assert DataConfig.model_validate(DATA).parts["captions"].category == "general"
    assert MixtureConfig.model_validate(MIXTURE).ratio["text_to_image"] == 3


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"kinds": {"recolor": 1.0}}, r"kinds: .*recolor.* allowed for text_to_image: .*single"),
        ({"kinds": {}}, "kinds: {} given; allowed"),
        ({"kinds": {"word": 0}}, "kinds.word"),
        ({"licence": "  "}, "licence"),
        ({"samples": 0}, "samples"),
        ({"split": "test"}, "'train', 'validation' or 'evaluation'"),
        ({"sauce": "drawn"}, "sauce"),
    ],
)
def test_an_impossible_part_is_refused_by_key(change, told):
    with pytest.raises(ValidationError, match=told):
        PartConfig.model_validate(PART | change)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"image_size": 96}, "image_size: 96 given, but 'captions' is drawn at 64; allowed: 64"),
        ({"image_size": 50}, "image_size"),
        ({"parts": {"../captions": PART}}, "parts"),
        ({"parts": {}}, "parts"),
    ],
)
def test_an_impossible_catalogue_is_refused_by_key(change, told):
    with pytest.raises(ValidationError, match=told):
        DataConfig.model_validate(DATA | change)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"ratio": {"image_edit": 0, "text_to_image": 0}}, "ratio: .* sums to 0; at least one task must be above 0"),
        ({"ratio": {}}, "ratio: {} sums to 0"),
        ({"ratio": {"edit": 1}}, "'text_to_image' or 'image_edit'"),
        ({"ratio": {"image_edit": -1}}, "ratio.image_edit"),
        ({"parts": {"captions": 0.0}}, "parts: .* sums to 0"),
        ({"parts": {"captions": float("inf")}}, "parts.captions"),
    ],
)
def test_an_impossible_mixture_is_refused_by_key(change, told):
    with pytest.raises(ValidationError, match=told):
        MixtureConfig.model_validate(MIXTURE | change)
