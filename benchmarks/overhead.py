"""What the factory costs: the wall time of `deepgen run`, above that of the same stage commands in one shell script.

    python benchmarks/overhead.py [--presets smoke tiny] [--repeats N] [--state FOLDER] [--json FILE]

Each measurement has a clone of its own, with nothing built. The script is what an engineer without a factory would write: the commands of
dvc.yaml, in its order, `set -e`. It registers and promotes nothing, checks nothing, records nothing. `make run` is `deepgen run` once the
environment is there. Finished measurements are kept in --state; the same command started again goes on after them.
Goal: at most 90 s and 3% of the script's time more.
"""

import argparse
import json
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import yaml

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # not this folder, whose data.py would hide a room
from benchmarks.stops import clone, log_end, start, start_run
from runtime.files import write_json
from runtime.recipe import load_stages

SECONDS, SHARE = 90.0, 0.03
DOORS = ("script", "run")


def start_script(root: Path, log: Path) -> Any:
    stages = load_stages(root, yaml.safe_load((root / "params.yaml").read_text()))
    script = root / "stages.sh"
    script.write_text("set -e\n" + "".join(f"{stage.cmd}\n" for stage in stages.values()))
    return start(root, ["-c", "import os; os.execvp('bash', ['bash', 'stages.sh'])"], log)


def measure(folder: Path, preset: str, door: str) -> float:
    """Seconds from start to end in a fresh clone."""
    shutil.rmtree(folder, ignore_errors=True)
    root, log = clone(folder / "clone"), folder / "log.txt"
    shutil.copyfile(root / "presets" / f"{preset}.yaml", root / "params.yaml")
    began = time.monotonic()
    process = start_script(root, log) if door == "script" else start_run(root, log)
    if process.wait() != 0:
        sys.exit(f"{preset}, {door}: ended with {process.returncode}:\n{log_end(log, 3000)}")
    seconds = time.monotonic() - began
    shutil.rmtree(folder)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=["smoke", "tiny"])
    parser.add_argument("--repeats", type=int, default=1, help="pairs; the median is compared")
    parser.add_argument("--state", type=Path, default=Path("/tmp/deepgen-overhead"))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    held = options.state / "seconds.json"
    seconds: dict[str, float] = json.loads(held.read_text()) if held.is_file() else {}
    for preset in options.presets:
        for repeat in range(options.repeats):
            for door in DOORS if repeat % 2 == 0 else reversed(DOORS):
                name = f"{preset} {door} {repeat}"
                if name not in seconds:
                    print(f"{name} ...", flush=True)
                    seconds[name] = round(measure(options.state / "work", preset, door), 1)
                    write_json(held, seconds)
    rows, missed = [], False
    print(f"\n{'preset':<8} {'script s':>9} {'run s':>9} {'more s':>8} {'allowed s':>10}")
    for preset in options.presets:
        script, run = (statistics.median(seconds[f"{preset} {door} {n}"] for n in range(options.repeats)) for door in DOORS)
        allowed = SECONDS + SHARE * script
        missed |= run - script > allowed
        rows.append({"preset": preset, "script_s": script, "run_s": run, "more_s": run - script, "allowed_s": allowed})
        print(f"{preset:<8} {script:>9.1f} {run:>9.1f} {run - script:>8.1f} {allowed:>10.1f}{'  MISSED' if run - script > allowed else ''}")
    if options.json:
        write_json(options.json, {"rows": rows, "seconds": seconds})
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
