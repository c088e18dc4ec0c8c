"""What a run folder tells of its run: who writes it, how it ended, its last whole checkpoint."""

import fcntl
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from runtime.files import read_json, write_atomic, write_json

SCORES = "scores.json"  # held-out loss of each checkpoint that was asked, by its name
REGISTERED = "registered"  # names of checkpoints that must stay, one a line
SPOOL = "tracking.jsonl"  # what is logged, on its way to MLflow
NOTE = "mlflow.json"  # the MLflow run, and how many bytes of the spool have arrived there
ENDED = (
    "ended.json"  # state, error, time, and seconds of a finished command; written when it ends, absent while it runs and after a SIGKILL
)


def run_folders(root: Path) -> list[Path]:
    """Every `outputs/runs/<stage>[/<key>]/<fingerprint>/`, sorted."""
    runs = root / "outputs" / "runs"
    return sorted(note.parent for depth in ("*/*", "*/*/*") for note in runs.glob(f"{depth}/run.json"))


def writer_of(folder: Path) -> int | None:
    """The process that holds the folder's lock (0 if it has not said its number yet); None if nobody does."""
    return holder_of(folder / "lock")


def holder_of(path: Path) -> int | None:
    """The same of any lock file that its holder writes its number into."""
    try:
        with open(path) as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared, for an instant: readers don't disturb each other
            except OSError:
                return int(lock.read().strip() or 0)
    except (FileNotFoundError, NotADirectoryError):
        pass
    return None


@contextmanager
def claimed(folder: Path) -> Iterator[bool]:
    """Hold the folder's lock as a stage would; False if somebody else does."""
    with open(folder / "lock", "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
            return
        yield True


def ending_of(folder: Path) -> dict[str, Any] | None:
    """How the last command in this folder ended: state (finished, interrupted, failed), error, time; None if it did not say."""
    try:
        return read_json(folder / ENDED)
    except (FileNotFoundError, json.JSONDecodeError):
        return None


def heartbeat_of(folder: Path) -> dict[str, Any] | None:
    """The last whole line of progress.jsonl: time, step, total, rate (units/s), eta_s, and values such as loss."""
    try:
        with open(folder / "progress.jsonl", "rb") as handle:
            handle.seek(max(0, handle.seek(0, 2) - 8192))
            lines = handle.read().splitlines()
    except FileNotFoundError:
        return None
    for line in reversed(lines):
        try:
            row = json.loads(line)
        except ValueError:  # cut by a kill, or by our own seek
            continue
        if isinstance(row, dict) and "step" in row:
            return row
    return None


def checkpoints(folder: Path) -> list[Path]:
    """`step-000200/` folders, oldest first."""
    found = [path for path in folder.glob("step-*") if path.is_dir() and path.name.removeprefix("step-").isdigit()]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def last_whole_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint with every file that it was written with. Their hashes are checked when it is restored."""
    return next((path for path in reversed(checkpoints(folder)) if _is_whole(path)), None)


def tell_score(checkpoint: Path, score: float) -> None:
    """A checkpoint's held-out loss, lower is better: the best stays. One that is no number counts as unknown."""
    if math.isfinite(score):
        write_json(checkpoint.parent / SCORES, _scores(checkpoint.parent) | {checkpoint.name: score})


def register_checkpoint(checkpoint: Path) -> None:
    """Neither retention nor `deepgen gc` deletes this one.

    Raises:
        FileNotFoundError: it is no whole checkpoint.
    """
    if not _is_whole(checkpoint):
        raise FileNotFoundError(f"{checkpoint}: no whole checkpoint; expected outputs/runs/STAGE/FINGERPRINT/step-000200.")
    names = {checkpoint.name, *_registered(checkpoint.parent)}
    write_atomic(checkpoint.parent / REGISTERED, "\n".join(sorted(names)) + "\n")


def best_checkpoint(folder: Path) -> Path | None:
    """Of those that are there, the one with the lowest score, the earlier of two; None where no score was told."""
    scores = _scores(folder)
    return min((path for path in checkpoints(folder) if path.name in scores), key=lambda path: scores[path.name], default=None)


def registered_checkpoints(folder: Path) -> set[Path]:
    return {folder / name for name in _registered(folder)}


def kept_checkpoints(folder: Path) -> set[Path]:
    """The best and the registered."""
    best = best_checkpoint(folder)
    return registered_checkpoints(folder) | ({best} if best else set())


def waits_for_store(folder: Path) -> bool:
    """Whether MLflow has not got all that was logged; a last line that was cut by a kill never will be."""
    content = (folder / SPOOL).read_bytes() if (folder / SPOOL).exists() else b""
    sent = read_json(folder / NOTE)["sent"] if (folder / NOTE).exists() else 0
    return content.rfind(b"\n") + 1 > sent


def _scores(folder: Path) -> dict[str, float]:
    return read_json(folder / SCORES) if (folder / SCORES).exists() else {}


def _registered(folder: Path) -> list[str]:
    return (folder / REGISTERED).read_text().split() if (folder / REGISTERED).exists() else []


def _is_whole(checkpoint: Path) -> bool:
    try:
        names = read_json(checkpoint / "complete.json")
    except (OSError, json.JSONDecodeError):
        return False
    return all((checkpoint / name).is_file() for name in names)


def command_for(stage: str) -> str:
    """What goes on with a stage, or starts it."""
    return f"deepgen run (this stage alone: dvc repro --single-item {stage})"
