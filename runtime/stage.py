"""One run of one stage command: frozen params, recorded digests, a locked run folder, outputs published only if nothing moved.

Both doors (`dvc repro` and a Dagster materialization) run the same command, so what must hold at both is held here.
"""

import contextlib
import fcntl
import os
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from runtime import exits
from runtime.files import publish_folder, sha256_json, sha256_path, sweep_stale, write_json
from runtime.notices import told
from runtime.params import STAGES, Params, ParamsError, check_params, parse_params
from runtime.recipe import Stage, load_stages, look_up
from runtime.recorded import check_inputs

DAGSTER_RUN = "DEEPGEN_DAGSTER_RUN"  # environment of a stage command that Dagster started: the id of its run
EXPERIMENT = "DEEPGEN_EXPERIMENT"  # environment of a stage command that runs with other settings than params.yaml's: the experiment's name
CHAMPION = "outputs/champion"  # a copy of registered weights that SFT may start from; no stage makes it


class InputsChanged(Exception):
    """Params, inputs or code moved while the stage ran: what it made stays in its run folder and is not published."""


class Locked(Exception):
    """Another process writes this run folder."""


def find_root(start: Path | None = None) -> Path:
    """The folder that holds dvc.yaml and params.yaml, at or above `start`."""
    here = (start or Path.cwd()).resolve()
    for folder in (here, *here.parents):
        if (folder / "dvc.yaml").is_file() and (folder / "params.yaml").is_file():
            return folder
    raise FileNotFoundError(f"no params.yaml beside a dvc.yaml at or above {here}: run this inside the project.")


def stage_digests(root: Path, stage: Stage, values: dict[str, Any]) -> dict[str, str]:
    """What a stage's result depends on: one digest for its params, one for its code, one for each input."""
    digests = {
        "params": sha256_json({key: look_up(values, key) for key in stage.params}),
        "code": sha256_json({path: sha256_path(root / path) for path in stage.code}),
    }
    for path in stage.inputs:
        if not (root / path).exists():
            command = "`deepgen start-from champion`" if path == CHAMPION else f"`dvc repro {stage.name}` or `deepgen run`"
            raise FileNotFoundError(f"{stage.name}: its input {path} is missing; make it with {command}.")
        digests[f"input {path}"] = sha256_path(root / path)
    return digests


@dataclass
class StageRun:
    """What a stage command works with."""

    root: Path
    stage: Stage
    params: Params
    values: dict[str, Any]
    digests: dict[str, str]
    folder: Path
    stop: exits.StopRequest
    metadata: dict[str, Any] = field(default_factory=dict)
    pictures: dict[str, Path] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.stage.name

    @property
    def fingerprint(self) -> str:
        return self.folder.name

    @property
    def out(self) -> Path:
        """The one output that dvc.yaml declares for this stage."""
        return self.root / self.stage.outs[0]

    def report(self, metadata: dict[str, Any] | None = None, pictures: dict[str, Path] | None = None) -> None:
        """Headline numbers and pictures, shown on the asset's page."""
        self.metadata |= metadata or {}
        self.pictures |= pictures or {}

    def check_unchanged(self) -> None:
        """Raises InputsChanged, naming what moved, if params.yaml, code or inputs differ from what this run started with."""
        now = stage_digests(self.root, self.stage, parse_params((self.root / "params.yaml").read_text()))
        moved = sorted(name for name in self.digests.keys() | now.keys() if self.digests.get(name) != now.get(name))
        if moved:
            raise InputsChanged(
                f"{self.name}: {', '.join(moved)} changed while it ran. What it made stays in {self.folder.relative_to(self.root)} "
                "and is not recorded. Put the change back and run again (it goes on from there), or run again for the new settings."
            )

    def publish(self, temporary: Path) -> None:
        """Swap a finished folder, or file, in as this stage's output, if nothing that it depends on has moved."""
        self.check_unchanged()
        if temporary.is_dir():
            publish_folder(temporary, self.out)
        else:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            os.replace(temporary, self.out)


