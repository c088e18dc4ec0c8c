"""`deepgen doctor`: what could stop a run here, what was found, and how to mend it. It looks, and changes nothing."""

import json
import os
import re
import shutil
import sqlite3
import sys
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from importlib.metadata import distributions
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import yaml

from orchestration.dvc import DvcError, cache_folder, dvc_config, find_dvc
from orchestration.pipeline_run import PROCESS_TAG, is_alive
from orchestration.stores import dagster_home
from orchestration.ui import HOST, listening
from runtime.environment import git, installed_packages, normalised, packages_of
from runtime.params import ParamsError, load_params
from runtime.run_folder import holder_of, run_folders, writer_of

OLDEST_PYTHON = (3, 11)
NEEDED = ("torch", "dagster", "mlflow")
LOW, TOO_LOW = 5e9, 1e9  # bytes free
ANSWER_SECONDS = 3
DATABASES = ("history/runs.db", "history/runs/index.db", "schedules/schedules.db")  # of Dagster, in its home
UNDER_WAY = ("STARTED", "STARTING", "CANCELING")

State = Literal["ok", "warn", "wrong"]


@dataclass(frozen=True)
class Finding:
    """One line: what was looked at, how it is, what was found, and what mends it."""

    check: str
    state: State
    found: str
    mend: str = ""

    def __str__(self) -> str:
        return f"{self.state:<6} {self.check:<18} {self.found}{f'  ->  {self.mend}' if self.mend else ''}"


def examine(root: Path, dagster_port: int, mlflow_port: int) -> Iterator[Finding]:
    """Every check, one finding each. A check that fails itself is wrong, with its error."""
    checks: dict[str, Callable[[], Finding]] = {
        "packages": lambda: check_packages(root),
        "dvc packages": lambda: check_dvc_packages(root),
        "selection strings": check_selection,
        "params.yaml": lambda: check_params_file(root),
        "threads": lambda: check_threads(root),
        "free disk": lambda: check_disk(root),
        "folders": lambda: check_folders(root),
        "port of Dagster": lambda: check_port("port of Dagster", dagster_port, "--dagster-port"),
        "port of MLflow": lambda: check_port("port of MLflow", mlflow_port, "--mlflow-port"),
        "dvc cache": lambda: check_dvc_cache(root),
        "dvc locks": lambda: check_dvc_locks(root),
        "git lock": lambda: check_git_lock(root),
        "running": lambda: check_running(root),
        "Dagster's database": lambda: check_dagster_database(root),
        "Dagster's runs": lambda: check_dagster_runs(root),
        "MLflow's store": lambda: check_mlflow_store(root),
    }
    for name, check in checks.items():
        try:
            yield check()
        except Exception as error:  # whatever is broken here, the other checks still say theirs
            yield Finding(name, "wrong", f"could not be looked at: {type(error).__name__}: {error}")


# --- what is installed --------------------------------------------------------------------------------------------------------------


def check_packages(root: Path) -> Finding:
    python = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info < OLDEST_PYTHON:
        return Finding("packages", "wrong", f"Python {python}, needed is 3.11 or newer", "PYTHON=python3.11 make setup")
    installed = installed_packages()
    if missing := [name for name in NEEDED if name not in installed]:
        return Finding("packages", "wrong", f"not installed: {', '.join(missing)}", "make setup")
    shown = f"Python {python}, {', '.join(f'{name} {installed[name]}' for name in NEEDED)}"
    return _against_pins("packages", root / "constraints.txt", installed, shown)


def check_dvc_packages(root: Path) -> Finding:
    try:
        program = Path(find_dvc(root)).resolve()
    except DvcError as error:
        return Finding("dvc packages", "wrong", str(error), "make setup")
    places = [str(place) for place in program.parent.parent.glob("lib/python*/site-packages")]
    installed = packages_of(distributions(path=places))
    if "dvc" not in installed:
        return Finding("dvc packages", "warn", f"{program} is in no environment of its own, so its version is not known", "make setup")
    return _against_pins("dvc packages", root / "constraints-dvc.txt", installed, f"dvc {installed['dvc']} in {program.parent.parent}")


