"""python -m data shards PART | mixture STAGE | inspect PART --out grid.png | verify PART | catalog | plan --preset NAME"""

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
    verbs.add_parser("catalog", help="the paper's data sets, and what each stage draws of them")
    plan = verbs.add_parser("plan", help="shards, bytes, hours and cores that the catalogue takes")
    plan.add_argument("--preset", default="deepgen-5b", help="whose shards and GPUs are planned")
    plan.add_argument("--rates", type=Path, help="JSON with measured rates; those it lacks are assumed")
    plan.add_argument("--cores", type=int, default=64, help="of one machine")
    plan.add_argument("--machines", type=int, default=1)
    arguments = parser.parse_args()
    set_environment()

    if arguments.verb == "catalog":
        from data.catalog import load_catalog, print_catalog

        print_catalog(load_catalog())
        return
    if arguments.verb == "plan":
        _plan(arguments)
        return

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


def _plan(arguments: argparse.Namespace) -> None:
    from data.catalog import load_catalog
    from data.planning import plan, print_plan, read_rates
    from runtime.params import load_params
    from runtime.stage import find_root

    presets = find_root() / "presets"
    preset = presets / f"{arguments.preset}.yaml"
    if not preset.is_file():
        print(f"preset {arguments.preset!r} is unknown; allowed: {sorted(file.stem for file in presets.glob('*.yaml'))}", file=sys.stderr)
        sys.exit(exits.FAILED)
    params = load_params(preset)
    try:
        rates = read_rates(arguments.rates) if arguments.rates else {}
        shard_samples, gpus = params.data.shard_samples, params.launch.processes
        rows = plan(load_catalog(), rates, arguments.cores, arguments.machines, gpus, shard_samples)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        sys.exit(exits.FAILED)
    print(f"{preset.stem}: {gpus} GPUs; built on {arguments.machines} x {arguments.cores} cores\n")
    print_plan(rows, rates)


if __name__ == "__main__":
    main()
