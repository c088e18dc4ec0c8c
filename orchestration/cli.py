"""`deepgen`: run the pipeline, use the model, change the preset, open the UIs. Heavy imports wait until a command needs them."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orchestration.child import run_child
from orchestration.ui import DAGSTER_PORT, MLFLOW_PORT
from runtime import exits
from runtime.environment import set_environment

if TYPE_CHECKING:
    from orchestration.pipeline_run import Outcome

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help="A factory for DeepGen, image generation and editing."
)
preset_app = typer.Typer(no_args_is_help=True, help="Complete alternatives of params.yaml.")
app.add_typer(preset_app, name="preset")
data_app = typer.Typer(no_args_is_help=True, help="Training data of your own.")
app.add_typer(data_app, name="data")
fetch_app = typer.Typer(help="The one command that opens the network: published weights and data sets, by pinned revision, verified.")
app.add_typer(fetch_app, name="fetch")

CHAMPION_URI = "models:/deepgen@champion"
Seed = Annotated[int, typer.Option(help="Equal seeds give equal pictures.")]
Steps = Annotated[int | None, typer.Option(min=1, help="Denoising steps; default: as in the evaluation.")]
Guidance = Annotated[float | None, typer.Option(min=0.0, help="Classifier-free guidance; default: as in the evaluation.")]
Model = Annotated[str, typer.Option(help="A registry address (models:/NAME@ALIAS) or a folder.")]
Reason = Annotated[str | None, typer.Option(help="Why, for the log in outputs/registry.")]
Out = Annotated[Path, typer.Option(help="Where the PNG goes.")]


@app.command()
def run() -> None:
    """Bring everything up to date: data, three training stages, evaluation, export, registry. What is done is skipped."""
    from orchestration.pipeline_run import run_pipeline

    _close(run_pipeline(_root()), "deepgen run")


def _close(outcome: "Outcome", command: str) -> None:
    """The last words of a run, and its exit code."""
    from orchestration.summary import closing_summary

    if outcome.interrupted:
        typer.echo(f"interrupted; finished parts are kept and the running stage is saved. Go on with: {command}", err=True)
        raise typer.Exit(outcome.exit_code)
    for name, message in outcome.failures.items():
        typer.echo(f"\nfailed: {name}\n{message}", err=True)
    if outcome.failures:
        typer.echo("\nWhat was finished is kept and recorded; `deepgen run` goes on from there.", err=True)
        raise typer.Exit(outcome.exit_code)
    if not outcome.made:
        typer.echo("nothing to do: everything is up to date")
    typer.echo("\n" + closing_summary(_root()))


@app.command()
def retrain(dry_run: Annotated[bool, typer.Option("--dry-run", help="Say the decision, and stop.")] = False) -> None:
    """Train again if there is reason to, as schedule and sensor would: enough new samples, age, other params. Says why, or why not."""
    from orchestration.retraining import retrain as train_again

    outcome = train_again(_root(), dry_run)
    if outcome is not None:
        _close(outcome, "deepgen run")


@app.command()
def predict(as_json: Annotated[bool, typer.Option("--json", help="Print the figures, and nothing else.")] = False) -> None:
    """What `deepgen run` would take now: hours, disk, samples; for GPU presets GPU-hours and money. Above the budget it is refused."""
    import json

    from orchestration.budget import describe, over_budget, predict, stages_to_make
    from orchestration.dvc import DvcCommand
    from runtime.params import load_params

    root = _root()
    params = load_params(root / "params.yaml")
    prediction = predict(root, params, stages_to_make(root, DvcCommand(root)))
    problems = over_budget(prediction, params)
    if as_json:
        typer.echo(json.dumps(prediction.to_json() | {"over_budget": problems}, indent=1))
        return
    typer.echo(describe(prediction) or "nothing to do: everything is up to date")
    for problem in problems:
        typer.echo(problem, err=True)


@app.command()
def init() -> None:
    """Create the databases under outputs/. Every other command does it where needed."""
    from orchestration.stores import init_stores
    from runtime.params import load_params

    root = _root()
    init_stores(root, load_params(root / "params.yaml").registry.experiment)
    typer.echo("ready: outputs/dagster, outputs/mlflow")


@app.command()
def ui(
    dagster_port: Annotated[int, typer.Option(min=1, max=65535)] = DAGSTER_PORT,
    mlflow_port: Annotated[int, typer.Option(min=1, max=65535)] = MLFLOW_PORT,
) -> None:
    """Dagster and MLflow in the browser, on this clone's files. Ctrl-C stops both."""
    from orchestration.ui import serve

    raise typer.Exit(serve(_root(), dagster_port, mlflow_port))


