"""Processes that open a fresh clone's databases at once: none may fail, and what they leave must be usable.

    python benchmarks/cold_start.py [--rounds 20] [--processes 4] [--json FILE]

Each process makes Dagster's home and MLflow's store as every command does, reads runs and pools, and logs a metric; all are let go at the
same moment, on an empty folder. After each round one more process does the same, and each database must have one schema revision and hold
every run that was logged.
Goal: no process fails, no run is lost, in any round.
"""

import argparse
import os
import sqlite3
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # not this folder, whose data.py would hide a room
from runtime.files import write_json

REPO = Path(__file__).resolve().parents[1]
OPEN = """
import sys, time
from pathlib import Path
root = Path(sys.argv[1])
import dagster as dg
from mlflow import MlflowClient
from orchestration.stores import init_stores
from runtime.mlflow_store import open_store
(root / f"ready-{sys.argv[2]}").write_text("")
while not (root / "go").exists():
    time.sleep(0.001)
init_stores(root)
with dg.DagsterInstance.get() as instance:
    instance.get_runs()
    instance.event_log_storage.get_pool_limits()
client = MlflowClient(open_store(root))
client.log_metric(client.create_run(client.get_experiment_by_name("deepgen").experiment_id).info.run_id, "x", 1.0)
"""


def open_at_once(root: Path, processes: int) -> list[str]:
    """What each of the processes said on failing; nothing where it did not."""
    environment = os.environ | {"PYTHONPATH": str(REPO)}
    started = [
        subprocess.Popen([sys.executable, "-c", OPEN, str(root), str(n)], env=environment, stderr=subprocess.PIPE, text=True)
        for n in range(processes)
    ]
    while any(process.poll() is None for process in started) and len(list(root.glob("ready-*"))) < processes:
        time.sleep(0.01)
    (root / "go").write_text("")
    said = [process.communicate(timeout=300)[1] for process in started]
    return [words if process.returncode else "" for process, words in zip(started, said, strict=True)]


def problems_of(root: Path, runs: int) -> list[str]:
    """What is wrong with the databases that were left."""
    problems = []
    for database in [root / "outputs" / "mlflow" / "mlflow.db", *sorted((root / "outputs" / "dagster").rglob("*.db"))]:
        with closing(sqlite3.connect(database)) as connection:
            tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            if (check := connection.execute("PRAGMA integrity_check").fetchone()[0]) != "ok":
                problems.append(f"{database.name}: {check}")
            revisions = connection.execute("SELECT version_num FROM alembic_version").fetchall() if "alembic_version" in tables else []
            if len(revisions) != 1:
                problems.append(f"{database.name}: schema revisions {revisions}")
            found = connection.execute("SELECT count(*) FROM metrics").fetchone()[0] if database.name == "mlflow.db" else runs
            if found != runs:
                problems.append(f"{database.name}: {found} of {runs} runs")
    return problems


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = []
    for number in range(options.rounds):
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder)
            failed = [words for words in open_at_once(root, options.processes) if words]
            failed += [words for words in open_at_once(root, 1) if words]
            problems = problems_of(root, options.processes + 1) if not failed else [failed[0].strip().splitlines()[-1]]
        rows.append({"round": number, "failed": len(failed), "problems": problems})
        print(f"round {number + 1:>3} of {options.rounds}: {len(failed)} failed  {'; '.join(problems) or 'whole'}", flush=True)
    bad = sum(bool(row["problems"]) for row in rows)
    print(f"\n{options.rounds} cold starts of {options.processes} processes: {bad} with a problem (goal: 0)")
    if options.json:
        write_json(options.json, {"processes": options.processes, "rounds": rows})
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
