"""`deepgen`: run the pipeline, use the model, change the preset, open the UIs. Heavy imports wait until a command needs them."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from orchestration.child import run_child
from runtime import exits
from runtime.environment import set_environment

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
Out = Annotated[Path, typer.Option(help="Where the PNG goes.")]


@app.command()
def run() -> None:
    """Bring everything up to date: data, three training stages, evaluation, export, registry. What is done is skipped."""
    from orchestration.pipeline_run import run_pipeline
    from orchestration.summary import closing_summary

    root = _root()
    outcome = run_pipeline(root)
    if outcome.interrupted:
        typer.echo("interrupted; finished parts are kept and the running stage is saved. Go on with: deepgen run", err=True)
        raise typer.Exit(outcome.exit_code)
    for name, message in outcome.failures.items():
        typer.echo(f"\nfailed: {name}\n{message}", err=True)
    if outcome.failures:
        typer.echo("\nWhat was finished is kept and recorded; `deepgen run` goes on from there.", err=True)
        raise typer.Exit(outcome.exit_code)
    if not outcome.made:
        typer.echo("nothing to do: everything is up to date")
    typer.echo("\n" + closing_summary(root))


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
    dagster_port: Annotated[int, typer.Option(min=1, max=65535)] = 3000,
    mlflow_port: Annotated[int, typer.Option(min=1, max=65535)] = 5000,
) -> None:
    """Dagster and MLflow in the browser, on this clone's files. Ctrl-C stops both."""
    from orchestration.ui import serve

    raise typer.Exit(serve(_root(), dagster_port, mlflow_port))


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
        NotRegistered: no such version, or its files are not the registered ones.
    """
    from orchestration.registry import NotRegistered, Registry
    from runtime.files import tensors_digest
    from runtime.params import load_params

    root = _root()
    registry = Registry.open(root, load_params(root / "params.yaml"))
    version = registry.resolve(model)
    folder = registry.pipeline_folder(version)
    if tensors_digest(folder) != version.tags.get("model_digest"):
        raise NotRegistered(
            f"{model}: the files of version {version.version} are not the registered ones; `deepgen run` registers the export again."
        )
    return folder, version


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
def promote() -> None:
    """Make the challenger champion, if every gate holds. The asset `champion` does the same."""
    from orchestration.dvc import DvcCommand
    from orchestration.promotion import promote as promote_challenger
    from runtime.params import load_params

    root = _root()
    typer.echo(promote_challenger(root, load_params(root / "params.yaml"), DvcCommand(root)).message)


@app.command()
def rollback() -> None:
    """Make the previous champion champion again."""
    from orchestration.promotion import rollback as roll_back
    from runtime.params import load_params

    root = _root()
    typer.echo(roll_back(root, load_params(root / "params.yaml")).message)


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
