"""Ours against tensors that the reference implementation computed (tests/golden)."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from model.reference import check_file

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.mark.parametrize("name", ["dit", "scb", "condition"])
def test_ours_computes_what_the_reference_does(name: str):
    rows = list(check_file(GOLDEN / f"{name}_reference.safetensors"))
    assert rows
    assert not [row for row in rows if not row.holds]


def test_a_file_that_differs_is_told_apart(tmp_path: Path):
    with safe_open(GOLDEN / "scb_reference.safetensors", "pt") as file:
        facts, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    tensors["case1.pooled_prompt_embeds"] += 1e-3
    save_file(tensors, tmp_path / "changed.safetensors", facts)
    wrong = [row for row in check_file(tmp_path / "changed.safetensors") if not row.holds]
    assert [(row.case, row.output) for row in wrong] == [("case1", "pooled_prompt_embeds")]


def test_a_file_of_another_kind_is_refused(tmp_path: Path):
    save_file({"case0.x": torch.zeros(1)}, tmp_path / "x.safetensors", {"json": "{}"})
    with pytest.raises(ValueError, match="expected cases of the DiT, of SCB or of the condition"):
        list(check_file(tmp_path / "x.safetensors"))
