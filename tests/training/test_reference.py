"""`python -m training check-reference`: what the reference computed passes, anything else does not."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import save_file

from runtime.exits import Plain
from training.reference import check_file

GOLDEN = Path(__file__).parents[1] / "golden" / "mr_grpo_reference.safetensors"


def changed(path: Path, tensor: str | None = None, **lists: list[dict[str, object]]) -> Path:
    """The golden file with one tensor moved, or with other lists of cases."""
    with safe_open(GOLDEN, "pt") as file:
        facts = json.loads(file.metadata()["json"]) | lists
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if tensor is not None:
        tensors[tensor] = tensors[tensor] + 1e-3
    save_file(tensors, path, {"json": json.dumps(facts)})
    return path


def test_every_output_of_the_reference_is_ours_too():
    rows = list(check_file(GOLDEN))
    assert len(rows) == 8 * 3 + 2 + 2
    assert all(row.holds for row in rows), [row for row in rows if not row.holds]


@pytest.mark.parametrize("tensor", ["sde0.std", "sde1.std", "sde2.mean", "sde3.log_prob", "advantages1.advantages", "policy0.loss"])
def test_an_output_that_differs_is_found(tmp_path: Path, tensor: str):
    rows = check_file(changed(tmp_path / "other.safetensors", tensor))
    assert [f"{row.case}.{row.output}" for row in rows if not row.holds] == [tensor]


@pytest.mark.parametrize("lists", [{"kl": [{}]}, {"sde": [], "advantages": [], "policy": []}, {"sde": [{"kind": "dance", "eta": 1}]}])
def test_a_case_that_is_not_known_is_refused_and_not_passed_over(tmp_path: Path, lists: dict[str, list[dict[str, object]]]):
    with pytest.raises(Plain, match="known are"):
        list(check_file(changed(tmp_path / "other.safetensors", **lists)))


@pytest.mark.slow
def test_the_command_prints_a_line_an_output_and_fails_where_one_differs(tmp_path: Path):
    wrong = changed(tmp_path / "wrong.safetensors", "sde2.mean")
    done = [
        subprocess.run([sys.executable, "-m", "training", "check-reference", str(file)], capture_output=True, text=True)
        for file in (GOLDEN, wrong)
    ]
    assert [one.returncode for one in done] == [0, 1]
    assert "DIFFERS" not in done[0].stdout and done[1].stdout.count("DIFFERS") == 1
    assert "1 outputs differ" in done[1].stderr
