"""`deepgen reproduce`: a recorded run built again in a clone of its own, and every output compared with the recorded one."""

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from orchestration.child import run_child
from orchestration.dvc import cache_folder, dvc_environment, find_dvc
from orchestration.lineage import RUN_ID, Record, differing_packages, find_version, read_record
from orchestration.pipeline_run import AlreadyRunning
from orchestration.provenance import DIFF, EDITS, ENVIRONMENT
from orchestration.registry import Registry
from runtime import exits
from runtime.environment import git
from runtime.exits import Plain
from runtime.files import sweep_stale
from runtime.params import check_params, parse_params
from runtime.recipe import Stage, load_stages, look_up
from runtime.run_folder import claimed

PLACE = Path("outputs/reproduce")
LINKED = (".venv", ".venv-dvc", "outputs/fetched", "outputs/champion")  # what the clone reads and git does not hold
OTHERS = ("MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID", "DAGSTER_HOME")  # a rebuild is logged in its own clone, not among the runs


class CannotReproduce(Plain):
    """The run does not hold what a rebuild needs, or asks for a decision first. Nothing was built."""


@dataclass(frozen=True)
class Output:
    """One output of a stage: its recorded md5, the rebuilt one, and the inputs in which the two builds differ already."""

    stage: str
    path: str
    recorded: str
    rebuilt: str | None
    other_inputs: tuple[str, ...]

    @property
    def same(self) -> bool:
        return self.recorded == self.rebuilt


def reproduce(
    root: Path, registry: Registry, what: str, say: Callable[[str], None], with_diff: bool, cached: bool, only: Sequence[str]
) -> int:
    """Build what `what`, a version or the MLflow run of its registration, recorded; compare, and give the exit code.

    Interrupted, the same call goes on: finished stages stay, a training stage resumes from its checkpoint.

    Args:
        with_diff: apply the edits that the run's commit did not hold.
        cached: take from DVC's cache what it still has; else every stage runs.
        only: stages, with what they need; empty for all that were recorded.

    Raises:
        NotRegistered: there is no such run or version.
        CannotReproduce: its files or its commit are missing, edits were made and `with_diff` was not given, no such stage.
        AlreadyRunning: another one builds the same run.
    """
    record = find_record(root, registry, what)
    check_reproducible(root, record, with_diff)
    folder = root / PLACE / (record.run_id + ("-cached" if cached else ""))
    folder.mkdir(parents=True, exist_ok=True)
    with claimed(folder) as free:
        if not free:
            raise AlreadyRunning(f"{folder.relative_to(root)} is being built by another `deepgen reproduce`; wait or stop it.")
        clone = folder / "clone"
        if clone.exists():
            say(f"going on in {clone.relative_to(root)}; to begin anew, remove it")
        else:
            sweep_stale(folder)
            make_clone(root, record, clone, cached)
        targets, skipped = choose_stages(clone, record, only)
        for line in [*left_out_warning(record), *environment_warning(record), *skipped]:
            say(line)
        say(f"run {record.run_id}, commit {str(record.commit)[:12]}: {len(targets)} stages in {clone.relative_to(root)}")
        code = run_child([find_dvc(clone), "repro", *targets], clone, clone_environment(clone), group=True)
    if code == exits.INTERRUPTED:
        say("interrupted; finished stages are kept and the running one is saved. Go on with the same command.")
        return code
    if code != exits.DONE:
        say(f"a stage failed, its lines are above. The same command goes on from there; the clone is {clone.relative_to(root)}.")
        return exits.FAILED
    outputs = compare(record, clone, targets)
    for line in describe(record, outputs):
        say(line)
    return exits.DONE if all(output.same for output in outputs) else exits.FAILED


def find_record(root: Path, registry: Registry, what: str) -> Record:
    if RUN_ID.fullmatch(what):
        return read_record(registry, what)
    version, digest = find_version(root, registry, what)
    if version is None:
        raise CannotReproduce(f"{what}: the registry knows no version with weights {digest[:12]}, so no run to build again.")
    return read_record(registry, version.run_id or "none")


