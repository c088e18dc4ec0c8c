"""The stage commands of dvc.yaml, and tools beside them.

python -m training foundation | latents | alignment | sft | mr_grpo | evaluate STAGE | export | report [--full] [--json] | replay
python -m training status [STAGE] [--json] | keep CHECKPOINT | estimate [--preset NAME] [--gpus N] [--gpu NAME] [--rates FILE] [--measure]
python -m training train_foundation [--part vlm|clip|dit] [--params FILE] [--out FOLDER]
python -m training ablate [EXPERIMENT] [--samples N] [--jobs N] [--again] [--table]
"""

import argparse
import sys
from importlib import import_module
from pathlib import Path

from runtime.environment import set_environment
from runtime.exits import stopping
from runtime.params import ParamsError, load_params, parse_params
from runtime.stage import find_root, guard, open_stage

STAGES = {  # verb: its module, imported only then, its function, and which arguments that takes after the run
    "foundation": ("training.foundation", "run_foundation", []),
    "latents": ("training.latents", "run_latents", []),
    "alignment": ("training.supervised", "run_supervised", ["verb"]),
    "sft": ("training.supervised", "run_supervised", ["verb"]),
    "mr_grpo": ("training.mr_grpo", "run_mr_grpo", []),
    "evaluate": ("training.evaluate", "run_evaluation", ["stage"]),
    "export": ("training.export", "run_export", []),
    "report": ("training.report", "run_report", ["full", "json"]),
}
RANKED = ("latents", "alignment", "sft", "mr_grpo")


def main() -> None:
    arguments = build_parser().parse_args()
    set_environment()
    verb = arguments.verb
    tools = {
        "status": show_status,
        "estimate": show_estimate,
        "keep": keep_checkpoint,
        "ablate": run_ablation,
        "train_foundation": train_foundation,
        "replay": send_waiting,
        "compare": compare_evaluations,
        "check-reference": check_reference,
    }
    if verb in tools:
        with guard(verb):
            tools[verb](arguments)
        return
    if verb in RANKED:
        launch()
    names = {"evaluate": f"evaluation@{getattr(arguments, 'stage', None)}", "export": "export_diffusers"}
    with open_stage(names.get(verb, verb)) as run:
        module, function, takes = STAGES[verb]
        getattr(import_module(module), function)(run, *(getattr(arguments, name) for name in takes))


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m training", description="The stages that need torch, as dvc.yaml calls them.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("foundation", help="gather and check the parts that training starts from")
    verbs.add_parser("latents", help="encode the images of latents.parts")
    verbs.add_parser("alignment", help="stage 1")
    verbs.add_parser("sft", help="stage 2")
    verbs.add_parser("mr_grpo", help="stage 3")
    verbs.add_parser("evaluate", help="score a stage's model").add_argument("stage", choices=["alignment", "sft", "mr_grpo"])
    verbs.add_parser("export", help="write the release folder and load it once in a fresh process")
    report = verbs.add_parser("report", help="one page of the run: numbers with intervals, stage against stage, pictures, curves")
    report.add_argument(
        "--full", action="store_true", help="score 1,000 samples a part, drawn as the evaluation's own; goes on where stopped"
    )
    report.add_argument("--json", action="store_true", help="print the figures, and nothing else")
    verbs.add_parser("replay", help="send to MLflow what waits in the run folders since it could not be reached")
    compared = verbs.add_parser("compare", help="two evaluations of the same set side by side, as pictures")
    compared.add_argument("evaluations", nargs=2, type=named_folder, metavar="NAME=FOLDER", help="`champion=outputs/evaluation/sft`")
    compared.add_argument("--out", required=True, type=Path, metavar="FOLDER")
    check = verbs.add_parser("check-reference", help="the arithmetic of MR-GRPO on tensors of the reference implementation")
    check.add_argument("files", type=Path, nargs="+")
    train = verbs.add_parser("train_foundation", help="train the small foundation anew (foundation/params.yaml); goes on where stopped")
    train.add_argument("--part", choices=["vlm", "clip", "dit"], help="that part alone, and nothing is shipped")
    train.add_argument("--params", default="foundation/params.yaml")
    train.add_argument("--out", default="outputs/foundation_training")
    status = verbs.add_parser("status", help="what every run of a training stage is doing, or how it ended")
    status.add_argument("stage", nargs="?", help="a stage of dvc.yaml; by default the three training stages")
    status.add_argument("--json", action="store_true")
    keep = verbs.add_parser("keep", help="a checkpoint that neither retention nor `deepgen gc` may delete")
    keep.add_argument("checkpoint", type=Path, help="outputs/runs/STAGE/FINGERPRINT/step-000200")
    estimate = verbs.add_parser("estimate", help="hours, samples/s, memory a rank and cost of each stage, each figure with its formula")
    estimate.add_argument("--preset", help="a name in presets/; by default params.yaml")
    estimate.add_argument("--gpus", type=int, help="by default launch.processes")
    estimate.add_argument("--gpu", default="h200", help="h100, h200 or a100")
    estimate.add_argument("--rates", type=Path, help="JSON with measured rates, as --measure writes it; the others are assumed")
    estimate.add_argument("--image-size", type=int, help="pixels a side; by default data.image_size")
    estimate.add_argument("--prompt-tokens", type=int, default=128, help="text tokens of a prompt with its template")
    estimate.add_argument("--json", type=Path, metavar="FILE", help="the figures as a file too")
    estimate.add_argument("--measure", action="store_true", help="time some steps of this very model here and compare with the count")
    estimate.add_argument("--out", type=Path, help="with --measure: where the measured rates go")
    ablate = verbs.add_parser(
        "ablate", help="short trainings of variants over several seeds, ablations/EXPERIMENT.yaml; goes on where it stopped"
    )
    ablate.add_argument("experiment", nargs="?", default="claims")
    ablate.add_argument("--samples", type=int, help="of each evaluation part; by default the preset's")
    ablate.add_argument("--jobs", type=int, default=1, help="variants at a time, each with its launch.processes and launch.threads")
    ablate.add_argument("--again", action="store_true", help="replace results of other params, code, data or foundation")
    ablate.add_argument("--table", action="store_true", help="compare the results that are there, as Markdown")
    return parser


