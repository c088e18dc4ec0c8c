"""python -m data VERB: build, mix, check and look at training data; --help lists the verbs."""

import argparse
import os
import random
import sys
from collections import Counter
from pathlib import Path

from runtime import exits
from runtime.environment import set_environment

STAGES = ("alignment", "sft", "mr_grpo")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m data", description="Build, mix and look at training data.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("shards", help="build the shards of a part").add_argument("part")
    verbs.add_parser("mixture", help="resolve what a stage reads").add_argument("stage")
    verify = verbs.add_parser("verify", help="check a published part against its manifest, byte for byte, and decode its samples")
    verify.add_argument("part")
    verify.add_argument("--sample", type=int, default=0, help="decode this many samples, drawn by a fixed seed; 0 for all")
    inspect = verbs.add_parser("inspect", help="draw a sheet of a part's samples, and its sizes, prompt lengths and reasons")
    inspect.add_argument("part")
    inspect.add_argument("--out", type=Path, default=Path("samples.png"))
    inspect.add_argument("--count", type=int, default=24)
    diff = verbs.add_parser("diff", help="what changed between two versions of a part")
    diff.add_argument("a", help="a part, or a folder that holds one")
    diff.add_argument("b")
    quarantine = verbs.add_parser("quarantine", help="records that were not written, and another try at them")
    quarantine.add_argument("action", choices=["list", "redrive"])
    quarantine.add_argument("part")
    quarantine.add_argument("--reason")
    verbs.add_parser("pin", help="the content digest of a part's source, for params.yaml").add_argument("part")
    land = verbs.add_parser("land", help="point a part at a snapshot that landed in retrain.landing, and pin its content in params.yaml")
    land.add_argument("part")
    land.add_argument("snapshot", help="its folder in retrain.landing/PART/")
    catalog = verbs.add_parser("catalog", help="the paper's data sets, and what each stage draws of them")
    catalog.add_argument("--params", metavar="STAGE", choices=STAGES, help="print what STAGE reads as parts and mixture of params.yaml")
    verbs.add_parser("check", help="whether the parts of params.yaml agree with the catalogue's entries that they name")
    wants = verbs.add_parser("wants", help="what the parts need from the network, as JSON; `deepgen fetch` brings it")
    wants.add_argument("--params", type=Path, help="a params file; default: params.yaml")
    prompts = verbs.add_parser("prompts", help="what is read of a prompt file, or of an RL recipe (.yaml) and the files it names")
    prompts.add_argument("file", type=Path)
    prompts.add_argument(
        "--against", type=Path, nargs="+", default=[], metavar="FILE", help="evaluation prompt files: which of the prompts are in them"
    )
    prompts.add_argument("--out", type=Path, help="a file for every prompt as it was read, one JSON line each")
    plan = verbs.add_parser("plan", help="shards, bytes, hours and cores that the catalogue takes")
    plan.add_argument("--preset", default="deepgen-5b", help="whose shards and GPUs are planned")
    plan.add_argument("--rates", type=Path, help="JSON with measured rates; those it lacks are assumed")
    plan.add_argument("--cores", type=int, default=64, help="of one machine")
    plan.add_argument("--machines", type=int, default=1)
    add = verbs.add_parser("add", help="make a part of your own pictures, and write it into params.yaml")
    add.add_argument("path", type=Path, help="a folder of images with captions or of edit triplets, a table, or tars")
    add.add_argument("--task", required=True, choices=["text_to_image", "image_edit"])
    add.add_argument("--licence", required=True, help="SPDX name, such as CC-BY-4.0")
    add.add_argument("--name", help="of the part; default: from the path")
    add.add_argument("--stage", default="sft", choices=STAGES, help="whose mixture reads it")
    add.add_argument("--weight", type=float, default=1.0, help="beside those of the mixture's other parts of the task")
    add.add_argument(
        "--column", action="append", default=[], metavar="FIELD=COLUMN", help="what a table calls prompt, image, references, ..."
    )
    arguments = parser.parse_args()
    set_environment()
    try:
        _run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # nobody reads any more, as after `| head`; what Python still flushes at exit goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(exits.NO_READER)