def _against_pins(check: str, file: Path, installed: dict[str, str], shown: str) -> Finding:
    """Whether what is installed is of the versions that the file names; what is not installed is no matter."""
    if not file.is_file():
        return Finding(
            check, "warn", f"{shown}; {file.name} is missing, so nothing says which versions were tried", f"git checkout {file.name}"
        )
    pins = dict(line.split("==") for line in file.read_text().split() if "==" in line)
    other = [
        f"{name} {installed[normalised(name)]} (pinned {version})"
        for name, version in pins.items()
        if normalised(name) in installed and installed[normalised(name)].partition("+")[0] != version
    ]
    if other:
        return Finding(check, "warn", f"{shown}; not as {file.name} says: {', '.join(other)}", "make setup")
    return Finding(check, "ok", f"{shown}; as {file.name} says")


def check_selection() -> Finding:
    """DVC's antlr pin, in Dagster's environment, breaks every selection string."""
    from dagster import AssetSelection

    antlr = installed_packages().get("antlr4-python3-runtime", "none")
    try:
        with warnings.catch_warnings(action="ignore"):
            AssetSelection.from_string("*")
    except Exception as error:
        found = f'Dagster can\'t read "*" ({type(error).__name__}: {error}); antlr4-python3-runtime is {antlr}, 4.13 is needed'
        return Finding("selection strings", "wrong", found, "keep dvc out of .venv: rm -rf .venv && make setup")
    return Finding("selection strings", "ok", f"Dagster reads them (antlr {antlr})")


# --- the project --------------------------------------------------------------------------------------------------------------------


def check_params_file(root: Path) -> Finding:
    try:
        params = load_params(root / "params.yaml")
    except ParamsError as error:
        lines = str(error).removesuffix("\nNothing was started.").splitlines()
        return Finding("params.yaml", "wrong", "; ".join(line.strip() for line in lines), "edit it, or: deepgen preset use tiny")
    return Finding("params.yaml", "ok", f"valid, preset {params.preset}")


def check_threads(root: Path) -> Finding:
    cores = len(os.sched_getaffinity(0))
    try:
        launch = load_params(root / "params.yaml").launch
    except ParamsError:
        return Finding("threads", "warn", f"{cores} cores; what params.yaml asks for can't be read")
    asked = launch.processes * launch.threads
    shown = f"{asked} asked for (launch.processes x launch.threads), {cores} cores"
    if asked > cores:
        return Finding("threads", "warn", f"{shown}: they wait for each other", f"launch.threads: {max(1, cores // launch.processes)}")
    policy = os.environ.get("OMP_WAIT_POLICY", "")
    if policy.upper() == "ACTIVE":
        return Finding("threads", "warn", f"{shown}; OMP_WAIT_POLICY=ACTIVE: idle threads keep their core busy", "unset OMP_WAIT_POLICY")
    return Finding("threads", "ok", shown)


# --- the machine --------------------------------------------------------------------------------------------------------------------


def check_disk(root: Path) -> Finding:
    free = shutil.disk_usage(root).free
    state: State = "wrong" if free < TOO_LOW else "warn" if free < LOW else "ok"
    return Finding("free disk", state, f"{free / 1e9:.1f} GB at {root}", "" if state == "ok" else "deepgen gc")


def check_folders(root: Path) -> Finding:
    """Those that a run writes into. One that is not there yet can be made if its parent can be written."""
    refused = []
    for place in (root / "outputs", root / ".dvc" / "tmp", cache_folder(root)):
        there = next(path for path in (place, *place.parents) if path.exists() or path.is_symlink())
        if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
            refused.append(str(there))
    if refused:
        return Finding("folders", "wrong", f"no folder that can be written: {', '.join(refused)}", "chown or chmod it, or free the name")
    return Finding("folders", "ok", "outputs, .dvc/tmp and DVC's cache can be written")


def check_port(check: str, port: int, option: str) -> Finding:
    if listening(port):
        return Finding(
            check, "warn", f"{HOST}:{port} is in use, perhaps by a `deepgen ui`", f"stop that, or deepgen ui {option} {port + 1}"
        )
    return Finding(check, "ok", f"{HOST}:{port} is free")


# --- DVC and git --------------------------------------------------------------------------------------------------------------------


