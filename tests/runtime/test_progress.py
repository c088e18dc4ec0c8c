"""What long work tells of itself."""

import json
from pathlib import Path

import pytest

from runtime.progress import Progress


def test_the_last_line_says_how_far_how_fast_and_what_and_the_file_says_the_same(tmp_path: Path, capsys: pytest.CaptureFixture):
    with Progress(4, "step", "sft", tmp_path / "progress.jsonl", start=1, samples=8) as progress:
        for loss in (3.0, 2.0, 1.0):
            progress.update(loss=loss)
    (said,) = capsys.readouterr().out.splitlines()
    (row,) = map(json.loads, (tmp_path / "progress.jsonl").read_text().splitlines())
    assert said.startswith("sft: 4/4 steps  ") and "ETA 0:00  loss 1  samples_per_s " in said
    assert (row["step"], row["total"], row["loss"], row["eta_s"]) == (4, 4, 1.0, 0.0)
    assert row["samples_per_s"] == pytest.approx(8 * row["rate"], rel=1e-3)


def test_of_several_ranks_the_first_alone_tells(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    said = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        with Progress(1, "step", "sft") as progress:
            progress.update()
        assert progress.done == 1
        said.append(len(capsys.readouterr().out.splitlines()))
    assert said == [1, 0]
