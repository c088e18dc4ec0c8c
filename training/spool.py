"""What waits for MLflow: a file in the run folder, sent once and in order whenever the store answers, by this process or a later one."""

import fcntl
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from runtime.exits import Plain
from runtime.files import read_json, write_json
from runtime.mlflow_store import open_store
from runtime.run_folder import NOTE, SPOOL

TIMEOUT_S = 10  # of one request: what a store that hangs costs an attempt
PER_BATCH, PER_TEXTS = 1000, 100  # metrics, and params or tags, that MLflow takes in one request
Event = dict[str, Any]
logger = logging.getLogger(__name__)


class StoreUnreachable(Plain):
    """MLflow's store refuses, hangs or fails; what was to be sent waits in the spools."""


class Spool:
    """`tracking.jsonl` of a run folder: one event a line, in order. Kept when sent, so that a lost store can be refilled."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / SPOOL
        content = self.path.read_bytes() if self.path.exists() else b""
        self.size = content.rfind(b"\n") + 1
        if self.size < len(content):  # its writer was killed in the middle of a line
            os.truncate(self.path, self.size)

    def append(self, events: list[Event]) -> None:
        """All of `events` or, where an OSError is raised, none of them."""
        lines = "".join(json.dumps(event) + "\n" for event in events).encode()
        try:
            with open(self.path, "ab") as handle:
                handle.write(lines)
                handle.flush()
                os.fsync(handle.fileno())
        except OSError:
            if self.path.exists():
                os.truncate(self.path, self.size)
            raise
        self.size += len(lines)

    def read(self, start: int = 0) -> Iterator[tuple[Event, int]]:
        """Events from byte `start` on, each with the byte after it."""
        if self.size == 0:
            return
        with open(self.path, "rb") as handle:
            handle.seek(start)
            while start < self.size:
                line = handle.readline()
                start += len(line)
                yield json.loads(line), start


class Sender:
    """Sends a run folder's spool to MLflow and notes in `mlflow.json` the run's id and how many bytes of the spool have arrived.

    Sending is safe to repeat, for a killed sender, or an answer that was lost, leaves open what arrived: a run is looked for by its token
    before it is created, metrics carry the time at which they were made (MLflow keeps one row of equal ones), the rest is set, not added.
    """

    def __init__(self, root: Path, folder: Path, spool: Spool) -> None:
        self.root, self.folder, self.spool = root, folder, spool
        noted = read_json(folder / NOTE) if (folder / NOTE).exists() else {}
        self.run_id: str | None = noted.get("run_id")
        self.sent: int = noted.get("sent", 0)
        self.client: Any = None
        self.experiment_id = ""

    def send(self) -> int:
        """Send what waits; the number of events that arrived. Raises what the client raises where the store can't be reached."""
        from mlflow.exceptions import MlflowException

        if self.client is None:
            self._connect()
        count = 0
        for events, end in self._groups():
            try:
                self._deliver(events)
            except (MlflowException, FileNotFoundError) as error:
                if isinstance(error, MlflowException) and error.error_code != "INVALID_PARAMETER_VALUE":
                    raise
                if not self._lives():  # somebody deleted it: all of the spool goes to a new one
                    self.client = None
                    return self.send()
                self._deliver_singly(events, error)
            count += len(events)
            self.sent = end
            self._note()
        return count

    def _deliver_singly(self, events: list[Event], error: Exception) -> None:
        """What MLflow refused in one request: each event that it takes, and a word of those that it does not."""
        from mlflow.exceptions import MlflowException

        if len(events) == 1:
            logger.warning("MLflow does not take %s of %s (%s): passed over", events[0]["kind"], self.folder.name, error)
            return
        for event in events:
            try:
                self._deliver([event])
            except MlflowException as refusal:
                if refusal.error_code != "INVALID_PARAMETER_VALUE":
                    raise
                self._deliver_singly([event], refusal)

    def _note(self) -> None:
        write_json(self.folder / NOTE, {"run_id": self.run_id, "sent": self.sent})

    def _connect(self) -> None:
        """A client, and the run that the spool's first event describes: the noted one, the one with its token, or a new one."""
        # MLflow's own retries would hold the training up for minutes; the spool is the retry here.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", str(TIMEOUT_S))
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        from mlflow import MlflowClient

        first, _ = next(self.spool.read())
        store = open_store(self.root, first["experiment"])
        self.client = client = MlflowClient(store, store)
        try:
            found = client.get_experiment_by_name(first["experiment"])
            self.experiment_id = found.experiment_id if found else client.create_experiment(first["experiment"])
            if self.run_id is None or not self._lives():
                self.sent = 0
                runs = client.search_runs([self.experiment_id], f"tags.spool = '{first['token']}'")
                run = runs[0] if runs else client.create_run(self.experiment_id, first["time"], {"spool": first["token"]}, first["name"])
                self.run_id = run.info.run_id
                self._note()
        except BaseException:
            self.client = None
            raise

    def _lives(self) -> bool:
        from mlflow.exceptions import MlflowException

        try:
            return self.client.get_run(self.run_id).info.lifecycle_stage == "active"
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return False
            raise

    def _groups(self) -> Iterator[tuple[list[Event], int]]:
        """What one request takes: runs of metrics, other events one by one; each with the byte after it."""
        group: list[Event] = []
        values, end = 0, self.sent
        for event, after in self.spool.read(self.sent):
            full = values + len(event.get("values", ())) > PER_BATCH
            if group and (full or event["kind"] != "metrics"):
                yield group, end
                group, values = [], 0
            group.append(event)
            values, end = values + len(event.get("values", ())), after
            if event["kind"] != "metrics":
                yield group, end
                group, values = [], 0
        if group:
            yield group, end

    def _deliver(self, events: list[Event]) -> None:
        from mlflow.entities import Metric, Param, RunTag

        client, run_id, event = self.client, self.run_id, events[0]
        kind = event["kind"]
        if kind == "metrics":
            rows = [Metric(name, value, e["time"], e["step"]) for e in events for name, value in e["values"].items()]
            client.log_batch(run_id, metrics=rows)
        elif kind in ("params", "tags"):
            make = Param if kind == "params" else RunTag
            pairs = [make(name, value) for name, value in event["texts"].items()]
            for start in range(0, len(pairs), PER_TEXTS):
                client.log_batch(run_id, **{kind: pairs[start : start + PER_TEXTS]})
        elif kind == "inputs":
            client.log_inputs(run_id, datasets=[_dataset(path, digest) for path, digest in event["digests"].items()])
        elif kind == "picture":
            client.log_artifact(run_id, str(self.folder / event["path"]), event["folder"])
        elif kind == "checkpoint":
            self._log_model(event)
        elif kind == "status" and event["status"] == "RUNNING":
            client.update_run(run_id, status="RUNNING")
        elif kind == "status":
            client.set_terminated(run_id, event["status"], event["time"])

    def _log_model(self, event: Event) -> None:
        """A checkpoint as a logged model: its place, digest and held-out numbers. Its weights stay where they are."""
        from mlflow.entities import LoggedModelOutput, Metric

        client, name = self.client, event["name"]
        found = client.search_logged_models([self.experiment_id], f"name = '{name}' AND source_run_id = '{self.run_id}'", max_results=1)
        facts = {"uri": event["uri"], "sha256": event["sha256"]}
        step = {"step": str(event["step"])}
        model = found[0] if found else client.create_logged_model(self.experiment_id, name, self.run_id, facts, step, "checkpoint")
        client.finalize_logged_model(model.model_id, "READY")
        client.log_outputs(self.run_id, [LoggedModelOutput(model.model_id, event["step"])])
        rows = [Metric(key, value, event["measured"], event["step"], model.model_id) for key, value in event["values"].items()]
        if rows:
            client.log_batch(self.run_id, metrics=rows)