def train_foundation(arguments: argparse.Namespace) -> None:
    with stopping() as stop:  # before the imports: a stop meanwhile is none less
        from training.foundation_training import run_train_foundation

        run_train_foundation(stop, arguments.part, arguments.params, arguments.out)


def send_waiting(arguments: argparse.Namespace) -> None:
    from training.spool import replay

    print(f"{replay(find_root())} events sent, nothing waits", flush=True)


def compare_evaluations(arguments: argparse.Namespace) -> None:
    from training.comparison import save_comparison

    for path in save_comparison(dict(arguments.evaluations), arguments.out):
        print(path, flush=True)


def check_reference(arguments: argparse.Namespace) -> None:
    from model.reference import print_agreements
    from training.reference import check_file

    print_agreements(arguments.files, check_file)


def named_folder(text: str) -> tuple[str, Path]:
    name, _, folder = text.partition("=")
    if not (name and folder):
        raise argparse.ArgumentTypeError(f"{text!r} is no NAME=FOLDER")
    return name, Path(folder)


def show_status(arguments: argparse.Namespace) -> None:
    from runtime.recipe import load_stages
    from training.status import print_status, read_status

    root = find_root()
    if arguments.stage is not None and not (root / "outputs" / "runs" / arguments.stage.replace("@", "/")).is_dir():
        known = load_stages(root, parse_params((root / "params.yaml").read_text()))
        if arguments.stage not in known:
            raise ParamsError(f"{arguments.stage}: no such stage in dvc.yaml; allowed: {', '.join(known)}")
    print_status(read_status(root, arguments.stage), arguments.json)


def keep_checkpoint(arguments: argparse.Namespace) -> None:
    from runtime.run_folder import register_checkpoint

    register_checkpoint(arguments.checkpoint)
    print(f"{arguments.checkpoint} stays", flush=True)


def run_ablation(arguments: argparse.Namespace) -> None:
    from training.ablation_table import print_table
    from training.ablations import run_queue

    if arguments.table:
        print_table(find_root(), arguments.experiment)
    else:
        run_queue(find_root(), arguments.experiment, arguments.samples, arguments.again, arguments.jobs)


def show_estimate(arguments: argparse.Namespace) -> None:
    from training.estimate import run_estimate

    root = find_root()
    file = root / "presets" / f"{arguments.preset}.yaml" if arguments.preset else root / "params.yaml"
    if not file.is_file():
        presets = sorted(path.stem for path in file.parent.glob("*.yaml"))
        raise ParamsError(f"--preset {arguments.preset}: no such preset; allowed: {', '.join(presets)}")
    run_estimate(load_params(file), arguments)


def launch() -> None:
    """Start as many ranks as params.yaml asks for; returns in each."""
    from training.launch import start_ranks

    with guard(sys.argv[1]):
        start_ranks(load_params(find_root() / "params.yaml").launch, ["training", *sys.argv[1:]])


if __name__ == "__main__":
    main()