def _run(arguments: argparse.Namespace) -> None:
    if arguments.verb == "plan":
        _plan(arguments)
        return

    from runtime.stage import open_stage

    if arguments.verb in ("shards", "mixture"):
        from data.stages import run_mixture, run_shards

        name = arguments.part if arguments.verb == "shards" else arguments.stage
        with open_stage(f"{arguments.verb}@{name}") as run:
            (run_shards if arguments.verb == "shards" else run_mixture)(run)
        return

    from runtime.params import ParamsError

    verbs = {"catalog": _catalog, "check": _check, "wants": _wants, "prompts": _prompts, "verify": _verify, "inspect": _inspect}
    verbs |= {"diff": _diff, "quarantine": _quarantine, "pin": _pin, "add": _add, "land": _land}
    try:
        verbs[arguments.verb](arguments)
    except (exits.Plain, ParamsError, FileNotFoundError, IsADirectoryError, ValueError) as error:
        print(error, file=sys.stderr)
        sys.exit(exits.BAD_PARAMS if isinstance(error, ParamsError) else exits.FAILED)


def _catalog(arguments: argparse.Namespace) -> None:
    from data.catalog import load_catalog, print_catalog
    from data.data_sets import params_text
    from runtime.params import load_params
    from runtime.stage import find_root

    catalog = load_catalog()
    if arguments.params is None:
        print_catalog(catalog)
        return
    print(params_text(catalog, arguments.params, load_params(find_root() / "params.yaml").mixture[arguments.params].seed))


def _check(arguments: argparse.Namespace) -> None:
    from data.catalog import load_catalog
    from data.data_sets import check_parts
    from runtime.params import load_params
    from runtime.stage import find_root

    data = load_params(find_root() / "params.yaml").data
    check_parts(data, load_catalog())
    named = sum(part.data_set is not None for part in data.parts.values())
    print(f"{named} of {len(data.parts)} parts name a data set of the catalogue, and agree with it")


def _wants(arguments: argparse.Namespace) -> None:
    import json
    from dataclasses import asdict

    from data.catalog import load_catalog
    from data.data_sets import wanted_by_parts
    from runtime.params import load_params
    from runtime.stage import find_root

    params = load_params(arguments.params or find_root() / "params.yaml")
    print(json.dumps([asdict(wanted) for wanted in wanted_by_parts(params.data, load_catalog())], indent=1))