def _dataset(path: str, digest: str) -> Any:
    """An input as an MLflow dataset whose digest is ours: equal digests are the lineage between runs."""
    import mlflow
    from mlflow.entities import DatasetInput, InputTag

    source = mlflow.data.http_dataset_source.HTTPDatasetSource(f"file:{path}")
    dataset = mlflow.data.meta_dataset.MetaDataset(source, name=path, digest=digest[:32])
    return DatasetInput(dataset._to_mlflow_entity(), tags=[InputTag("mlflow.data.context", "training")])


def replay(root: Path) -> int:
    """Send every spool under outputs/runs; the number of events that arrived. One whose stage runs now is left to it.

    Raises:
        StoreUnreachable: naming the first spool that still waits.
    """
    total = 0
    for path in sorted((root / "outputs" / "runs").rglob(SPOOL)):
        folder = path.parent
        name = folder.relative_to(root)
        with open(folder / "lock", "a+") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                print(f"{name}: its stage is running and sends by itself", flush=True)
                continue
            sender = Sender(root, folder, Spool(folder))
            if sender.sent == sender.spool.size:
                continue
            try:
                count = sender.send()
            except Exception as error:
                raise StoreUnreachable(f"{name}: {error}. It waits; `python -m training replay` again sends it.") from error
        print(f"{name}: {count} events sent", flush=True)
        total += count
    return total
