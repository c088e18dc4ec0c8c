"""The printing verbs of `python -m data`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from data.__main__ import main
from runtime import exits

REPO = Path(__file__).parents[2]


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> int | str | None:
    monkeypatch.setattr(sys, "argv", ["data", *words])
    try:
        main()
    except SystemExit as end:
        return end.code
    return exits.DONE


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    (tmp_path / "letters.txt").write_text("".join(f"letter {i}\n" for i in range(10)))
    (tmp_path / "scenes.jsonl").write_text("".join(json.dumps({"key": str(i), "prompt": f"scene\n{i}"}) + "\n" for i in range(30)))
    text = """
datasets:
  - {name: ocr, path: letters.txt, sample_weight: 3, rewards: [{ocr: 0.7}, {clip: 0.3}]}
  - {name: general, path: scenes.jsonl, rewards: {unified: 1}}
"""
    (tmp_path / "recipe.yaml").write_text(text)
    return tmp_path / "recipe.yaml"


def test_a_recipe_is_shown_as_its_sets_with_their_share_of_the_draws(recipe: Path, monkeypatch, capsys):
    assert run(monkeypatch, "prompts", str(recipe)) == exits.DONE
    printed = capsys.readouterr().out
    lines = [" ".join(line.split()) for line in printed.splitlines()]
    assert "ocr 10 3 50.0% ocr 0.7, clip 0.3" in lines and "general 30 1 50.0% unified 1" in lines
    assert printed.count("  letter ") == 3 and "  scene 2\n" in printed and "scene 3" not in printed


def test_a_prompt_file_is_shown_with_its_layout_and_written_whole(recipe: Path, monkeypatch, capsys):
    out = recipe.with_name("read.jsonl")
    assert run(monkeypatch, "prompts", str(recipe.with_name("scenes.jsonl")), "--out", str(out)) == exits.DONE
    assert "scenes.jsonl: 30 prompts, DPG-Bench, lines\n  scene 0\n" in capsys.readouterr().out
    assert [json.loads(line)["prompt"] for line in out.read_text().splitlines()] == [f"scene\n{i}" for i in range(30)]
    assert run(monkeypatch, "prompts", str(recipe), "--out", str(out)) == exits.DONE
    assert json.loads(out.read_text().splitlines()[10]) == {"set": "general", "prompt": "scene\n0"}


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("none.json", None, "none.json"),
        ("other.json", '[{"question": "why"}]', "keys ['question'] are of no layout we read"),
        ("recipe.yaml", "datasets: [{name: a, path: gone.txt, rewards: {ocr: 1}}]", "1 of which are missing: a"),
        ("broken.yaml", "datasets: [", "broken.yaml is not YAML"),
        ("wrong.yaml", "datasets: [{name: a, path: a.txt, rewards: {ocr: 0}}]", "sums to 0; at least one weight must be above 0"),
    ],
)
def test_what_can_t_be_read_is_one_message(tmp_path: Path, monkeypatch, capsys, name: str, content: str | None, told: str):
    if content is not None:
        (tmp_path / name).write_text(content)
    assert run(monkeypatch, "prompts", str(tmp_path / name)) in (exits.FAILED, exits.BAD_PARAMS)
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["catalog", "check"])  # more than a buffer holds, and less
def test_a_verb_whose_reader_has_left_ends_quietly(verb: str):
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-m", "data", verb], cwd=REPO, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (exits.NO_READER, "")


def test_a_recipe_s_prompts_are_looked_for_in_evaluation_files(recipe: Path, monkeypatch, capsys):
    """Each file by itself: what two of them hold is told twice."""
    test, other = recipe.with_name("test.txt"), recipe.with_name("other.jsonl")
    test.write_text("Letter 3.\nscene 7\nscene 99\n")
    other.write_text(json.dumps({"key": "a", "prompt": "letter 3"}) + "\n")
    assert run(monkeypatch, "prompts", str(recipe), "--against", str(test), str(other)) == exits.DONE
    told = capsys.readouterr().out.split("\n\n")[-1]
    assert told.splitlines() == [
        f"ocr: 1 of 10 prompts are in {test}",
        "  ocr[3] is test.txt[0]: the same prompt",
        f"general: 1 of 30 prompts are in {test}",
        "  general[7] is test.txt[1]: the same prompt",
        f"ocr: 1 of 10 prompts are in {other}",
        "  ocr[3] is other.jsonl[0]: the same prompt",
        f"general: 0 of 30 prompts are in {other}",
    ]
    assert run(monkeypatch, "prompts", str(recipe.with_name("letters.txt")), "--against", str(other)) == exits.DONE
    assert f"letters.txt: 1 of 10 prompts are in {other}" in capsys.readouterr().out
    assert run(monkeypatch, "prompts", str(recipe), "--against", str(recipe.with_name("gone.txt"))) == exits.FAILED
