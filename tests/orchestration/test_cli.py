"""The command line: quick to answer, plain in refusing."""

import json
import os
import socket
import subprocess
import time

from runtime import exits
from tests.orchestration.conftest import DEEPGEN, Toy


def test_help_and_errors_come_in_about_a_second(toy: Toy):
    for arguments, code in ((["--help"], 0), (["preset", "use", "nobody"], exits.BAD_PARAMS), (["run", "--nonsense"], 2)):
        began = time.monotonic()
        assert toy.deepgen(*arguments).returncode == code
        assert time.monotonic() - began < 1.5 * (1 + os.getloadavg()[0])  # the bound is for an idle core


def test_outside_a_project_it_says_so(tmp_path):
    done = subprocess.run([DEEPGEN, "run"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == exits.FAILED and "no params.yaml beside a dvc.yaml" in done.stderr and "Traceback" not in done.stderr


def test_a_preset_replaces_another_and_the_list_marks_it(toy: Toy):
    assert toy.deepgen("preset", "use", "tiny").returncode == 0
    assert toy.params.preset == "tiny"
    lines = toy.deepgen("preset", "list").stdout.splitlines()
    assert [line.split()[1] for line in lines if line.startswith("*")] == ["tiny"]


def test_a_preset_does_not_replace_edits_that_are_written_nowhere_else(toy: Toy):
    toy.edit("seed: 12", "seed: 1212")
    done = toy.deepgen("preset", "use", "tiny")
    assert done.returncode == exits.BAD_PARAMS
    assert "cp params.yaml presets/mine.yaml" in done.stderr and "git checkout params.yaml" in done.stderr
    assert "seed: 1212" in (toy.root / "params.yaml").read_text()
    git = ["git", "-c", "user.name=toy", "-c", "user.email=toy@example.org", "commit", "-qam", "mine"]
    subprocess.run(git, cwd=toy.root, check=True)
    assert toy.deepgen("preset", "use", "tiny").returncode == 0, "what is committed can be replaced"


def test_a_preset_that_is_unknown_or_broken_is_refused_by_name(toy: Toy):
    assert "allowed: " in toy.deepgen("preset", "use", "nobody").stderr
    (toy.root / "presets" / "broken.yaml").write_text("preset: broken\n")
    done = toy.deepgen("preset", "use", "broken")
    assert done.returncode == exits.BAD_PARAMS and "data: missing" in done.stderr
    assert toy.params.preset == "smoke"


def test_the_schema_names_every_section(toy: Toy):
    schema = json.loads(toy.deepgen("preset", "schema").stdout)
    assert {"data", "model", "sft", "gates"} <= set(schema["properties"])


def test_a_busy_port_is_told_before_anything_starts(toy: Toy):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = toy.deepgen("ui", "--dagster-port", str(port))
    assert done.returncode == exits.LOCKED and f"port {port}" in done.stderr and "--dagster-port" in done.stderr
    assert not (toy.root / "outputs").exists()


def test_a_model_folder_that_is_not_there_is_told(toy: Toy):
    done = toy.deepgen("generate", "a red circle", "--out", "x.png", "--model", "nowhere")
    assert done.returncode == exits.FAILED and "nowhere: no such folder" in done.stderr