def check_dvc_cache(root: Path) -> Finding:
    config = dvc_config(root)
    kinds = config.get("cache", {}).get("type", "reflink,copy")
    if {"hardlink", "symlink"} & {kind.strip() for kind in kinds.split(",")}:
        found = f"cache.type is {kinds}: an output would be the cached object itself, and a write into it would damage both"
        return Finding("dvc cache", "wrong", found, "dvc config --local cache.type reflink,copy && dvc checkout --relink")
    trusting = [name for name, values in config.items() if name.startswith("remote ") and values.get("verify", "false").lower() != "true"]
    if trusting:
        name = trusting[0].removeprefix("remote ").strip('"')
        found = f"{', '.join(trusting)}: verify is off, a damaged object would be taken as it comes"
        return Finding("dvc cache", "warn", found, f"dvc remote modify {name} verify true")
    return Finding("dvc cache", "ok", f"{cache_folder(root)}, cache.type {kinds}")


def check_dvc_locks(root: Path) -> Finding:
    """DVC's list of who reads and writes what. Entries of the dead it drops itself, unless another process has got their number."""
    path = root / ".dvc" / "tmp" / "rwlock"
    mend = "if no dvc command runs: rm .dvc/tmp/rwlock"
    try:
        held = json.loads(path.read_text()) if path.is_file() else {}
        writers = list(held.get("write", {}).values())
        owners = {int(row["pid"]): str(row["cmd"]) for row in [*writers, *(row for rows in held.get("read", {}).values() for row in rows)]}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return Finding("dvc locks", "wrong", f".dvc/tmp/rwlock can't be read ({error!r}), and DVC will refuse", mend)
    strangers = [f"{pid} ({command})" for pid, command in owners.items() if (said := command_of(pid)) and "dvc" not in said]
    if strangers:
        found = f".dvc/tmp/rwlock names process {', '.join(strangers)}, a number that another program has now: DVC would wait for it"
        return Finding("dvc locks", "wrong", found, mend)
    if dead := [f"{pid} ({command})" for pid, command in owners.items() if not command_of(pid)]:
        return Finding(
            "dvc locks", "warn", f".dvc/tmp/rwlock names process {', '.join(dead)}, which was killed", "the next dvc command drops it"
        )
    holder = holder_of(root / ".dvc" / "tmp" / "lock")
    return Finding("dvc locks", "ok", f"dvc works, process {holder}" if holder or owners else "none left behind")


def check_git_lock(root: Path) -> Finding:
    said = git(root, "rev-parse", "--git-path", "index.lock")
    if said.returncode != 0:
        return Finding("git lock", "warn", "this is no git clone: commits and edits can't be recorded", "clone the project with git")
    path = root / said.stdout.decode().strip()
    if not path.exists() or any(Path(command.split("\0")[0]).name == "git" for command in commands_at(root)):
        return Finding("git lock", "ok", "none left behind")
    return Finding("git lock", "wrong", f"{path}: left by a git that was killed; commits are refused", f"rm {path}")


