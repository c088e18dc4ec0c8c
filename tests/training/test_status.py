"""`python -m training status` says of every run folder what is true of it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from runtime.exits import Interrupted
from runtime.run_folder import ENDED, last_whole_checkpoint
from tests.runtime.test_notices import server, web
from training.status import RunStatus, print_status, read_status
from training.supervised import run_supervised

from .conftest import begin
from .test_resume import StopAt

HOLDER = """
import sys, time
from pathlib import Path
from runtime.exits import StopRequest
from runtime.stage import begin_stage
with begin_stage(Path.cwd(), "alignment", StopRequest()) as run:
    line = '{"time": %r, "step": 2, "total": 4, "rate": 0.5, "eta_s": 4.0, "loss": 0.25}'
    (run.folder / "progress.jsonl").write_text(line % time.time() + chr(10) + '{"time": 1')
    print("holding", flush=True)
    time.sleep(60)
"""


def only(root: Path) -> RunStatus:
    (row,) = read_status(root)
    return row


def test_a_run_is_stopped_then_finished_and_its_command_goes_on(project: Path, edit_params, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(Interrupted), begin(project, "alignment", StopAt(3)) as run:
        run_supervised(run, "alignment")
    stopped = only(project)
    assert (stopped.state, stopped.current, stopped.pid) == ("stopped", True, None)
    assert stopped.last_checkpoint == f"outputs/runs/alignment/{run.fingerprint}/step-000003"
    assert stopped.command is not None and "dvc repro --single-item alignment" in stopped.command

    edit_params(project, lambda params: params["alignment"].update(seed=99))
    other = only(project)
    assert other.current is False and other.command is None and "put them back" in other.note
    edit_params(project, lambda params: params["alignment"].update(seed=0))

    with begin(project, "alignment") as run:
        run_supervised(run, "alignment")
    done = only(project)
    assert (done.state, done.current, done.step, done.steps, done.command) == ("finished", True, 4, 4, None)
    assert done.loss is not None and done.rate is not None and done.rate > 0

    with pytest.raises(ValueError), begin(project, "alignment"):
        raise ValueError("an evil sample\nand more")
    failed = only(project)
    assert failed.state == "failed" and "an evil sample" in failed.note and failed.command is not None

    capsys.readouterr()
    print_status(read_status(project), as_json=True)
    assert json.loads(capsys.readouterr().out)[0]["state"] == "failed"
    print_status(read_status(project))
    assert f"* alignment {run.fingerprint}  failed, step 4 of 4" in capsys.readouterr().out


def test_a_writer_is_running_while_it_lives_and_dead_when_killed_however_fresh_its_heartbeat(project: Path):
    process = subprocess.Popen([sys.executable, "-c", HOLDER], cwd=project, stdout=subprocess.PIPE, text=True, env=dict(os.environ))
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "holding\n"
        running = only(project)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert (running.state, running.pid, running.step, running.loss) == ("running", process.pid, 2, 0.25)
    assert running.eta_s is not None and 0 <= running.eta_s <= 4.0
    dead = only(project)
    assert dead.heartbeat_age_s is not None and dead.heartbeat_age_s < 60
    assert (dead.state, dead.pid, dead.eta_s) == ("dead", None, None) and f"process {process.pid} is gone" in dead.note
    assert dead.command is not None, "it is resumable all the same"


def test_a_silent_writer_is_suspected(project: Path):
    with begin(project, "alignment") as run:
        row = {"time": time.time() - 3600, "step": 1, "total": 4, "rate": 1.0, "eta_s": 3.0}
        (run.folder / "progress.jsonl").write_text(json.dumps(row) + "\n")
        assert "it may hang" in only(project).note


def test_a_checkpoint_that_lacks_a_file_is_not_called_the_last_good_one(tmp_path: Path):
    for step, files in ((2, ["weights"]), (4, ["weights", "optimizer"])):
        folder = tmp_path / f"step-{step:06d}"
        folder.mkdir()
        (folder / "weights").write_text("")
        (folder / "complete.json").write_text(json.dumps(dict.fromkeys(files, "sha")))
    (tmp_path / "step-000006.bad").mkdir()
    assert last_whole_checkpoint(tmp_path) == tmp_path / "step-000002"


def test_broken_params_hide_no_run_and_no_torch_is_imported(project: Path):
    with begin(project, "alignment"):
        pass
    (project / "params.yaml").write_text("data: [")
    code = (
        "import sys; sys.argv = ['training', 'status', '--json']\n"
        "from training.__main__ import main; main(); assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=project, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(done.stdout)
    assert row["state"] == "finished" and row["current"] is None and "not YAML" in row["note"]


def test_no_run_at_all_is_said_so(project: Path, capsys: pytest.CaptureFixture[str]):
    shutil.rmtree(project / "outputs" / "runs", ignore_errors=True)
    print_status(read_status(project))
    assert "no run of alignment" in capsys.readouterr().out


def test_who_is_told_is_part_of_no_fingerprint_and_a_stage_tells_them(project: Path, edit_params):
    handler, seen = web()
    with begin(project, "alignment") as silent:
        pass
    with server(handler) as port:
        edit_params(project, lambda params: params["notices"].update(webhook=f"http://127.0.0.1:{port}/"))
        with pytest.raises(KeyError), begin(project, "alignment") as told:
            raise KeyError("weights")
        with begin(project, "alignment"):
            pass
        with begin(project, "mixture@sft"):
            pass
    assert told.fingerprint == silent.fingerprint
    sent = [json.loads(body) for _, _, body in seen]
    assert [(notice["stage"], notice["state"]) for notice in sent] == [("alignment", "failed"), ("alignment", "finished")]
    assert sent[0]["fingerprint"] == silent.fingerprint and "deepgen run" in sent[0]["command"]


def test_other_ranks_than_the_first_say_nothing(project: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RANK", "1")
    with begin(project, "alignment") as run:
        pass
    assert not (run.folder / ENDED).exists()