@app.command()
def doctor(
    dagster_port: Annotated[int, typer.Option(min=1, max=65535)] = 3000,
    mlflow_port: Annotated[int, typer.Option(min=1, max=65535)] = 5000,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings, for a program.")] = False,
) -> None:
    """What could stop a run here, and how to mend it. It changes nothing; the exit code is 1 if something is wrong."""
    import json
    from dataclasses import asdict

    from orchestration.doctor import examine

    findings = []
    for finding in examine(_root(), dagster_port, mlflow_port):
        findings.append(finding)
        if not as_json:
            typer.echo(str(finding))
    if as_json:
        typer.echo(json.dumps([asdict(finding) for finding in findings], indent=1))
    raise typer.Exit(exits.FAILED if any(finding.state == "wrong" for finding in findings) else exits.DONE)


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="What to draw.")],
    out: Out,
    seed: Seed = 0,
    steps: Steps = None,
    guidance: Guidance = None,
    size: Annotated[int | None, typer.Option(min=1, help="Pixels a side; default: as in training.")] = None,
    model: Model = CHAMPION_URI,
) -> None:
    """Draw a picture."""
    from runtime.params import load_params

    side = size or load_params(_root() / "params.yaml").data.image_size
    _draw(["generate", prompt, "--size", str(side)], out, seed, steps, guidance, model)


@app.command()
def edit(
    image: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="The picture to change.")],
    instruction: Annotated[str, typer.Argument(help="What to change.")],
    out: Out,
    seed: Seed = 0,
    steps: Steps = None,
    guidance: Guidance = None,
    model: Model = CHAMPION_URI,
) -> None:
    """Change a picture as an instruction says."""
    _draw(["edit", str(image.resolve()), instruction], out, seed, steps, guidance, model)


def _draw(action: list[str], out: Path, seed: int, steps: int | None, guidance: float | None, model: str) -> None:
    """Start the model's own command on the folder behind `model`."""
    from runtime.params import load_params

    evaluation = load_params(_root() / "params.yaml").evaluation
    options = ["--model", str(_model_folder(model)), "--out", str(out.resolve()), "--seed", str(seed)]
    options += [
        "--steps",
        str(steps or evaluation.sampling_steps),
        "--guidance",
        str(evaluation.guidance if guidance is None else guidance),
    ]
    done = subprocess.run([sys.executable, "-m", "model", *action, *options], cwd=_root(), check=False)
    raise typer.Exit(done.returncode)


def _model_folder(model: str) -> Path:
    """A folder as it is; behind a registry address, the version's own pipeline, if its weights are the registered ones."""
    if not model.startswith("models:/"):
        if not Path(model).is_dir():
            raise NotADirectoryError(f"--model {model}: no such folder; give a pipeline folder or an address such as {CHAMPION_URI}.")
        return Path(model).resolve()
    return _registered(model)[0]


def _registered(model: str) -> tuple[Path, Any]:
    """The pipeline folder behind a registry address, and its version.

    Raises:
        NotRegistered: no such version.
        Untrusted: its files are not the registered ones, or hold a pickle.
    """
    from orchestration.registry import CHAMPION, Registry
    from runtime.params import load_params

    root = _root()
    registry = Registry.open(root, load_params(root / "params.yaml"))
    version = registry.resolve(model)
    folder, _ = registry.verify(version)
    if model == f"models:/{registry.name}@{CHAMPION}":
        _warn_of_ungated(registry)
    return folder, version


def _warn_of_ungated(registry: Any) -> None:
    from orchestration.promotion_log import why_ungated

    with registry.lock():  # a promotion that is going on is none that was interrupted
        why = why_ungated(registry)
    if why:
        typer.echo(f"warning: {why}", err=True)


@app.command()
def report(
    full: Annotated[
        bool, typer.Option("--full", help="Score 1,000 samples a part after each stage; goes on where it was stopped.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures, and nothing else.")] = False,
) -> None:
    """Write the page of the run, outputs/report/index.html: numbers with intervals, stage against stage, pictures, curves."""
    options = [name for name, asked in (("--full", full), ("--json", as_json)) if asked]
    raise typer.Exit(run_child([sys.executable, "-m", "training", "report", *options], _root()))


