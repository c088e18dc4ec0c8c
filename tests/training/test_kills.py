"""A stage's own command, killed, killed again and run to its end. The many moments are in benchmarks/faults.py."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from runtime.files import tensors_digest

from .conftest import REPO
from .test_resume import run_stage

pytestmark = pytest.mark.slow


def command(root: Path, fault: str = "") -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(REPO), "DEEPGEN_FAULT": fault}
    return subprocess.Popen([sys.executable, "-m", "training", "alignment"], cwd=root, env=environment, stdout=subprocess.PIPE, text=True)


def test_killed_inside_a_save_and_between_steps_the_command_ends_with_the_bytes_of_a_run_that_was_not(project: Path, tmp_path: Path):
    undisturbed = tmp_path / "undisturbed"
    shutil.copytree(project, undisturbed, symlinks=True)
    run_stage(undisturbed, "alignment")

    assert command(project, "save:before_rename:2").wait(timeout=200) == -signal.SIGKILL
    (folder,) = (project / "outputs" / "runs" / "alignment").iterdir()
    half = ".step-000002.*.tmp"
    assert list(folder.glob(half)) and not list(folder.glob("step-*"))

    second, wait = command(project), random.uniform(0.0, 0.3)
    while second.poll() is None and not (folder / "step-000002").exists():
        time.sleep(0.01)
    time.sleep(wait)
    assert second.poll() is None, "it ended before it could be killed"
    second.kill()
    second.wait()
    assert not list(folder.glob(half)), "what the first left is swept"

    last = command(project)
    assert "alignment: going on from step " in last.communicate(timeout=200)[0] and last.returncode == 0
    for name in ("history.json", "model"):
        places = [root / "outputs" / "alignment" / name for root in (project, undisturbed)]
        first, other = [tensors_digest(place) if place.is_dir() else place.read_text() for place in places]
        assert first == other, f"{name} differs; the second kill came {wait:.3f} s after the save of step 2"
    assert not list((project / "outputs").rglob(".*.tmp"))
