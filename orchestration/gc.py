"""`deepgen gc`: what may go from outputs/, with its size and the reason, and never what is registered, recorded or running."""

import contextlib
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

from orchestration.registry import Registry
from runtime.files import read_json
from runtime.mlflow_store import locked
from runtime.params import Params, parse_params
from runtime.recipe import load_stages
from runtime.recorded import recorded_paths
from runtime.run_folder import (
    NOTE,
    SPOOL,
    checkpoints,
    claimed,
    ending_of,
    kept_checkpoints,
    last_whole_checkpoint,
    registered_checkpoints,
    run_folders,
    waits_for_store,
    writer_of,
)
from runtime.stage import stage_digests

KEEP_DAYS = 30.0
DAY = 86400.0


@dataclass(frozen=True)
class Garbage:
    """A file or folder that may go. size in bytes on disk, a file with several names only where this is its last."""

    path: Path
    size: int
    reason: str


@dataclass(frozen=True)
class Kept:
    """What must stay: run folders and MLflow runs that the registry names, checkpoints that were registered, what MLflow has not got yet,
    and paths that dvc.lock names."""

    folders: frozenset[Path]
    runs: frozenset[str]
    recorded: frozenset[Path]

    def holds(self, path: Path) -> bool:
        """Whether `path` is kept, holds something kept, or lies inside of it."""
        place = path.resolve()
        kept = self.folders | self.recorded
        return any(place == other or place in other.parents or other in place.parents for other in kept)


def find_garbage(root: Path, params: Params, keep_days: float = KEEP_DAYS, now: float | None = None) -> list[Garbage]:
    """All that may go, biggest first. A registry that can't be read is an error: what is registered is then unknown."""
    root = root.resolve()
    oldest = (time.time() if now is None else now) - keep_days * DAY
    registry = Registry.open(root, params)
    kept = read_kept(root, registry)
    found = [*_in_run_folders(root, kept, oldest), *_artifacts(root, registry, kept, oldest), *_leftovers(root, oldest)]
    once = {item.path: item for item in reversed(found) if not kept.holds(item.path)}
    inside = [path for path in once if any(parent in once for parent in path.parents)]
    return sorted((item for path, item in once.items() if path not in inside), key=lambda item: -item.size)


def read_kept(root: Path, registry: Registry) -> Kept:
    """Runs of every version and of its training stages, their run folders; registered checkpoints and spools that wait; dvc.lock's inputs
    and outputs."""
    runs: set[str] = set()
    for version in _pages(registry.client.search_model_versions):
        tags = dict(version.tags)
        if version.run_id:
            runs.add(version.run_id)
            tags |= registry.client.get_run(version.run_id).data.tags
        runs |= {value for name, value in tags.items() if name.startswith("parent_run.")}
    folders = set()
    for run_id in runs:
        place = _tag_of(registry, run_id, "run_folder")
        if place:
            folders.add((root / place).resolve())
    for folder in run_folders(root):  # the store may have lost a run that a version names
        note = folder / NOTE
        if note.is_file() and read_json(note).get("run_id") in runs:
            folders.add(folder.resolve())
        folders |= {checkpoint.resolve() for checkpoint in registered_checkpoints(folder)}
        if waits_for_store(folder):
            folders.add((folder / SPOOL).resolve())
    return Kept(frozenset(folders), frozenset(runs), frozenset(_recorded(root)))


def _pages(search: Callable[..., Any], **how: Any) -> Iterator[Any]:
    """Everything that a search of MLflow finds."""
    token = None
    while True:
        found = search(page_token=token, **how)
        yield from found
        token = found.token
        if not token:
            return


