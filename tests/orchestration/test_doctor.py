"""Each thing that can stop a run is found, named and given its remedy; where nothing is wrong, nothing is said to be."""

import json
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from orchestration import doctor
from orchestration.doctor import Finding, code_revisions, examine
from orchestration.pipeline_run import only_one
from runtime import exits
from tests.orchestration.conftest import PROJECT, Toy, free_port

DAGSTER = ("dagster", "_core/storage/alembic/versions")
MLFLOW = ("mlflow", "store/db_migrations/versions")


def found(toy: Toy) -> dict[str, Finding]:
    return {finding.check: finding for finding in examine(toy.root, free_port(), free_port())}


def only_finding(toy: Toy, check: str, state: str, *words: str) -> None:
    """`check`, and no other, is not ok; its line holds these words and a remedy."""
    findings = found(toy)
    assert {name for name, finding in findings.items() if finding.state != "ok"} == {check}, "\n".join(map(str, findings.values()))
    assert findings[check].state == state
    for word in words:
        assert word in str(findings[check])


@pytest.fixture
def sound(toy: Toy) -> Toy:
    """A toy that has not run yet, and with which nothing is wrong."""
    for name in ("constraints.txt", "constraints-dvc.txt"):
        shutil.copy(PROJECT / name, toy.root / name)
    toy.edit("threads: 2", "threads: 1")
    return toy


def database(path: Path, revision: str) -> None:
    """The one table of a migrated database that tells its revision."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("CREATE TABLE alembic_version (version_num TEXT)")
        connection.execute("INSERT INTO alembic_version VALUES (?)", (revision,))


def older(package: str, folder: str) -> str:
    known, head = code_revisions(package, folder)
    return min(known - {head})


def everything(root: Path) -> dict[str, tuple[int, int]]:
    """Size and time of every file, but for those that SQLite makes for a reader."""
    files = [path for path in root.rglob("*") if path.is_file() and not path.name.endswith(("-shm", "-wal"))]
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in files}


def test_a_sound_clone_that_has_not_run_is_all_ok_and_is_left_as_it_is(sound: Toy):
    before = everything(sound.root)
    assert {finding.state for finding in found(sound).values()} == {"ok"}, "\n".join(map(str, found(sound).values()))
    assert everything(sound.root) == before


def test_it_imports_neither_torch_nor_mlflow(sound: Toy):
    code = (
        "import sys; from pathlib import Path; from orchestration.doctor import examine\n"
        "list(examine(Path.cwd(), 1, 2)); assert not {'torch', 'mlflow'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=sound.root, check=True)


def test_what_is_wrong_makes_the_exit_code_and_a_program_reads_it_as_json(sound: Toy):
    sound.edit("steps: 4\n", "steps: -4\n")
    ports = ["--dagster-port", str(free_port()), "--mlflow-port", str(free_port())]
    done = sound.deepgen("doctor", *ports)
    assert done.returncode == exits.FAILED and "wrong  params.yaml" in done.stdout and "alignment.steps" in done.stdout
    rows = json.loads(sound.deepgen("doctor", "--json", *ports).stdout)
    (row,) = [row for row in rows if row["state"] == "wrong"]
    assert row["check"] == "params.yaml" and row["mend"]
    sound.edit("steps: -4\n", "steps: 4\n")
    assert sound.deepgen("doctor", *ports).returncode == exits.DONE


def test_a_package_that_is_not_the_pinned_one_is_named_with_both_versions(sound: Toy):
    sound.edit("mlflow==", "mlflow==9", "constraints.txt")
    only_finding(sound, "packages", "warn", "(pinned 9", "make setup")


def test_a_dvc_of_another_version_and_one_that_is_missing_are_told(sound: Toy, monkeypatch: pytest.MonkeyPatch):
    sound.edit("dvc==", "dvc==9", "constraints-dvc.txt")
    only_finding(sound, "dvc packages", "warn", "(pinned 9", "make setup")
    monkeypatch.setenv("DVC_BIN", "/nowhere/dvc")
    only_finding(sound, "dvc packages", "wrong", "/nowhere/dvc", "make setup")


def test_selection_strings_that_break_are_told_with_the_antlr_that_breaks_them(sound: Toy, monkeypatch: pytest.MonkeyPatch):
    def refuse(_: str) -> None:
        raise TypeError("ord() expected string of length 1, but int found")

    monkeypatch.setattr("dagster.AssetSelection.from_string", refuse)
    only_finding(sound, "selection strings", "wrong", "antlr4-python3-runtime is", "make setup")


def test_more_threads_than_cores_and_threads_that_never_sleep_are_told(sound: Toy, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    only_finding(sound, "threads", "warn", "unset OMP_WAIT_POLICY")
    sound.edit("threads: 1", "threads: 4096")
    only_finding(sound, "threads", "warn", "4096 asked for", "launch.threads: ")


@pytest.mark.parametrize(("free", "state"), [(4e9, "warn"), (1e8, "wrong")])
def test_little_free_disk_is_told(sound: Toy, monkeypatch: pytest.MonkeyPatch, free: float, state: str):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    only_finding(sound, "free disk", state, "deepgen gc")


def test_a_place_that_is_no_folder_or_can_not_be_written_is_named(sound: Toy, monkeypatch: pytest.MonkeyPatch):
    (sound.root / "outputs").write_text("")
    only_finding(sound, "folders", "wrong", str(sound.root / "outputs"))
    (sound.root / "outputs").unlink()
    (sound.root / "outputs").mkdir()
    allowed = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: "outputs" not in str(path) and allowed(path, mode))  # root may write anywhere
    only_finding(sound, "folders", "wrong", str(sound.root / "outputs"))


def test_a_busy_port_is_told_with_the_option_that_avoids_it(sound: Toy):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        findings = {finding.check: finding for finding in examine(sound.root, port, free_port())}
    assert findings["port of Dagster"].state == "warn" and f"--dagster-port {port + 1}" in findings["port of Dagster"].mend
    assert findings["port of MLflow"].state == "ok"


def test_a_cache_whose_objects_are_the_outputs_themselves_is_wrong(sound: Toy):
    (sound.root / ".dvc" / "config.local").write_text("[cache]\n    type = hardlink,copy\n")
    only_finding(sound, "dvc cache", "wrong", "hardlink", "dvc config --local cache.type reflink,copy")


def test_a_remote_that_is_taken_unverified_is_told(sound: Toy):
    config = sound.root / ".dvc" / "config.local"
    config.write_text("['remote \"store\"']\n    url = /tmp/store\n")
    only_finding(sound, "dvc cache", "warn", "dvc remote modify store verify true")
    config.write_text("['remote \"store\"']\n    url = /tmp/store\n    verify = true\n")
    assert found(sound)["dvc cache"].state == "ok"


@contextmanager
def process(*words: str) -> Iterator[int]:
    """A process that waits, with `words` in its command line."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", *words])
    try:
        yield child.pid
    finally:
        child.kill()
        child.wait()