@app.command()
def foundation() -> None:
    """Train the parts that ship in foundation/ anew, hours on two cores, and record them. Interrupted, it goes on by the same command."""
    from orchestration.dvc import DvcCommand

    root = _root()
    code = run_child([sys.executable, "-m", "training", "train_foundation"], root)
    if code != exits.DONE:
        raise typer.Exit(code)
    DvcCommand(root).record("foundation/dvc.yaml:train")
    typer.echo("foundation/ is trained and recorded; next: git commit foundation, then deepgen run")


@app.command()
def promote(reason: Reason = None) -> None:
    """Make the challenger champion, if every gate holds. The asset `champion` does the same."""
    from orchestration.dvc import DvcCommand
    from orchestration.promotion import promote as promote_challenger
    from orchestration.registry import Registry
    from runtime.params import load_params

    root = _root()
    params = load_params(root / "params.yaml")
    _warn_of_ungated(Registry.open(root, params))
    typer.echo(promote_challenger(root, params, DvcCommand(root), via="cli", reason=reason).message)


@app.command()
def rollback(reason: Reason = None) -> None:
    """Make the previous champion champion again. The job `rollback` does the same."""
    from orchestration.promotion import rollback as roll_back
    from orchestration.registry import Registry
    from runtime.params import load_params

    root = _root()
    params = load_params(root / "params.yaml")
    _warn_of_ungated(Registry.open(root, params))
    typer.echo(roll_back(root, params, via="cli", reason=reason).message)


@app.command()
def approve(
    version: Annotated[str, typer.Argument(help="Number of a registered version.")],
    by: Annotated[str, typer.Option(help="Who approves.")],
    reason: Reason = None,
) -> None:
    """Say that a person has looked at a version, and that it may be promoted: its weights, as measured on the present evaluation set."""
    from orchestration.approval import approve as approve_version
    from orchestration.dvc import DvcCommand
    from runtime.params import load_params

    root = _root()
    row = approve_version(root, load_params(root / "params.yaml"), DvcCommand(root), version, by, reason)
    weights, evaluation_set = row["model_digest"][:12], row["evaluation_set_digest"][:12]
    typer.echo(f"version {row['version']}: weights {weights} on evaluation set {evaluation_set}, approved by {by}; next: deepgen promote")


@app.command()
def verify() -> None:
    """Hash every recorded output and hold it against dvc.lock. DVC calls what it restored from a damaged cache or remote up to date."""
    from runtime.recorded import NotAsRecorded, differing_outputs, recorded_outputs

    root = _root()
    recorded = recorded_outputs(root)
    differing = differing_outputs(root, recorded)
    there = [path for outs in recorded.values() for path in outs if (root / path).exists()]
    typer.echo(f"{len(there) - len(differing)} of {len(there)} recorded outputs hold the bytes that dvc.lock names")
    if differing:
        lines = [f"  {path}: make it anew with `dvc repro --force --single-item {name}`" for path, name in differing.items()]
        raise NotAsRecorded("not as recorded:\n" + "\n".join(lines))


@app.command()
def lineage(
    version: Annotated[str, typer.Argument(help="A version's number, @ALIAS, models:/NAME/NUMBER, or an exported folder.")],
    diff: Annotated[
        bool, typer.Option("--diff", help="Print the edits that the commit did not hold, as a patch, and nothing else.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything, for a program.")] = False,
) -> None:
    """What made a model: commit and edits, params, data, runs, environment, licences, and who promoted it why."""
    import json

    from orchestration.lineage import describe, describe_stranger, find_version, read_lineage, read_record
    from orchestration.provenance import DIFF
    from orchestration.registry import Registry
    from runtime.params import load_params

    root = _root()
    registry = Registry.open(root, load_params(root / "params.yaml"))
    found, digest = find_version(root, registry, version)
    if found is None:
        for line in describe_stranger(Path(version), digest, registry):
            typer.echo(line, err=as_json or diff)
        raise typer.Exit(exits.FAILED)
    if diff:
        typer.echo(read_record(registry, found.run_id).files.get(DIFF, b""), nl=False)
        return
    facts = read_lineage(root, registry, found)
    for line in [json.dumps(facts, indent=1, sort_keys=True)] if as_json else describe(facts):
        typer.echo(line)