def check_reproducible(root: Path, record: Record, with_diff: bool) -> None:
    """Raises CannotReproduce, naming what is missing or to be decided."""
    if record.params is None or not record.lock:
        stage = f" It is a run of the stage {record.tags['stage']}." if "stage" in record.tags else ""
        raise CannotReproduce(
            f"run {record.run_id} holds no params.yaml and dvc.lock: give a version, or the run of its registration.{stage}"
        )
    if record.commit is None:
        raise CannotReproduce(f"run {record.run_id}: its commit was not recorded; it was registered outside of git.")
    if git(root, "cat-file", "-e", f"{record.commit}^{{commit}}").returncode != 0:
        raise CannotReproduce(
            f"commit {record.commit} is not in this repository. Fetch it from where the run was made: git fetch REMOTE {record.commit}"
        )
    edits = record.read(EDITS)
    if edits is None and record.tags.get("git_dirty") == "true":
        raise CannotReproduce(f"run {record.run_id} was made with uncommitted changes, and they were not recorded: its code is lost.")
    if (edited := edited_files(record)) and not with_diff:
        raise CannotReproduce(
            f"run {record.run_id} was made with uncommitted changes in {', '.join(edited)}. Look at them: deepgen lineage VERSION --diff; "
            "then apply them with --with-diff."
        )


def edited_files(record: Record) -> list[str]:
    """Those that its commit does not hold as they were; params.yaml is recorded whole."""
    return [name for name in (record.read(EDITS) or {"files": []})["files"] if name != "params.yaml"]


def make_clone(root: Path, record: Record, clone: Path, cached: bool) -> None:
    """The commit with its edits, the recorded params.yaml and, to take from the cache, dvc.lock. Whole or absent."""
    building = clone.with_name(f".{clone.name}.{os.getpid()}.tmp")
    _git(clone.parent, "clone", "--quiet", "--no-checkout", str(root), str(building))
    _git(building, "checkout", "--quiet", "--detach", str(record.commit))
    if edited_files(record):
        patch = building / ".git" / DIFF
        patch.write_bytes(record.files[DIFF])
        _git(building, "apply", "--binary", "--exclude=params.yaml", str(patch))
    (building / "params.yaml").write_bytes(record.files["params.yaml"])
    (building / "dvc.lock").unlink(missing_ok=True)  # with the commit's own, DVC would take stages for done
    if cached:
        (building / "dvc.lock").write_bytes(record.files["dvc.lock"])
    cache = cache_folder(root).resolve() if cached else "cache"  # its own, whatever the commit says: DVC takes from a cache what it finds
    (building / ".dvc" / "config.local").write_text(f"[cache]\n    dir = {cache}\n")
    for name in (*LINKED, *_own_data(record)):
        if (root / name).exists() and not (building / name).exists():
            (building / name).parent.mkdir(parents=True, exist_ok=True)
            (building / name).symlink_to((root / name).resolve())
    os.rename(building, clone)


def _own_data(record: Record) -> list[str]:
    """Files of one's own that params.yaml names by a path from the project."""
    params = check_params(record.params or {})
    paths = [part.path for part in params.data.parts.values() if part.path is not None] + [params.foundation.path]
    return [str(path) for path in paths if not Path(path).is_absolute()]


def _git(folder: Path, *arguments: str) -> None:
    done = git(folder, *arguments)
    if done.returncode != 0:
        raise CannotReproduce(f"`git {' '.join(arguments)}` failed: {done.stderr.decode(errors='replace').strip()}")


def clone_environment(clone: Path) -> dict[str, str]:
    """This process's, but for the stores; `python` is this interpreter."""
    kept = {name: value for name, value in os.environ.items() if name not in OTHERS}
    path = os.pathsep.join([str(Path(sys.executable).parent), kept.get("PATH", os.defpath)])
    return kept | dvc_environment(clone) | {"PATH": path, "PYTHONUNBUFFERED": "1"}


