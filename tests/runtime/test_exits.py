"""How a stage ends when it is told to."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from runtime import exits
from runtime.stage import guard
from runtime.store import Store, StoreError, StoreUnreachable

REPO = Path(__file__).parents[2]
STAGE = """
import time
from runtime.exits import StopRequest
stop = StopRequest()
stop.install()
print("ready", flush=True)
while not stop:
    time.sleep(0.05)
time.sleep(3)
print("saved", flush=True)
"""


def stage() -> "subprocess.Popen[str]":
    process = subprocess.Popen([sys.executable, "-c", STAGE], cwd=REPO, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def test_signals_that_come_together_are_one_request_and_the_state_is_saved():
    """The kernel sends one for each thread of a dying parent."""
    process = stage()
    for _ in range(3):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.1)
    said, _ = process.communicate()
    assert process.returncode == 0
    assert said.endswith("saved\n")


def test_a_second_signal_later_ends_the_process_at_once():
    process = stage()
    process.send_signal(signal.SIGINT)
    time.sleep(1.5)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate()
    assert process.returncode == 128 + signal.SIGINT
    assert "saved" not in said


LATE = """
import os, time
from runtime.exits import StopRequest
stop = StopRequest()
stop.install()

class Late:  # goes when the interpreter has put the default handlers back
    def __del__(self, write=os.write, sleep=time.sleep):
        write(1, b"ready")
        sleep(2)

late = Late()
{end}
"""


def test_a_signal_after_the_work_does_not_change_its_exit_code():
    for end, code in (("stop.over()", 0), ("", -signal.SIGTERM)):
        process = subprocess.Popen([sys.executable, "-c", LATE.format(end=end)], cwd=REPO, stdout=subprocess.PIPE)
        assert process.stdout is not None and process.stdout.read(5) == b"ready"
        process.send_signal(signal.SIGTERM)
        process.communicate()
        assert process.returncode == code


@pytest.mark.parametrize(("error", "code"), [(StoreUnreachable, exits.UNREACHABLE), (StoreError, exits.FAILED)])
def test_a_store_that_does_not_answer_is_told_from_one_that_can_not_be_used(error: type[Exception], code: int):
    with pytest.raises(SystemExit) as ended, guard("shards@part"):
        raise error("s3://bucket: no answer")
    assert ended.value.code == code


def test_a_store_that_fails_under_way_is_one_that_did_not_answer(tmp_path: Path):
    store = Store(f"file://{tmp_path}")
    (tmp_path / "a.tar").mkdir()  # can't be read as a file
    with pytest.raises(StoreUnreachable, match="a.tar"):
        store.read("a.tar", 0, 1)
