"""One MLflow run per stage and fingerprint: params, inputs by digest, curves, pictures. Silent on other ranks than the first."""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from runtime.files import read_json, write_json
from runtime.mlflow_store import open_store
from runtime.stage import StageRun, rank

logger = logging.getLogger(__name__)


class Tracker:
    """Writes to the MLflow run of this stage; rows wait in a list and are sent together.

    A resumed process reopens the run that its folder names, and steps that were sent before are not sent twice.
    """

    def __init__(self, run: StageRun, experiment: str) -> None:
        self.run, self.active = run, rank() == 0
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.run_id: str | None = None
        if not self.active:
            return
        from mlflow import MlflowClient

        self.client = MlflowClient(open_store(run.root))
        self.note = run.folder / "mlflow.json"
        noted = read_json(self.note) if self.note.exists() else {}
        self.sent = noted.get("sent", 0)
        self.run_id = noted.get("run_id") if self._exists(noted.get("run_id")) else None
        if self.run_id is None:
            self.sent = 0
            found = self.client.get_experiment_by_name(experiment)
            experiment_id = found.experiment_id if found else self.client.create_experiment(experiment)
            created = self.client.create_run(experiment_id, run_name=f"{run.name} {run.fingerprint[:6]}")
            self.run_id = created.info.run_id
            self._describe()
        self.client.update_run(self.run_id, status="RUNNING")
        write_json(self.note, {"run_id": self.run_id, "sent": self.sent})

    def _exists(self, run_id: str | None) -> bool:
        from mlflow.exceptions import MlflowException

        try:
            return run_id is not None and self.client.get_run(run_id).info.lifecycle_stage == "active"
        except MlflowException:
            return False

    def _describe(self) -> None:
        """Params of the stage, its fingerprint, and its inputs by digest."""
        from mlflow.entities import Param, RunTag

        sections = {key: self.run.values[key.split(".")[0]] for key in self.run.stage.params}
        flat = dict(_flatten(sections))
        self.client.log_batch(
            self.run_id,
            params=[Param(key, str(value)[:5000]) for key, value in flat.items()],
            tags=[
                RunTag("stage", self.run.name),
                RunTag("preset", self.run.params.preset),
                RunTag("fingerprint", self.run.fingerprint),
                RunTag("run_folder", str(self.run.folder.relative_to(self.run.root))),
                *(RunTag(f"digest.{name}", digest) for name, digest in self.run.digests.items()),
            ],
        )
        self._log_inputs()

    def _log_inputs(self) -> None:
        """Each input as an MLflow dataset whose digest is ours: equal digests are the lineage between runs."""
        import mlflow
        from mlflow.entities import DatasetInput, InputTag

        inputs = []
        for name, digest in self.run.digests.items():
            if name.startswith("input "):
                path = name.removeprefix("input ")
                dataset = mlflow.data.meta_dataset.MetaDataset(
                    mlflow.data.http_dataset_source.HTTPDatasetSource(f"file:{path}"), name=path, digest=digest[:32]
                )
                inputs.append(DatasetInput(dataset._to_mlflow_entity(), tags=[InputTag("mlflow.data.context", "training")]))
        self.client.log_inputs(self.run_id, datasets=inputs)

    def log(self, step: int, **values: float) -> None:
        if self.active and step > self.sent:
            self.rows.append((step, values))
            if len(self.rows) >= 50:
                self.flush()

    def flush(self) -> None:
        """Send what waits. A store that can't be reached stops nothing: the rows stay until the next flush."""
        if not self.active or not self.rows:
            return
        import time

        from mlflow.entities import Metric
        from mlflow.exceptions import MlflowException

        now = int(time.time() * 1000)
        metrics = [Metric(name, value, now, step) for step, values in self.rows for name, value in values.items()]
        try:
            for start in range(0, len(metrics), 1000):
                self.client.log_batch(self.run_id, metrics=metrics[start : start + 1000])
        except (MlflowException, OSError) as error:
            logger.warning("MLflow can't be reached (%s): %d rows wait", error, len(self.rows))
            return
        self.sent = self.rows[-1][0]
        self.rows.clear()
        write_json(self.note, {"run_id": self.run_id, "sent": self.sent})

    def picture(self, path: Path, folder: str = "pictures") -> None:
        if self.active:
            self.client.log_artifact(self.run_id, str(path), folder)

    def result(self, **values: float) -> None:
        """Final numbers, as metrics without a step."""
        if self.active:
            for name, value in values.items():
                self.client.log_metric(self.run_id, name, value)

    def tag(self, **values: str) -> None:
        if self.active:
            for name, value in values.items():
                self.client.set_tag(self.run_id, name, value)

    def end(self, status: str) -> None:
        if self.active:
            self.flush()
            self.client.set_terminated(self.run_id, status)


@contextmanager
def track(run: StageRun) -> Iterator[Tracker]:
    """The stage's MLflow run: FINISHED, or KILLED and FAILED where the body raises."""
    from runtime.exits import Interrupted

    tracker = Tracker(run, run.params.registry.experiment)
    try:
        yield tracker
    except Interrupted:
        tracker.end("KILLED")
        raise
    except BaseException:
        tracker.end("FAILED")
        raise
    run.report({"mlflow_run_id": tracker.run_id})
    tracker.end("FINISHED")


def _flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flatten(inner, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, json.dumps(value) if isinstance(value, list) else value
