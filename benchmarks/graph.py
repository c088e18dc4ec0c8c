"""The graph of assets: how soon it is there, with a few parts of data and with thousands, and whether a backfill runs to its end.

    python benchmarks/graph.py [--parts 2000] [--backfill 50] [--json FILE]

load: a fresh process imports the definitions and resolves the job `pipeline`, as `dagster-webserver` does first; the median of five.
many: the same with --parts parts, their partitions listed.
backfill: --backfill small parts are materialized in one run, as the UI's backfill does it; all must be recorded in dvc.lock.
Goals: load and many under 3 s each, neither imports torch; every part of the backfill made.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # not this folder, whose data.py would hide a room
from benchmarks.stops import clone
from runtime.files import write_json

SECONDS = 3.0
LOAD = """
import sys, time
began = time.perf_counter()
from orchestration.definitions import PIPELINE, build_definitions
from pathlib import Path
job = build_definitions(Path.cwd()).resolve_job_def(PIPELINE)
keys = job.partitions_def.get_partition_keys()
print(len(keys), time.perf_counter() - began, "torch" in sys.modules)
"""


def add_parts(root: Path, number: int, samples: int) -> list[str]:
    """Put `number` more drawn parts into params.yaml; their names in order."""
    values: dict[str, Any] = yaml.safe_load((root / "params.yaml").read_text())
    names = [f"part_{n:05d}" for n in range(number)]
    made = {"source": "drawn", "task": "text_to_image", "split": "train", "samples": samples, "licence": "CC0-1.0"}
    values["data"]["parts"] |= {name: made | {"seed": 1000 + n} for n, name in enumerate(names)}
    (root / "params.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    return names


def load(root: Path) -> tuple[int, float, bool]:
    """Partitions, seconds, and whether torch was imported, in a fresh process."""
    done = subprocess.run([sys.executable, "-c", LOAD], cwd=root, env=environment(root), capture_output=True, text=True, check=True)
    keys, seconds, torch = done.stdout.split()[-3:]
    return int(keys), float(seconds), torch == "True"


def environment(root: Path) -> dict[str, str]:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return os.environ | {"PYTHONPATH": str(root), "PATH": path, "DAGSTER_HOME": str(root / "outputs" / "dagster")}


def backfill(root: Path, names: list[str]) -> tuple[int, float]:
    """Parts that dvc.lock holds after one run over the range, and the seconds it took."""
    began = time.monotonic()
    init = [sys.executable, "-c", "from pathlib import Path; from orchestration.stores import init_stores; init_stores(Path.cwd())"]
    subprocess.run(init, cwd=root, env=environment(root), check=True)
    where = ["-m", "orchestration.definitions", "-d", str(root)]
    command = [str(Path(sys.executable).parent / "dagster"), "asset", "materialize", "--select", "shards"]
    done = subprocess.run(
        [*command, "--partition-range", f"{names[0]}...{names[-1]}", *where],
        cwd=root,
        env=environment(root),
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        sys.exit(f"the backfill ended with {done.returncode}:\n{(done.stdout + done.stderr)[-3000:]}")
    recorded = yaml.safe_load((root / "dvc.lock").read_text())["stages"]
    return sum(f"shards@{name}" in recorded for name in names), time.monotonic() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", type=int, default=2000)
    parser.add_argument("--backfill", type=int, default=50)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, parts in (("load", 0), ("many", options.parts)):
            root = clone(Path(folder) / name)
            if parts:
                add_parts(root, parts, 10)
            runs = [load(root) for _ in range(5)]
            seconds = statistics.median(run[1] for run in runs)
            rows.append(
                {"what": name, "parts": runs[0][0], "seconds": seconds, "missed": seconds >= SECONDS or any(run[2] for run in runs)}
            )
        root = clone(Path(folder) / "backfill")
        names = add_parts(root, options.backfill, 10)
        made, seconds = backfill(root, names)
        rows.append({"what": "backfill", "parts": made, "seconds": seconds, "missed": made != options.backfill})
    print(f"{'what':<9} {'parts':>6} {'seconds':>8}  goal")
    for row in rows:
        goal = f"all {options.backfill}" if row["what"] == "backfill" else f"under {SECONDS:g} s, without torch"
        print(f"{row['what']:<9} {row['parts']:>6} {row['seconds']:>8.2f}  {goal}{'  MISSED' if row['missed'] else ''}")
    if options.json:
        write_json(options.json, rows)
    sys.exit(1 if any(row["missed"] for row in rows) else 0)


if __name__ == "__main__":
    main()
