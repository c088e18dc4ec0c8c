"""Six processes register and promote the same new weights at the same moment, round after round.

    python benchmarks/promotion_races.py [--rounds N] [--racers N] [--json FILE]

The project has the smoke preset and stages that make nothing; weights and verdicts are written by hand. What is raced is registration and
promotion, from MLflow's files to the log. The racers start once and wait for each other before each round. DVC, with locks of its own, is
not asked.
Goal: in each round exactly one version, one promotion, one row in the log, and all aliases on it. Exits 1 where it was missed.
"""

import argparse
import json
import multiprocessing
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # not this folder, whose data.py would hide a room
from benchmarks.stops import REPO
from orchestration.datasets import evaluation_set_digest, shards_folder
from orchestration.dvc import DvcCommand
from orchestration.promotion import promote
from orchestration.promotion_log import read_history
from orchestration.registry import CHALLENGER, CHAMPION, EXPORT, GATES, Registry, register_export
from runtime.environment import set_environment
from runtime.files import sha256_bytes, sha256_json, tensors_digest, write_atomic, write_json
from runtime.params import STAGES, load_params

GOAL = "one version, one promotion, one row"
SECONDS = 600  # that a racer waits for the others


class Unchanged(DvcCommand):
    """DVC's word that nothing changed, without asking it."""

    def changes(self, name: str) -> list[Any]:
        return []


def project(folder: Path) -> Path:
    """A project with an evaluation set and nothing else under outputs/."""
    root = folder.resolve()
    root.mkdir(parents=True)
    shutil.copyfile(REPO / "presets" / "smoke.yaml", root / "params.yaml")
    write_atomic(root / "dvc.yaml", json.dumps({"stages": {name: {"cmd": "true", "outs": [f"outputs/{name}"]} for name in STAGES}}))
    subprocess.run(["git", "init", "-q"], cwd=root, check=True)
    params = load_params(root / "params.yaml")
    for part in params.evaluation.parts:
        tar = f"not read: {part}".encode()
        rows = [{"name": "shard-000000.tar", "sha256": sha256_bytes(tar)}]
        write_atomic(shards_folder(root, part) / "shard-000000.tar", tar)
        manifest = {"dataset_id": sha256_json(rows), "samples": 8, "shards": rows, "files": {}}
        write_json(shards_folder(root, part) / "manifest.json", manifest)
    return root


def make_model(root: Path, number: int) -> str:
    """An export with weights of its own, and the evaluation that says so; the digest of the weights."""
    header = json.dumps({"weight": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    write_atomic(root / EXPORT / "dit" / "model.safetensors", struct.pack("<Q", len(header)) + header + struct.pack("<f", number))
    params, digest = load_params(root / "params.yaml"), tensors_digest(root / EXPORT)
    gates = [{"name": name, "value": 0.5, "passed": True} for name in params.gates.floors]
    evidence = {"model_digest": digest, "evaluation_set_digest": evaluation_set_digest(root, params), "gates": gates}
    write_json(root / GATES, evidence)
    write_json(root / GATES.with_name("samples.json"), {row["name"]: [{"strict": i % 2 == 0} for i in range(8)] for row in gates})
    return digest


def race(root: Path, barrier: Any, told: Any, rounds: int) -> None:
    """One racer's life: whether it made the version, and whether it promoted it, or what went wrong, once a round."""
    set_environment()
    params, dvc = load_params(root / "params.yaml"), Unchanged(root)
    Registry.open(root, params).by_alias(CHAMPION)  # what is loaded once is loaded now
    for _ in range(rounds):
        barrier.wait(SECONDS)
        try:
            _, new = register_export(root, params, dvc)
            told.put({"new": new, "changed": promote(root, params, dvc).changed})
        except Exception as error:
            told.put({"error": repr(error)})
        barrier.wait(SECONDS)


@contextmanager
def racing(root: Path, racers: int, rounds: int) -> Iterator[tuple[Any, Any]]:
    """Racers that wait at the barrier for the first round."""
    processes = multiprocessing.get_context("spawn")
    barrier, told = processes.Barrier(racers + 1), processes.Queue()
    started = [processes.Process(target=race, args=(root, barrier, told, rounds), daemon=True) for _ in range(racers)]
    for process in started:
        process.start()
    try:
        yield barrier, told
    finally:
        for process in started:
            process.join(SECONDS)
            process.kill()


def run_rounds(root: Path, rounds: int, racers: int = 6) -> list[dict[str, Any]]:
    """A row a round: what was missed of the goal, in words, and how long it took."""
    params = load_params(root / "params.yaml")
    registry, rows = Registry.open(root, params), []
    with racing(root, racers, rounds) as (barrier, told):
        for number in range(1, rounds + 1):
            digest = make_model(root, number)
            barrier.wait(SECONDS)
            began = time.monotonic()
            results = [told.get(timeout=SECONDS) for _ in range(racers)]
            seconds = time.monotonic() - began
            rows.append({"round": number, "seconds": round(seconds, 2), "missed": missed(registry, number, digest, results)})
            barrier.wait(SECONDS)
    return rows


def missed(registry: Registry, number: int, digest: str, results: list[dict[str, Any]]) -> list[str]:
    """Every way in which the state after a round is not what it must be."""
    found = [f"a racer failed: {result['error']}" for result in results if "error" in result]
    for what in ("new", "changed"):
        if sum(result.get(what, False) for result in results) != 1:
            found.append(f"{what}: told to {sum(result.get(what, False) for result in results)} racers, expected 1")
    versions = [version for version in registry.versions() if version.tags.get("model_digest") == digest]
    history = [row for row in read_history(registry.root) if row["model_digest"] == digest]
    if len(versions) != 1 or len(registry.versions()) != number:
        found.append(f"{len(versions)} versions of these weights, {len(registry.versions())} in all after {number} rounds")
    if len(history) != 1 or len(read_history(registry.root)) != number:
        found.append(f"{len(history)} rows of these weights, {len(read_history(registry.root))} in all after {number} rounds")
    for alias in (CHALLENGER, CHAMPION):
        version = registry.by_alias(alias)
        if version is None or version.tags["model_digest"] != digest:
            found.append(f"{alias} is elsewhere")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--racers", type=int, default=6)
    arguments = parser.parse_args()
    set_environment()
    with tempfile.TemporaryDirectory(prefix="promotion_races_") as folder:
        rows = run_rounds(project(Path(folder) / "project"), arguments.rounds, arguments.racers)
    bad = [row for row in rows if row["missed"]]
    for row in bad:
        print(f"round {row['round']}: {'; '.join(row['missed'])}")
    seconds = [row["seconds"] for row in rows]
    print(f"{'rounds':>7}{'racers':>8}{'median s':>10}{'longest s':>11}{'missed':>8}  goal")
    verdict = "MISSED" if bad else "met"
    figures = f"{len(rows):>7}{arguments.racers:>8}{statistics.median(seconds):>10.1f}{max(seconds):>11.1f}{len(bad):>8}"
    print(f"{figures}  {GOAL}: {verdict}")
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