def open_run_folder(root: Path, stage: Stage, digests: dict[str, str], values: dict[str, Any], locked: bool = True) -> tuple[Path, IO[str]]:
    """`outputs/runs/<stage>/<fingerprint>/` with an exclusive lock held by the returned handle (by rank 0 for all ranks).

    The same params, inputs and code give the same fingerprint, and so the same folder to go on in; anything else gives another.
    `values` is the whole of params.yaml, kept beside the digests for whoever compares runs later.
    """
    fingerprint = sha256_json({"stage": stage.name} | digests)[:16]
    folder = root / "outputs" / "runs" / stage.name.replace("@", "/") / fingerprint
    folder.mkdir(parents=True, exist_ok=True)
    lock = open(folder / "lock", "a+")  # noqa: SIM115 - held until the process ends
    if not locked:
        return folder, lock
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.seek(0)
        raise Locked(
            f"{stage.name}: {folder.relative_to(root)} is being written by process {lock.read().strip() or 'unknown'}; wait or stop it."
        ) from None
    lock.truncate(0)
    lock.write(str(os.getpid()))
    lock.flush()
    sweep_stale(folder)
    write_json(folder / "run.json", {"stage": stage.name, "fingerprint": fingerprint, "digests": digests, "params": values})
    return folder, lock


@contextlib.contextmanager
def open_stage(name: str) -> Iterator[StageRun]:
    """A stage command's body between its snapshot and its report. Exits the process with the codes of `runtime.exits` on failure."""
    root = find_root()
    with guard(name), exits.stopping() as stop:
        with begin_stage(root, name, stop) as run:
            yield run
        _report_to_dagster(run)


@contextlib.contextmanager
def begin_stage(root: Path, name: str, stop: exits.StopRequest) -> Iterator[StageRun]:
    """Snapshot params, digest inputs, lock the run folder; at the end, refuse if any of them moved."""
    values = parse_params((root / "params.yaml").read_text())
    params = check_params(values)
    stages = load_stages(root, values)
    if name not in stages:
        raise ParamsError(f"{name}: no such stage in dvc.yaml; allowed: {', '.join(stages)}")
    digests = stage_digests(root, stages[name], values)
    if rank() == 0:
        check_inputs(root, stages[name], stages)
    folder, lock = open_run_folder(root, stages[name], digests, values, locked=rank() == 0)
    with lock:
        run = StageRun(root, stages[name], params, values, digests, folder, stop)
        with told(root, name, folder, params.notices, on_finish=name in STAGES) if rank() == 0 else contextlib.nullcontext():
            yield run
            run.check_unchanged()


@contextlib.contextmanager
def guard(name: str) -> Iterator[None]:
    """Turn the errors a user can mend into one plain message and an exit code."""
    codes: dict[type[BaseException], int] = {
        ParamsError: exits.BAD_PARAMS,
        InputsChanged: exits.INPUTS_CHANGED,
        Locked: exits.LOCKED,
        exits.Interrupted: exits.INTERRUPTED,
        exits.Unreachable: exits.UNREACHABLE,
        exits.Plain: exits.FAILED,
        FileNotFoundError: exits.FAILED,
    }
    try:
        yield
    except tuple(codes) as error:
        print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        code = next(code for kind, code in codes.items() if isinstance(error, kind))
        if os.environ.get("DEEPGEN_TRACEBACK"):
            traceback.print_exc()
        sys.exit(code)


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _report_to_dagster(run: StageRun) -> None:
    """Send digests, numbers and pictures to the asset that started this command; without Dagster, nothing."""
    if rank() != 0 or "DAGSTER_PIPES_CONTEXT" not in os.environ:
        return
    from dagster_pipes import open_dagster_pipes

    with open_dagster_pipes() as pipes:
        metadata: dict[str, Any] = {name: value for name, value in run.metadata.items() if value is not None}
        metadata |= {"fingerprint": run.fingerprint, "digests": {"raw_value": run.digests, "type": "json"}}
        for title, path in run.pictures.items():
            metadata[title] = {"raw_value": picture_markdown(path), "type": "md"}
        pipes.report_asset_materialization(metadata=metadata)


PICTURE_BYTES = 150_000


def picture_markdown(path: Path) -> str:
    """A PNG as markdown that Dagster's page shows. What has more than 150 kB is made smaller: event bodies stay in its database."""
    import base64

    content = path.read_bytes()
    note = ""
    if len(content) > PICTURE_BYTES:
        note = f"\n\nmade smaller; whole ({len(content) // 1000} kB) in `{path}`"
        content = _smaller(content)
    return f"![{path.stem}](data:image/png;base64,{base64.b64encode(content).decode()}){note}"


def _smaller(content: bytes) -> bytes:
    import io

    from PIL import Image

    image = Image.open(io.BytesIO(content)).convert("RGB")
    while len(content) > PICTURE_BYTES:
        image = image.resize((max(1, image.width * 4 // 5), max(1, image.height * 4 // 5)), Image.Resampling.LANCZOS)
        file = io.BytesIO()
        image.quantize(128).save(file, "png", optimize=True)
        content = file.getvalue()
    return content