def _tag_of(registry: Registry, run_id: str, name: str) -> str | None:
    from mlflow.exceptions import MlflowException

    try:
        return registry.client.get_run(run_id).data.tags.get(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None


def _recorded(root: Path) -> Iterator[Path]:
    for paths in recorded_paths(root).values():
        yield from ((root / path).resolve() for path in paths)


# --- run folders --------------------------------------------------------------------------------------------------------------------


def _in_run_folders(root: Path, kept: Kept, oldest: float) -> Iterator[Garbage]:
    values = parse_params((root / "params.yaml").read_text())
    stages = load_stages(root, values)
    present: dict[str, Any] = {}
    for folder in run_folders(root):
        if folder.resolve() in kept.folders or writer_of(folder) is not None:
            continue
        facts = read_json(folder / "run.json")
        name = facts["stage"]
        for damaged in sorted(folder.glob("*.bad")):
            yield _garbage(damaged, "a checkpoint that was damaged and set aside")
        ending, whole = ending_of(folder), last_whole_checkpoint(folder)
        if ending is not None and ending["state"] == "finished" and whole is not None:
            for old in checkpoints(folder):
                if old != whole and old not in kept_checkpoints(folder):
                    yield _garbage(old, f"the stage is finished, and {whole.name} is newer")
        newest = _newest(folder)
        if newest > oldest:
            continue
        if name in stages and name not in present:
            try:
                present[name] = stage_digests(root, stages[name], values)
            except FileNotFoundError:
                present[name] = None  # an input is missing: which folder the stage would go on in can't be told
        if name in stages and present[name] in (None, facts["digests"]):
            continue
        yield _garbage(folder, f"a run of other params, inputs or code, untouched for {_days(newest)} days")


def _newest(folder: Path) -> float:
    """When anything in the folder last changed, seconds since 1970."""
    return max([folder.stat().st_mtime, *(path.lstat().st_mtime for path in folder.rglob("*") if path.name != "lock")])


def _days(since: float) -> int:
    return int((time.time() - since) / DAY)


# --- MLflow -------------------------------------------------------------------------------------------------------------------------


def _artifacts(root: Path, registry: Registry, kept: Kept, oldest: float) -> Iterator[Garbage]:
    """Artifact folders inside this clone of ended, unregistered runs; their params and curves stay."""
    from mlflow.entities import ViewType

    store = root / "outputs" / "mlflow"
    experiment = registry.client.get_experiment_by_name(registry.params.registry.experiment)
    if experiment is None:
        return
    for run in _pages(registry.client.search_runs, experiment_ids=[experiment.experiment_id], run_view_type=ViewType.ALL):
        place, ended = urlparse(run.info.artifact_uri), (run.info.end_time or 0) / 1000
        folder = Path(unquote(place.path))
        if run.info.run_id in kept.runs or run.info.status in ("RUNNING", "SCHEDULED") or not 0 < ended < oldest:
            continue
        if place.scheme in ("", "file") and folder.is_dir() and folder.resolve().is_relative_to(store) and any(folder.iterdir()):
            yield _garbage(folder.resolve(), f"pictures and files of an unregistered run that ended {_days(ended)} days ago")


# --- the rest -----------------------------------------------------------------------------------------------------------------------


def _leftovers(root: Path, oldest: float) -> Iterator[Garbage]:
    outputs = root / "outputs"
    for path in sorted([*outputs.rglob(".*.tmp"), *outputs.rglob(".*.old")]):
        pid = path.name.rsplit(".", 2)[-2]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists():
            yield _garbage(path, f"left by process {pid}, which was killed while it wrote")
    for path in sorted(outputs.glob("added/*")):
        if path.lstat().st_mtime < oldest:
            yield _garbage(path, "pictures of a look at data of one's own; `deepgen data add` draws them again")
    for kind, whose in (("experiments", "the launchpad's job `experiment`"), ("reproduce", "`deepgen reproduce`")):
        for path in sorted(outputs.glob(f"{kind}/*/")):
            if (newest := _newest(path)) < oldest:
                yield _garbage(path, f"a folder of {whose}, untouched for {_days(newest)} days")


def _garbage(path: Path, reason: str) -> Garbage:
    return Garbage(path, size_of(path), reason)


def size_of(path: Path) -> int:
    """Bytes that removing `path` frees."""
    files = [path] if path.is_symlink() or not path.is_dir() else [file for file in path.rglob("*") if file.is_symlink() or file.is_file()]
    links: dict[tuple[int, int], list[Any]] = {}
    for file in files:
        facts = file.lstat()
        links.setdefault((facts.st_dev, facts.st_ino), []).append(facts)
    return sum(facts[0].st_size for facts in links.values() if facts[0].st_nlink == len(facts))


def remove_garbage(root: Path, params: Params, chosen: list[Garbage]) -> list[Garbage]:
    """Remove what is still garbage of what was shown; what was registered or started meanwhile stays."""
    removed = []
    registry = Registry.open(root, params)
    with locked(root / "outputs" / "registry" / "lock"):  # nobody registers meanwhile
        kept = read_kept(root.resolve(), registry)
        for item in chosen:
            folder = next((path for path in (item.path, *item.path.parents) if (path / "run.json").is_file()), None)
            with contextlib.nullcontext(True) if folder is None else claimed(folder) as free:
                if not free or kept.holds(item.path):
                    continue
                if item.path.is_dir() and not item.path.is_symlink():
                    shutil.rmtree(item.path)
                else:
                    item.path.unlink(missing_ok=True)
                removed.append(item)
    return removed


def describe(root: Path, found: list[Garbage]) -> Iterator[str]:
    """A line each, and the sum."""
    for item in found:
        yield f"{shown_size(item.size):>10}  {item.path.relative_to(root.resolve())}  ({item.reason})"
    yield f"{shown_size(sum(item.size for item in found)):>10}  in {len(found)} places" if found else "nothing may go"


def shown_size(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"