def command_of(pid: int) -> str:
    """The command line of a process, words separated by NUL; empty if it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace")
    except OSError:
        return ""


def commands_at(root: Path) -> Iterator[str]:
    """Command lines of the processes that work at `root`, or inside."""
    for place in Path("/proc").glob("[0-9]*"):
        try:
            here = (place / "cwd").resolve()
        except OSError:  # another user's
            continue
        if here == root or root in here.parents:
            yield command_of(int(place.name))


# --- what runs, and the databases ---------------------------------------------------------------------------------------------------


def check_running(root: Path) -> Finding:
    """Locks of runs and stages: the kernel frees them when their holder dies, so a lock that is held is work under way."""
    held = {"deepgen run": holder_of(root / "outputs" / "run.lock")}
    held |= {str(folder.parent.relative_to(root / "outputs" / "runs")): writer_of(folder) for folder in run_folders(root)}
    rows = [f"{name}, process {pid}" for name, pid in held.items() if pid is not None]
    return Finding("running", "ok", "; ".join(rows) or "nothing")


def check_dagster_database(root: Path) -> Finding:
    home, check = dagster_home(root), "Dagster's database"
    settings = home / "dagster.yaml"
    own = [key for key in (yaml.safe_load(settings.read_text()) or {}) if "storage" in key] if settings.is_file() else []
    migrate = f"DAGSTER_HOME={home} dagster instance migrate"
    if own:
        return Finding(check, "warn", f"dagster.yaml names a storage of its own ({', '.join(own)}), which is not looked at", migrate)
    return _against_code(check, [home / name for name in DATABASES], "dagster", "_core/storage/alembic/versions", migrate)


def check_mlflow_store(root: Path) -> Finding:
    check, address = "MLflow's store", os.environ.get("MLFLOW_TRACKING_URI")
    if address and address.startswith(("http://", "https://")):
        return _answers(check, address)
    if address and not address.startswith("sqlite:///"):
        return Finding(check, "warn", f"MLFLOW_TRACKING_URI is {address}, which is not looked at")
    database = Path(address.removeprefix("sqlite:///")) if address else root / "outputs" / "mlflow" / "mlflow.db"
    return _against_code(check, [database], "mlflow", "store/db_migrations/versions", f"mlflow db upgrade sqlite:///{database}")


def _answers(check: str, address: str) -> Finding:
    try:
        with urllib.request.urlopen(f"{address.rstrip('/')}/health", timeout=ANSWER_SECONDS) as answer:
            return Finding(check, "ok", f"{address} answers ({answer.status})")
    except urllib.error.HTTPError as error:
        return Finding(check, "wrong", f"{address} answers {error.code} {error.reason}", "is it an MLflow server, and are you let in?")
    except OSError as error:
        return Finding(check, "wrong", f"{address} can't be reached: {error}", "start that server, or unset MLFLOW_TRACKING_URI")


def _against_code(check: str, files: list[Path], package: str, folder: str, migrate: str) -> Finding:
    """Whether the databases are of the revision that the installed package works with."""
    present = [file for file in files if file.is_file()]
    if not present:
        return Finding(check, "ok", "not made yet; `deepgen run` makes it")
    known, head = code_revisions(package, folder)
    old, strange = [], []
    for file in present:
        revision = database_revision(file)
        if revision not in known:
            strange.append(f"{file.name} is at revision {revision}")
        elif revision != head:
            old.append(f"{file.name} is at revision {revision}")
    if strange:
        found = f"{', '.join(strange)}, which {package} as installed does not know (it is at {head}): a newer one made it"
        return Finding(check, "wrong", found, f"install the {package} that made it, or newer")
    if old:
        return Finding(check, "wrong", f"{', '.join(old)}, {package} as installed is at {head}", f"copy it, then: {migrate}")
    return Finding(check, "ok", f"at revision {head}, as {package} is")


def database_revision(file: Path) -> str | None:
    with closing(sqlite3.connect(f"{file.resolve().as_uri()}?mode=ro", uri=True, timeout=ANSWER_SECONDS)) as database:
        row = database.execute("SELECT version_num FROM alembic_version").fetchone()
    return row[0] if row else None


def code_revisions(package: str, folder: str) -> tuple[set[str], str]:
    """The revisions that a package's migrations know, and the last. Read as text: running them as alembic does takes seconds."""
    spec = find_spec(package)
    assert spec is not None and spec.origin is not None, f"{package} is installed: it was asked for before"
    known, before = set(), set()
    for file in (Path(spec.origin).parent / folder).glob("*.py"):
        text = file.read_text()
        known |= set(re.findall(r"^revision\b[^=]*= *[\"'](\w+)", text, re.M))
        for names in re.findall(r"^down_revision\b[^=]*=(.*)", text, re.M):
            before |= set(re.findall(r"[\"'](\w+)", names))
    (head,) = known - before
    return known, head


def check_dagster_runs(root: Path) -> Finding:
    """Runs that Dagster still calls started, though what executed them is gone."""
    check, file = "Dagster's runs", dagster_home(root) / DATABASES[0]
    if not file.is_file():
        return Finding(check, "ok", "none yet")
    question = (
        "SELECT runs.run_id, run_tags.value FROM runs LEFT JOIN run_tags ON run_tags.run_id = runs.run_id AND run_tags.key = ? "
        f"WHERE runs.status IN ({', '.join('?' * len(UNDER_WAY))})"
    )
    with closing(sqlite3.connect(f"{file.resolve().as_uri()}?mode=ro", uri=True, timeout=ANSWER_SECONDS)) as database:
        rows = database.execute(question, (PROCESS_TAG, *UNDER_WAY)).fetchall()
    watched = any("dagster-daemon" in command for command in commands_at(root))  # it marks dead runs of its own as failed
    dead = [run_id[:8] for run_id, process in rows if not (is_alive(process) if process else watched)]
    if dead:
        mend = "`deepgen run` marks its own as failed, `deepgen ui` those started in the browser"
        return Finding(check, "warn", f"{', '.join(dead)}: called started, but nothing executes them", mend)
    return Finding(check, "ok", f"{len(rows)} under way")