def _prompts(arguments: argparse.Namespace) -> None:
    import json

    from data.decontamination import print_leaks
    from data.prompts import print_prompt_file, print_rl_mixture, read_prompt_file, read_rl_mixture
    from runtime.files import write_atomic

    if arguments.file.suffix in (".yaml", ".yml"):
        mixture = read_rl_mixture(arguments.file)
        print_rl_mixture(mixture)
        lines = [{"set": s.name, "prompt": prompt} for s in mixture.datasets for prompt in s.prompts]
    else:
        read = read_prompt_file(arguments.file)
        print_prompt_file(arguments.file, read)
        lines = [{"prompt": prompt} for prompt in read.prompts]
    if arguments.against:
        sets: dict[str, list[str]] = {}
        for line in lines:
            sets.setdefault(line.get("set", arguments.file.name), []).append(line["prompt"])
        print()
        print_leaks(sets, arguments.against)
    if arguments.out is not None:
        write_atomic(arguments.out, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
        print(f"{arguments.out}: {len(lines)} prompts")


def _folder(part: str) -> Path:
    """A folder that holds a part, or the published part of that name."""
    from runtime.stage import find_root

    return Path(part) if (Path(part) / "manifest.json").is_file() else find_root() / "outputs" / "shards" / part


def _verify(arguments: argparse.Namespace) -> None:
    from data.loader import Part
    from runtime.progress import Progress
    from runtime.published import verify_part

    folder = _folder(arguments.part)
    manifest = verify_part(folder)
    part = Part(folder)
    rows = list(range(len(part)))
    if arguments.sample:
        rows = sorted(random.Random(0).sample(rows, min(arguments.sample, len(rows))))
    with Progress(len(rows), "sample", f"verify {arguments.part}") as progress:
        for row in rows:
            part[row]
            progress.update(1)
    shards = len(manifest["shards"])
    print(f"{arguments.part}: {shards} shards with every byte as the manifest says; {len(rows)} of {len(part)} samples decoded whole")


def _inspect(arguments: argparse.Namespace) -> None:
    from data.loader import read_part
    from data.pictures import save_facts, save_samples
    from runtime.published import verify_part

    folder = _folder(arguments.part)
    manifest = verify_part(folder)
    facts = arguments.out.with_name(f"{arguments.out.stem}_facts.png")
    save_facts(folder, facts)
    save_samples(list(read_part(folder, arguments.count)), arguments.out)
    print(f"{arguments.out}: {min(arguments.count, manifest['samples'])} of {manifest['samples']} samples of {arguments.part}")
    print(f"{facts}: sizes, prompt lengths and how its {manifest['counts']['input']} records ended")


def _diff(arguments: argparse.Namespace) -> None:
    from data.versions import compare

    found = compare(_folder(arguments.a), _folder(arguments.b))
    if found.same:
        print("the same data set, byte for byte")
    for name, (a, b) in found.counts.items():
        print(f"{name:20} {a:>10,} {b:>10,} {b - a:>+10,}")
    for word, names in (("added", found.added), ("removed", found.removed), ("changed", found.changed)):
        print(f"{word}: {len(names)}{''.join(f'{chr(10)}  {name}' for name in names[:20])}")


def _quarantine(arguments: argparse.Namespace) -> None:
    from data.catalog import load_catalog
    from data.data_sets import located
    from data.quarantine import redrive, set_aside
    from runtime.params import load_params
    from runtime.stage import find_root

    rows = set_aside(_folder(arguments.part), arguments.reason)
    if arguments.action == "list":
        for row in rows:
            print(f"{row['ending']:13} {row['reason']:19} {row['source_id']}: {row['message']}")
        print(
            f"{arguments.part}: {len(rows)} set aside; "
            + ", ".join(f"{k} {n}" for k, n in Counter(r["reason"] for r in rows).most_common())
        )
        return
    if arguments.reason is None:
        raise ValueError("--reason: none given; `python -m data quarantine list PART` shows those there are")
    root = find_root()
    data = located(arguments.part, load_params(root / "params.yaml"), load_catalog(), root)
    passed = 0
    for source_id, refused in redrive(arguments.part, data, _folder(arguments.part), root, arguments.reason):
        passed += refused is None
        print(f"{source_id}: {'would be written now' if refused is None else f'{refused.reason}: {refused.message}'}")
    print(f"{passed} of {len(rows)} would be written now", end="")
    print(f"; `python -m data pin {arguments.part}`, then `deepgen run`, builds the part with them" if passed else "")


def _pin(arguments: argparse.Namespace) -> None:
    from data.catalog import load_catalog
    from data.data_sets import located
    from data.pinning import content_digest
    from runtime.params import load_params
    from runtime.stage import find_root

    root = find_root()
    part = located(arguments.part, load_params(root / "params.yaml"), load_catalog(), root).parts[arguments.part]
    digest = content_digest(part, root)
    state = "as params.yaml says" if digest == part.content else f"params.yaml says {part.content}"
    print(f"data.parts.{arguments.part}.content: {digest}  ({state})")


def _land(arguments: argparse.Namespace) -> None:
    from data.adding import change_in_params, landed_part
    from runtime.params import load_params
    from runtime.stage import find_root

    root = find_root()
    params = load_params(root / "params.yaml")
    part = landed_part(root, params.retrain.landing, arguments.part, params.data.parts, arguments.snapshot)
    change_in_params(root / "params.yaml", arguments.part, part)
    print(f"data.parts.{arguments.part}: path {part.path}, content {part.content}. Next: deepgen run")


def _add(arguments: argparse.Namespace) -> None:
    import re

    from data.adding import CannotAdd, add_to_params, described, try_part
    from data.quarantine import set_aside
    from data.sources import open_source
    from runtime.params import load_params
    from runtime.progress import Progress
    from runtime.stage import find_root

    root = find_root()
    params = load_params(root / "params.yaml")
    name = arguments.name or re.sub(r"[^a-z0-9_]+", "_", arguments.path.resolve().stem.lower()).strip("_")
    if name in params.data.parts:
        raise CannotAdd(f"data.parts: {name!r} is there already; choose another --name, or change the part in params.yaml.")
    columns = dict(pair.split("=", 1) for pair in arguments.column if "=" in pair)
    part = described(root, arguments.path, arguments.task, arguments.licence, columns or None)
    folder = root / "outputs" / "added" / name
    with Progress(len(open_source(name, part, root)), "record", name) as progress:
        manifest, pictures = try_part(root, params.data, name, part, folder, progress.update)
    for row in set_aside(folder)[:20]:
        print(f"  {row['ending']:13} {row['reason']:19} {row['source_id']}: {row['message']}")
    print(f"{name}: " + ", ".join(f"{ending} {number}" for ending, number in manifest["counts"].items()))
    add_to_params(root / "params.yaml", name, part, arguments.stage, arguments.weight)
    print("pictures: " + ", ".join(str(picture.relative_to(root)) for picture in pictures))
    print(
        f"params.yaml has data.parts.{name} now, and the {arguments.stage} mixture reads it at weight {arguments.weight}. Next: deepgen run"
    )


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
