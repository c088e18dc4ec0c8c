"""A rank that works is not taken for one that hangs."""

from pathlib import Path

import pytest

from training import supervised
from training.checkpoint import Checkpoints
from training.heartbeat import Heartbeat
from training.validation import Validation

from .conftest import begin


def test_a_step_a_look_at_held_out_samples_and_a_save_have_a_beat_each(project: Path, monkeypatch: pytest.MonkeyPatch):
    """Each may take `hang_seconds`: a long board is no reason to end before the checkpoint that comes after it."""
    heard: list[str] = []

    def tell(owner: type, method: str, word: str) -> None:
        real = getattr(owner, method)
        monkeypatch.setattr(owner, method, lambda *arguments: heard.append(word) or real(*arguments))

    tell(Heartbeat, "beat", "beat")
    tell(Validation, "look", "look")
    tell(Checkpoints, "save", "save")
    for name in ("publish_stage", "remember_start"):
        monkeypatch.setattr(supervised, name, lambda *_: None)
    with begin(project, "alignment") as run:
        supervised.run_supervised(run, "alignment")
    step, save = ["beat", "look", "beat"], ["save", "beat"]
    assert heard == ["beat", *step, *step, *save, *step, *step, *save]
