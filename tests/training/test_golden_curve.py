"""Twenty steps of every stage against the curves in `tests/golden`: a refactor shows the same numbers.

`DEEPGEN_WRITE_GOLDEN=1 python -m pytest tests/training/test_golden_curve.py` writes them anew, where a change of numerics is meant.
On the kind of machine that wrote them every bit counts. Under the project's settings it should on every x86 machine with AVX2, which
`DEEPGEN_EVERY_BIT=1` asks for; without it another CPU may differ by `ELSEWHERE`, as one with other settings surely does.
"""

import os
from pathlib import Path

import pytest
import torch

from runtime.files import read_json, write_json
from training.mr_grpo import run_mr_grpo
from training.supervised import run_supervised

from .conftest import begin, make_project, nano_params

GOLDEN = Path(__file__).parents[1] / "golden"
STAGES = ("alignment", "sft", "mr_grpo")
SERIES = {"alignment": ("loss", "grad_norm"), "sft": ("loss", "grad_norm"), "mr_grpo": ("loss", "grad_norm", "reward")}
STEPS = 20
ELSEWHERE = {"rtol": 1e-4, "atol": 1e-6}


def kind_of_machine() -> dict[str, str]:
    """What makes sums come out the same to the bit."""
    cpu = next((line.partition(": ")[2] for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), "")
    return {
        "cpu": cpu,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "mkl": os.environ.get("MKL_CBWR"),
        "torch": torch.__version__,
    }


@pytest.fixture(scope="module")
def curves(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, list[float]]]:
    params = nano_params()
    for stage in STAGES:
        params[stage] |= {"steps": STEPS, "checkpoint_every": STEPS}
    root = make_project(tmp_path_factory.mktemp("golden") / "project", params)
    curves = {}
    for stage in STAGES:
        with begin(root, stage) as run:
            run_mr_grpo(run) if stage == "mr_grpo" else run_supervised(run, stage)
        history = read_json(root / "outputs" / stage / "history.json")
        curves[stage] = {name: [row[name] for row in history] for name in SERIES[stage]}
    return curves


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_twenty_steps_have_the_numbers_that_they_had(curves: dict[str, dict[str, list[float]]], stage: str):
    file, ours = GOLDEN / f"loss_{stage}.json", curves[stage]
    if os.environ.get("DEEPGEN_WRITE_GOLDEN"):
        write_json(file, {"machine": kind_of_machine(), "series": ours})
    golden = read_json(file)
    assert all(len(series) == STEPS for series in ours.values())
    if golden["machine"] == kind_of_machine() or os.environ.get("DEEPGEN_EVERY_BIT"):
        assert ours == golden["series"]
        return
    for name, series in ours.items():
        torch.testing.assert_close(torch.tensor(series), torch.tensor(golden["series"][name]), **ELSEWHERE)