def test_a_dvc_lock_of_a_process_that_is_gone_or_that_is_another_by_now_is_told(sound: Toy):
    rwlock = sound.root / ".dvc" / "tmp" / "rwlock"
    rwlock.parent.mkdir(exist_ok=True)

    def hold(pid: int) -> None:
        row = {"pid": pid, "cmd": "dvc repro"}
        rwlock.write_text(json.dumps({"write": {"/a": row}, "read": {"/b": [row]}}))

    with process() as stranger:
        hold(stranger)
        only_finding(sound, "dvc locks", "wrong", str(stranger), "rm .dvc/tmp/rwlock")
    hold(stranger)
    only_finding(sound, "dvc locks", "warn", str(stranger), "was killed")
    with process("dvc", "repro") as alive:
        hold(alive)
        assert found(sound)["dvc locks"].state == "ok"
    rwlock.write_text("{")
    only_finding(sound, "dvc locks", "wrong", "rm .dvc/tmp/rwlock")


def test_a_lock_that_a_killed_git_left_is_told(sound: Toy):
    lock = sound.root / ".git" / "index.lock"
    lock.write_text("")
    only_finding(sound, "git lock", "wrong", f"rm {lock}")


def test_a_run_under_way_is_named_with_its_process(sound: Toy):
    with only_one(sound.root):
        assert found(sound)["running"].found == f"deepgen run, process {os.getpid()}"
    assert found(sound)["running"].found == "nothing"


def test_a_database_of_an_older_revision_is_told_with_the_command_that_migrates_it(sound: Toy):
    home = sound.root / "outputs" / "dagster"
    database(home / "history" / "runs" / "index.db", older(*DAGSTER))
    only_finding(sound, "Dagster's database", "wrong", "index.db", f"DAGSTER_HOME={home} dagster instance migrate")
    shutil.rmtree(home)
    store = sound.root / "outputs" / "mlflow" / "mlflow.db"
    database(store, older(*MLFLOW))
    only_finding(sound, "MLflow's store", "wrong", f"mlflow db upgrade sqlite:///{store}")


def test_a_database_of_a_newer_version_of_the_package_is_told(sound: Toy):
    database(sound.root / "outputs" / "mlflow" / "mlflow.db", "0123456789ab")
    only_finding(sound, "MLflow's store", "wrong", "a newer one made it")


def test_a_broken_database_is_told_and_the_other_checks_still_speak(sound: Toy):
    store = sound.root / "outputs" / "mlflow" / "mlflow.db"
    store.parent.mkdir(parents=True)
    store.write_text("no database" * 1000)
    only_finding(sound, "MLflow's store", "wrong", "not a database")


def test_a_tracking_server_that_does_not_answer_is_told(sound: Toy, monkeypatch: pytest.MonkeyPatch):
    address = f"http://127.0.0.1:{free_port()}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    only_finding(sound, "MLflow's store", "wrong", address, "unset MLFLOW_TRACKING_URI")


@pytest.mark.parametrize(("status", "state"), [(200, "ok"), (403, "wrong")])
def test_a_tracking_server_is_asked_whether_it_is_well(sound: Toy, monkeypatch: pytest.MonkeyPatch, status: int, state: str):
    class Health(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/health" else 404)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Health) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{server.server_port}/")
        assert found(sound)["MLflow's store"].state == state
        server.shutdown()


@pytest.mark.slow
def test_a_clone_that_has_run_is_all_ok_until_its_databases_age_and_its_run_dies(copy: Toy):
    for name in ("constraints.txt", "constraints-dvc.txt"):
        shutil.copy(PROJECT / name, copy.root / name)
    copy.edit("threads: 2", "threads: 1")
    before = everything(copy.root)
    assert {finding.state for finding in found(copy).values()} == {"ok"}, "\n".join(map(str, found(copy).values()))
    assert everything(copy.root) == before
    runs = copy.root / "outputs" / "dagster" / "history" / "runs.db"
    with closing(sqlite3.connect(runs)) as connection, connection:
        connection.execute("UPDATE runs SET status = 'STARTED'")
    only_finding(copy, "Dagster's runs", "warn", "nothing executes them")
    with closing(sqlite3.connect(runs)) as connection, connection:
        connection.execute("UPDATE runs SET status = 'SUCCESS'")
        connection.execute("UPDATE alembic_version SET version_num = ?", (older(*DAGSTER),))
    only_finding(copy, "Dagster's database", "wrong", "runs.db", "dagster instance migrate")