def choose_stages(clone: Path, record: Record, only: Sequence[str]) -> tuple[list[str], list[str]]:
    """Recorded stages to build, in the order of dvc.yaml, and a line for each that is left out.

    A stage that the run did not bring up to date is left out: its record is of other params, or of other inputs than those recorded.

    Raises:
        CannotReproduce: `only` names a stage that was not recorded, or none was.
    """
    assert record.lock is not None and record.params is not None, "check_reproducible has seen to it"
    stages = load_stages(clone, parse_params((clone / "params.yaml").read_text()))
    stale = {name: reason for name, entry in record.lock.items() if (reason := _stale(entry, stages.get(name), record))}
    if unknown := [name for name in only if name not in record.lock or name in stale]:
        known = ", ".join(name for name in record.lock if name not in stale)
        raise CannotReproduce(f"{', '.join(unknown)}: not recorded by run {record.run_id}; allowed: {known}")
    targets = [name for name in stages if name in record.lock and name not in stale and (not only or name in only)]
    if not targets:
        raise CannotReproduce(
            f"run {record.run_id} brought no stage up to date: " + "; ".join(f"{name}, {why}" for name, why in stale.items())
        )
    return targets, [] if only else [f"left out: {name}, {reason}" for name, reason in stale.items()]


def _stale(entry: dict[str, Any], stage: Stage | None, record: Record) -> str | None:
    """Why a stage's entry in dvc.lock is not of this run."""
    assert record.lock is not None and record.params is not None, "check_reproducible has seen to it"
    if stage is None:
        return "which is no stage of its dvc.yaml any more"
    made = {out["path"]: out["md5"] for other in record.lock.values() for out in other.get("outs", [])}
    if other := [dep["path"] for dep in entry.get("deps", []) if made.get(dep["path"], dep["md5"]) != dep["md5"]]:
        return f"recorded from another {', '.join(other)}"
    params = {key: value for values in entry.get("params", {}).values() for key, value in values.items()}
    try:
        moved = [key for key, value in params.items() if look_up(record.params, key) != value]
    except KeyError:
        return "recorded with keys that params.yaml has no more"
    return f"recorded with another {', '.join(moved)}" if moved else None


def left_out_warning(record: Record) -> list[str]:
    names = (record.read(EDITS) or {"left_out": []})["left_out"]
    return [f"warning: too large to be recorded, and so missing in the clone: {', '.join(names)}"] if names else []


def environment_warning(record: Record) -> list[str]:
    differences = differing_packages(record.read(ENVIRONMENT))
    return ["warning: the environment is not the recorded one:", *(f"  {line}" for line in differences)] if differences else []


def compare(record: Record, clone: Path, targets: Sequence[str]) -> list[Output]:
    """Every recorded output of the stages that were built, targets and what they need, with the rebuilt one."""
    assert record.lock is not None, "check_reproducible has seen to it"
    lock = clone / "dvc.lock"
    rebuilt: dict[str, Any] = (yaml.safe_load(lock.read_text()) or {}).get("stages", {}) if lock.is_file() else {}
    outputs = []
    for name, entry in record.lock.items():
        if name not in targets and name not in rebuilt:
            continue
        made = rebuilt.get(name, {})
        inputs = _md5s(made.get("deps", []))
        other = tuple(path for path, md5 in _md5s(entry.get("deps", [])).items() if inputs.get(path) != md5)
        outs = _md5s(made.get("outs", []))
        outputs += [Output(name, path, md5, outs.get(path), other) for path, md5 in _md5s(entry.get("outs", [])).items()]
    return outputs


def _md5s(rows: list[dict[str, Any]]) -> dict[str, str]:
    return {row["path"]: row["md5"] for row in rows}


def describe(record: Record, outputs: Sequence[Output]) -> list[str]:
    """The table, and what it means."""
    lines = ["", f"{'stage':<34} {'output':<40} {'recorded':<14} {'rebuilt':<14} same"]
    for output in outputs:
        rebuilt = (output.rebuilt or "absent")[:12]
        lines.append(f"{output.stage:<34} {output.path:<40} {output.recorded[:12]:<14} {rebuilt:<14} {'yes' if output.same else 'NO'}")
    differing = [output for output in outputs if not output.same]
    if not differing:
        return [*lines, "", f"all {len(outputs)} outputs are the recorded ones, to the byte"]
    lines += ["", f"{len(differing)} of {len(outputs)} outputs differ:"]
    for output in differing:
        why = f"its inputs differ ({', '.join(output.other_inputs)})" if output.other_inputs else "from the same inputs"
        lines.append(f"  {output.stage}: {output.path}, {why}")
    likely = environment_warning(record)
    return lines + (
        ["the likely cause:", *likely] if likely else ["the environment is the recorded one" if record.read(ENVIRONMENT) else ""]
    )
