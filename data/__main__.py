"""python -m data shards PART | mixture STAGE | inspect PART --out grid.png | verify PART"""

import argparse
import sys
from pathlib import Path

from runtime import exits
from runtime.environment import set_environment


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m data", description="Build, mix and look at training data.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("shards", help="build the shards of a part").add_argument("part")
    verbs.add_parser("mixture", help="resolve what a stage reads").add_argument("stage")
    verbs.add_parser("verify", help="check a published part against its manifest, byte for byte").add_argument("part")
    inspect = verbs.add_parser("inspect", help="draw a sheet of a part's samples")
    inspect.add_argument("part")
    inspect.add_argument("--out", type=Path, default=Path("samples.png"))
    inspect.add_argument("--count", type=int, default=24)
    arguments = parser.parse_args()
    set_environment()

    from runtime.stage import find_root, open_stage

    if arguments.verb in ("shards", "mixture"):
        from data.stages import run_mixture, run_shards

        name = arguments.part if arguments.verb == "shards" else arguments.stage
        with open_stage(f"{arguments.verb}@{name}") as run:
            (run_shards if arguments.verb == "shards" else run_mixture)(run)
        return

    from data.loader import read_part
    from data.shards import ShardMismatch, verify_part
    from data.stages import save_samples

    folder = find_root() / "outputs" / "shards" / arguments.part
    try:
        manifest = verify_part(folder)
    except ShardMismatch as error:
        print(error, file=sys.stderr)
        sys.exit(exits.FAILED)
    if arguments.verb == "verify":
        print(f"{arguments.part}: {manifest['samples']} samples in {len(manifest['shards'])} shards, every byte as its manifest says")
    else:
        save_samples(list(read_part(folder, arguments.count)), arguments.out)
        print(f"{arguments.out}: {min(arguments.count, manifest['samples'])} of {manifest['samples']} samples of {arguments.part}")


if __name__ == "__main__":
    main()
