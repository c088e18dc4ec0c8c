"""Files and folders are whole or absent."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from runtime.files import publish_folder, sha256_path, sweep_stale, write_atomic, write_json

WRITER = """
import sys
from pathlib import Path
from runtime.files import write_atomic
path, n = Path(sys.argv[1]), 0
print("go", flush=True)
while True:
    n += 1
    write_atomic(path, bytes([n % 256]) * 3_000_000)
"""


def test_a_writer_killed_at_any_moment_leaves_a_whole_file(tmp_path: Path):
    target = tmp_path / "file"
    for turn in range(8):
        process = subprocess.Popen([sys.executable, "-c", WRITER, str(target)], stdout=subprocess.PIPE)
        process.stdout.readline()
        time.sleep(0.02 + 0.013 * turn)
        process.send_signal(signal.SIGKILL)
        process.wait()
        if target.exists():
            content = target.read_bytes()
            assert len(content) == 3_000_000 and len(set(content)) == 1
    sweep_stale(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_failed_write_leaves_the_old_file_and_no_temporary(tmp_path: Path):
    write_atomic(tmp_path / "file", "old")
    with pytest.raises(ValueError, match="Out of range"):
        write_json(tmp_path / "file", {"loss": float("nan")})
    assert (tmp_path / "file").read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_published_folder_replaces_the_old_one_whole(tmp_path: Path):
    for number in ("1", "2"):
        temporary = tmp_path / "temporary"
        temporary.mkdir()
        (temporary / f"only-{number}").write_text(number)
        publish_folder(temporary, tmp_path / "final")
    assert [path.name for path in (tmp_path / "final").iterdir()] == ["only-2"]
    assert [path.name for path in tmp_path.iterdir()] == ["final"]


def test_the_old_folder_of_a_publisher_killed_in_the_swap_goes_with_the_next(tmp_path: Path):
    """It lies beside the output, where no run folder's sweep comes, and would count as an input of what reads the folder around it."""
    for name in (".final.999999999.old", f".final.{os.getppid()}.old", ".finals.999999999.old", "temporary"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    publish_folder(tmp_path / "temporary", tmp_path / "final")
    assert sorted(path.name for path in tmp_path.iterdir()) == [f".final.{os.getppid()}.old", ".finals.999999999.old", "final"]


def test_what_a_living_process_writes_is_not_swept(tmp_path: Path):
    mine, gone = tmp_path / f".x.{os.getpid()}.tmp", tmp_path / ".x.999999999.tmp"
    mine.write_text("")
    gone.write_text("")
    sweep_stale(tmp_path)
    assert mine.exists() and not gone.exists()


def test_a_folder_digest_sees_names_and_bytes_and_no_caches(tmp_path: Path):
    (tmp_path / "a").write_text("1")
    before = sha256_path(tmp_path)
    (tmp_path / "__pycache__").mkdir()
    (tmp_path / "__pycache__" / "a.pyc").write_text("x")
    assert sha256_path(tmp_path) == before
    (tmp_path / "a").rename(tmp_path / "b")
    assert sha256_path(tmp_path) != before
