"""MLflow's store inside the clone: one SQLite file and an artifact folder, made once under a lock, that follow the clone when it moves."""

import fcntl
import logging
import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from runtime.files import write_atomic

KIND = {"mlflow.experimentKind": "custom_model_development"}  # else the UI opens on its page for language-model traces

# Every column in which MLflow keeps an absolute artifact address.
ADDRESSES = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive file lock, waiting for it. Kept on local disk; freed by the kernel if the holder dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def open_store(root: Path, experiment: str = "deepgen") -> str:
    """Tracking URI of a store that exists, holds `experiment` and knows where the clone lies now.

    MLFLOW_TRACKING_URI overrides: the store is then someone else's, and is taken as it is.
    """
    if remote := os.environ.get("MLFLOW_TRACKING_URI"):
        return remote
    home = owner(root)
    folder = home / "outputs" / "mlflow"
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    ready = f"{home}\n"
    marker = folder / "root"
    experiments = folder / f".experiment-{experiment}"
    if marker.is_file() and marker.read_text() == ready and experiments.is_file():
        return uri
    with locked(folder / "lock"):
        if marker.is_file() and marker.read_text() != ready:
            _rewrite_addresses(folder / "mlflow.db", Path(marker.read_text().strip()), home)
        if not experiments.is_file():
            _create(uri, folder, experiment)
        write_atomic(experiments, "")
        write_atomic(marker, ready)
    return uri


def owner(root: Path) -> Path:
    """The clone whose store is used at `root`: itself; of a copy that `dvc exp run` made and deletes, the clone that it was made in."""
    here = root.resolve()
    for folder in here.parents:
        if folder.parts[-3:] == (".dvc", "tmp", "exps"):
            return folder.parents[2]
    return here


def _create(uri: str, folder: Path, experiment: str) -> None:
    from mlflow import MlflowClient

    logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)  # it tells of each table it makes
    client = MlflowClient(uri, uri)
    if client.get_experiment_by_name(experiment) is None:
        client.create_experiment(experiment, artifact_location=(folder / "artifacts").as_uri(), tags=KIND)
    with closing(sqlite3.connect(folder / "mlflow.db")) as database:
        database.execute("PRAGMA journal_mode = WAL")  # kept in the file: readers and one writer at a time don't block each other


def _rewrite_addresses(database: Path, old: Path, new: Path) -> None:
    """Replace the old clone's folder, as a path or as a file URI, at the head of every stored address."""
    with closing(sqlite3.connect(database, timeout=30)) as connection, connection:
        for table, column in ADDRESSES:
            for before, after in ((old.as_uri() + "/", new.as_uri() + "/"), (f"{old}/", f"{new}/")):
                connection.execute(
                    f"UPDATE {table} SET {column} = ? || substr({column}, ?) WHERE substr({column}, 1, ?) = ?",
                    (after, len(before) + 1, len(before), before),
                )