@app.command()
def reproduce(
    run: Annotated[str, typer.Argument(metavar="RUN_ID|VERSION", help="A version as in `lineage`, or the MLflow run of its registration.")],
    with_diff: Annotated[bool, typer.Option("--with-diff", help="Apply the recorded edits that its commit does not hold.")] = False,
    cached: Annotated[bool, typer.Option("--cached", help="Take from DVC's cache what it still has, instead of building it.")] = False,
    stage: Annotated[list[str] | None, typer.Option(metavar="STAGE", help="Only this one and what it needs; repeatable.")] = None,
) -> None:
    """Build a recorded run again, in a clone of its own under outputs/reproduce, and compare every output with the recorded one."""
    from orchestration.registry import Registry
    from orchestration.reproduce import reproduce as build_again
    from runtime.params import load_params

    root = _root()
    registry = Registry.open(root, load_params(root / "params.yaml"))
    raise typer.Exit(build_again(root, registry, run, typer.echo, with_diff, cached, stage or []))


@app.command()
def gc(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List what may go, and stop.")] = False,
    keep_days: Annotated[float, typer.Option(min=0.0, help="Younger run folders and artifacts stay.")] = 30.0,
    with_dvc: Annotated[bool, typer.Option("--dvc", help="DVC's cache as well: what the present dvc.lock does not name.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Don't ask.")] = False,
) -> None:
    """Free disk: old runs and checkpoints, leftovers. Never what is registered, recorded in dvc.lock or running."""
    from orchestration.dvc import DvcCommand
    from orchestration.gc import describe, find_garbage, remove_garbage, shown_size
    from runtime.params import load_params

    root = _root()
    params = load_params(root / "params.yaml")
    found = find_garbage(root, params, keep_days)
    for line in describe(root, found):
        typer.echo(line)
    if with_dvc:
        typer.echo("DVC's cache:\n" + DvcCommand(root).collect_garbage(dry=True).strip())
    if dry_run or not (found or with_dvc):
        return
    if not yes and not typer.confirm("Remove it for good?"):
        typer.echo("nothing was removed")
        return
    removed = remove_garbage(root, params, found)
    typer.echo(f"removed {len(removed)} of {len(found)} places, {shown_size(sum(item.size for item in removed))}")
    if with_dvc:
        typer.echo(DvcCommand(root).collect_garbage(dry=False).strip())


@app.command("start-from")
def start_from(start: Annotated[str, typer.Argument(help="champion or alignment.")]) -> None:
    """Say whose weights SFT begins with; `champion` keeps a copy of them under outputs/champion."""
    from orchestration.start import copy_champion, set_start

    if start not in ("champion", "alignment"):
        raise typer.BadParameter(f"{start!r}; allowed: champion, alignment")
    root = _root()
    if start == "champion":
        folder, version = _registered(CHAMPION_URI)
        copy_champion(root, folder, version.version, version.tags["model_digest"])
        typer.echo(f"outputs/champion: version {version.version}")
    set_start(root / "params.yaml", start)
    typer.echo(f"sft.start in params.yaml is {start}; next: deepgen run")


@data_app.command("add", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def data_add(
    context: typer.Context,
    path: Annotated[Path, typer.Argument(help="A folder of images with captions or of edit triplets, a table, or tars.")],
    task: Annotated[str, typer.Option(help="text_to_image or image_edit.")],
    licence: Annotated[str, typer.Option(help="SPDX name, such as CC-BY-4.0.")],
) -> None:
    """Show what a build makes of your pictures, and write them into params.yaml as a part. More options: python -m data add --help."""
    command = [sys.executable, "-m", "data", "add", str(path.absolute()), "--task", task, "--licence", licence, *context.args]
    raise typer.Exit(subprocess.run(command, cwd=_root()).returncode)


@preset_app.command("list")
def preset_list() -> None:
    """The presets, and which one params.yaml is."""
    from orchestration.presets import current_preset, list_presets

    root = _root()
    current = current_preset(root)
    for name, purpose in list_presets(root).items():
        typer.echo(f"{'*' if name == current else ' '} {name:<12} {purpose}")
    if current is None:
        typer.echo("params.yaml is none of them: it holds edits.")


@preset_app.command("use")
def preset_use(name: str) -> None:
    """Copy a preset over params.yaml. Refused while that would lose edits."""
    from orchestration.presets import use_preset

    use_preset(_root(), name)
    typer.echo(f"params.yaml is now {name}")


@preset_app.command("show")
def preset_show(name: Annotated[str | None, typer.Argument()] = None) -> None:
    """Print a preset, or params.yaml."""
    from orchestration.presets import preset_text

    root = _root()
    typer.echo(preset_text(root, name) if name else (root / "params.yaml").read_text(), nl=False)


@preset_app.command("schema")
def preset_schema() -> None:
    """JSON schema of params.yaml: every key, its type, bounds and meaning."""
    import json

    from runtime.params import Params

    typer.echo(json.dumps(Params.model_json_schema(), indent=1))


@fetch_app.callback(invoke_without_command=True)
def fetch(
    context: typer.Context,
    preset: Annotated[str | None, typer.Option(help="Whose needs; default: those of params.yaml.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List what would come, and stop.")] = False,
    accept: Annotated[list[str] | None, typer.Option(metavar="LICENCE", help="A licence you have read and accept; repeatable.")] = None,
    only: Annotated[list[str] | None, typer.Option(metavar="NAME", help="Only these of the preset's needs; repeatable.")] = None,
) -> None:
    """Bring what a preset needs from the network into outputs/fetched. What is there is not loaded again; a broken run goes on."""
    if context.invoked_subcommand is not None:
        return
    from orchestration.catalogue import catalogue_wants
    from orchestration.presets import preset_text
    from runtime.fetch import choose, wanted_by
    from runtime.fetch import fetch as fetch_all
    from runtime.hub import Hub
    from runtime.params import check_params, load_params, parse_params

    root = _root()
    params = check_params(parse_params(preset_text(root, preset))) if preset else load_params(root / "params.yaml")
    file = root / "presets" / f"{preset}.yaml" if preset else root / "params.yaml"
    with _interruptible("deepgen fetch"):
        wants = wanted_by(params, catalogue_wants(root, params, file))
        fetch_all(root, choose(wants, only or []), accept or [], Hub.from_environment(), dry_run, typer.echo)


@fetch_app.command("urls")
def fetch_urls(
    urls: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="A list of addresses: txt, csv, tsv, json, jsonl or parquet.")],
    out: Annotated[Path, typer.Option(help="Folder of the WebDataset shards.")],
    url_col: Annotated[str, typer.Option(help="Column of the addresses.")] = "url",
    caption_col: Annotated[str | None, typer.Option(help="Column of the captions.")] = None,
    processes: Annotated[int, typer.Option(min=1)] = 1,
) -> None:
    """Load the pictures of a list through img2dataset, guarded. Pictures keep their own licences; sites that opt out are left out."""
    from runtime.url_list import fetch_urls as load

    with _interruptible("deepgen fetch urls"):
        raise typer.Exit(load(_root(), urls, out, url_col, caption_col, processes))


@contextlib.contextmanager
def _interruptible(command: str) -> Iterator[None]:
    """Ctrl-C ends the command as interrupted, not as failed."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo(f"interrupted; what came is kept. Go on with the same command: {command} ...", err=True)
        raise typer.Exit(exits.INTERRUPTED) from None


def _root() -> Path:
    from runtime.stage import find_root

    return find_root()


def main() -> None:
    """Entry point: what a user can mend is one message, not a trace."""
    set_environment()
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(exits.INTERRUPTED)
    except Exception as error:
        if os.environ.get("DEEPGEN_TRACEBACK"):
            raise
        code = _code_of(error)
        if code is None:
            raise
        print(f"deepgen: {error}", file=sys.stderr)
        sys.exit(code)


def _code_of(error: Exception) -> int | None:
    """Exit code of an error that speaks for itself; None for one that only its trace explains."""
    if isinstance(error, exits.Plain | FileNotFoundError | NotADirectoryError):
        return exits.FAILED
    codes = {  # by name, for their modules are heavy
        "ParamsError": exits.BAD_PARAMS,
        "PresetRefused": exits.BAD_PARAMS,
        "AlreadyFetching": exits.LOCKED,
        "AlreadyRunning": exits.LOCKED,
        "PortBusy": exits.LOCKED,
    }
    return codes.get(type(error).__name__)
