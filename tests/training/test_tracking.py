"""A tracking outage stops nothing and loses nothing: each row, tag and picture arrives once, sooner or later."""

import logging
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient
from PIL import Image

from runtime.environment import instructions
from runtime.exits import Interrupted
from runtime.files import read_json, tensors_digest
from runtime.mlflow_store import open_store
from training import supervised
from training.checkpoint import Checkpoints
from training.spool import NOTE, SPOOL, Spool, StoreUnreachable, replay
from training.supervised import run_supervised
from training.tracking import Tracker, track

from .conftest import begin
from .test_resume import StopAt

STEPS = range(1, 10)


class Faulty:
    """MLflow's own server in this process, which can be told to fail.

    mode: `ok`; `refuse` closes the connection; `hang` says nothing until told otherwise; `500` answers so; `lost` does what it was asked
    and then answers 500.
    """

    def __init__(self, app: Callable) -> None:
        self.app, self.mode, self.awake, self.store = app, "ok", threading.Event(), ""

    def __call__(self, environ: dict, start_response: Callable) -> Iterator[bytes] | list[bytes]:
        if self.mode == "hang":
            self.awake.wait(20)
        if self.mode in ("refuse", "hang"):
            environ["werkzeug.socket"].close()
            return []
        if self.mode == "lost":
            list(self.app(environ, lambda *_: None))
        if self.mode in ("500", "lost"):
            start_response("500 INTERNAL SERVER ERROR", [("Content-Type", "text/plain")])
            return [b"broken"]
        return self.app(environ, start_response)


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with MLflow's tables, made once: it takes seconds."""
    path = tmp_path_factory.mktemp("store") / "empty.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def server(empty_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Faulty]:
    from mlflow.server import app, handlers
    from werkzeug.serving import make_server

    monkeypatch.setattr(handlers, "_tracking_store", None)
    monkeypatch.setattr(handlers, "_artifact_repo", None)
    monkeypatch.setattr(handlers.utils, "set_tracking_uri", lambda uri: None)  # the server would set it for this whole process
    shutil.copyfile(empty_store, tmp_path / "server.db")
    faulty = Faulty(app)
    faulty.store = f"sqlite:///{tmp_path}/server.db"
    handlers._get_tracking_store(faulty.store, (tmp_path / "artifacts").as_uri())
    http = make_server("127.0.0.1", 0, faulty, threaded=True)
    http.daemon_threads = True
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{http.server_port}")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    yield faulty
    faulty.awake.set()
    http.shutdown()
    thread.join()


def whole(server: Faulty) -> None:
    """The store holds one run with every row once, params, inputs, tags, one picture and its status."""
    client = MlflowClient(server.store)
    (run,) = client.search_runs([client.get_experiment_by_name("deepgen").experiment_id])
    history = client.get_metric_history(run.info.run_id, "loss")
    assert sorted((metric.step, metric.value) for metric in history) == [(step, step / 10) for step in STEPS]
    assert run.info.status == "FINISHED" and run.data.tags["colour"] == "red" and run.data.metrics["final"] == 0.5
    assert run.data.params["alignment.steps"] == "4" and len(run.inputs.dataset_inputs) == 3
    assert [file.path for file in client.list_artifacts(run.info.run_id, "pictures")] == ["pictures/curve.png"]


def tell(root: Path, step_done: Callable[[int], None] = lambda step: None) -> None:
    with begin(root, "alignment") as run, track(run) as tracker:
        for step in STEPS:
            step_done(step)
            tracker.log(step, loss=step / 10)
            tracker.flush(now=True)
        Image.new("RGB", (4, 4)).save(run.folder / "curve.png")
        tracker.picture(run.folder / "curve.png")
        (run.folder / "curve.png").unlink()
        tracker.tag(colour="red")
        tracker.result(final=0.5)
        step_done(10)


@pytest.mark.parametrize("mode", ["refuse", "hang", "500", "lost"])
@pytest.mark.parametrize(("start", "stop"), [(0, 2), (5, 7), (10, 99), (0, 99)], ids=["start", "middle", "end", "always"])
def test_a_store_that_fails_for_a_while_holds_everything_once_afterwards(
    project: Path, server: Faulty, monkeypatch: pytest.MonkeyPatch, mode: str, start: int, stop: int
):
    def switch(step: int) -> None:
        server.mode = mode if start <= step < stop else "ok"
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1" if server.mode == "hang" else "60")

    switch(0)
    tell(project, switch)
    switch(100)
    waited = replay(project)
    assert (waited > 0) == (stop == 99)
    whole(server)
    assert replay(project) == 0


def test_what_an_unreachable_store_leaves_waiting_is_told_with_the_command_that_sends_it(
    project: Path, server: Faulty, caplog: pytest.LogCaptureFixture
):
    server.mode = "500"
    with caplog.at_level(logging.WARNING):
        tell(project)
    assert "`python -m training replay`" in caplog.text and SPOOL in caplog.text
    with pytest.raises(StoreUnreachable, match=r"outputs/runs/alignment/.*500"):
        replay(project)


def test_a_later_process_sends_what_waits_and_logs_no_step_twice(project: Path, server: Faulty):
    server.mode = "refuse"
    with begin(project, "alignment") as run:
        tracker = Tracker(run)
        for step in (1, 2, 3):
            tracker.log(step, loss=step / 10)
        tracker.flush()  # and here the process is killed
    server.mode = "ok"
    tell(project)
    whole(server)


def test_a_sender_killed_before_its_note_sends_again_and_the_store_holds_each_row_once(project: Path, server: Faulty):
    tell(project)
    next((project / "outputs" / "runs").rglob(NOTE)).unlink()
    assert replay(project) > len(STEPS)
    whole(server)


def test_a_run_deleted_in_the_store_is_filled_again_from_the_spool(project: Path, server: Faulty):
    tell(project)
    client, note = MlflowClient(), next((project / "outputs" / "runs").rglob(NOTE))
    first = read_json(note)["run_id"]
    client.delete_run(first)
    with begin(project, "alignment") as run, track(run):
        pass
    assert read_json(note)["run_id"] != first
    whole(server)


def test_a_run_deleted_while_the_stage_runs_is_filled_again_too(project: Path, server: Faulty):
    def switch(step: int) -> None:
        if step == 5:
            MlflowClient().delete_run(read_json(next((project / "outputs" / "runs").rglob(NOTE)))["run_id"])

    tell(project, switch)
    whole(server)


def test_what_the_store_will_never_take_is_passed_over_by_name(project: Path, server: Faulty, caplog: pytest.LogCaptureFixture):
    with begin(project, "alignment") as run:
        tracker = Tracker(run)
        tracker._add("metrics", step=1, values={"what?": 1.0})
        tracker.flush()
    assert "does not take metrics" in caplog.text
    tell(project)
    whole(server)


def test_a_line_cut_by_a_kill_is_dropped_and_those_before_it_are_kept(tmp_path: Path):
    spool = Spool(tmp_path)
    spool.append([{"kind": "metrics", "step": 1}, {"kind": "metrics", "step": 2}])
    with open(spool.path, "a") as handle:
        handle.write('{"kind": "met')
    again = Spool(tmp_path)
    again.append([{"kind": "metrics", "step": 3}])
    assert [event["step"] for event, _ in again.read()] == [1, 2, 3]


def test_rows_that_find_the_disk_full_wait_in_memory(project: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with begin(project, "alignment") as run:
        tracker = Tracker(run)
        with monkeypatch.context() as full:

            def fail(*_: object) -> None:
                raise OSError(28, "No space left on device")

            full.setattr("os.fsync", fail)
            tracker.log(1, loss=0.1)
            tracker.flush()
        tracker.log(2, loss=0.2)
        tracker.flush()
        steps = [event["step"] for event, _ in Spool(run.folder).read() if event["kind"] == "metrics"]
    assert steps == [1, 2]


def test_a_row_that_mlflow_does_not_take_takes_no_other_with_it(server: Faulty, project: Path, caplog: pytest.LogCaptureFixture):
    with begin(project, "alignment") as run, track(run) as tracker:
        for step in STEPS:
            tracker.log(step, **{"loss": step / 10} if step != 5 else {"no such name: $%": 1.0})
    client = MlflowClient(server.store)
    (logged,) = client.search_runs([client.get_experiment_by_name("deepgen").experiment_id])
    history = client.get_metric_history(logged.info.run_id, "loss")
    assert sorted(metric.step for metric in history) == [step for step in STEPS if step != 5]
    assert caplog.text.count("MLflow does not take metrics") == 1


def test_after_a_rollback_the_steps_are_logged_anew_and_a_resumed_process_repeats_none(server: Faulty, project: Path):
    with begin(project, "alignment") as run, track(run) as tracker:
        for step, loss in [(1, 0.1), (2, 0.2), (3, 9.0)]:
            tracker.log(step, loss=loss)
        tracker.back_to(1)
        time.sleep(0.01)  # MLflow's clock has milliseconds
        for step, loss in [(2, 0.3), (3, 0.4)]:
            tracker.log(step, loss=loss)
    with begin(project, "alignment") as run, track(run) as tracker:
        for step in (2, 3, 4):
            tracker.log(step, loss=0.5)
    client = MlflowClient(server.store)
    (logged,) = client.search_runs([client.get_experiment_by_name("deepgen").experiment_id])
    history = sorted(client.get_metric_history(logged.info.run_id, "loss"), key=lambda metric: metric.timestamp)
    assert sorted((metric.step, metric.value) for metric in history) == [(1, 0.1), (2, 0.2), (2, 0.3), (3, 0.4), (3, 9.0), (4, 0.5)]
    assert [metric.value for metric in history if metric.step == 3][-1] == 0.4


def test_a_stage_without_a_store_ends_with_the_same_bytes_and_its_trace_comes_later(
    project: Path, edit_params, monkeypatch: pytest.MonkeyPatch
):
    """The whole trace of a stage, stopped once, arrives by `replay` in a store that was away all the time."""
    edit_params(project, lambda params: params["alignment"].update(validate_every=2, board_every=2))
    with monkeypatch.context() as away:
        away.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # nobody listens there
        with pytest.raises(Interrupted), begin(project, "alignment", StopAt(3)) as run:
            run_supervised(run, "alignment")
        with begin(project, "alignment") as run:
            run_supervised(run, "alignment")
    without_store = tensors_digest(run.out / "model")
    replay(project)
    client = MlflowClient(open_store(project))
    (experiment,) = [e for e in client.search_experiments() if e.name == "deepgen"]
    (logged,) = client.search_runs([experiment.experiment_id])
    metrics, tags = logged.data.metrics, logged.data.tags
    names = "loss lr grad_norm grad_norm/connector grad_norm/think_tokens samples_per_s tokens_per_s mfu loss_text_to_image held_out/loss"
    assert set(names.split()) <= metrics.keys()
    assert any(name.startswith("loss_by_sigma/") for name in metrics) and "system/cpu_utilization_percentage" in metrics
    assert [metric.step for metric in client.get_metric_history(logged.info.run_id, "loss")] == [1, 2, 3, 4]
    assert tags["parent_stage"] == "foundation" and tags["parent_digest"] == run.digests["input outputs/foundation"]
    assert tags["model_digest"] == without_store and len(tags["environment_digest"]) == 64 and tags["digest.code"] == run.digests["code"]
    assert tags["instructions"] == instructions()
    boards = [file.path for file in client.list_artifacts(logged.info.run_id, "boards")]
    assert boards == ["boards/step-000002.png", "boards/step-000004.png"]
    models = {model.name: model for model in client.search_logged_models([experiment.experiment_id])}
    assert sorted(models) == [f"alignment-step-00000{step}" for step in (2, 3, 4)]
    assert models["alignment-step-000004"].tags["uri"].endswith("/step-000004")
    assert tags["mlflow.source.name"] == "python -m training alignment"
    assert tags["parameters.dit"].startswith("trained 0, frozen ") and tags["parameters.lora"] == "none"
    assert run.metadata["parameters.connector"] == tags["parameters.connector"], "Dagster shows the same"
    held_out = {metric.key: metric.value for metric in models["alignment-step-000004"].metrics}
    assert held_out["held_out/loss"] == metrics["held_out/loss"]
    assert not models["alignment-step-000003"].metrics
    assert len(client.get_metric_history(logged.info.run_id, "held_out/loss")) == 2


def test_the_last_checkpoint_is_told_although_it_was_written_in_the_background(project: Path, edit_params, monkeypatch: pytest.MonkeyPatch):
    edit_params(project, lambda params: params["alignment"].update(async_checkpoints=True))
    write = Checkpoints._write
    monkeypatch.setattr(Checkpoints, "_write", lambda *arguments: time.sleep(0.3) or write(*arguments))
    for name in ("publish_stage", "remember_start"):
        monkeypatch.setattr(supervised, name, lambda *_: None)
    with begin(project, "alignment") as run:
        run_supervised(run, "alignment")
    told = [event["name"] for event, _ in Spool(run.folder).read() if event["kind"] == "checkpoint"]
    assert told == ["alignment-step-000002", "alignment-step-000004"]


def test_pictures_of_an_experiment_of_any_name_lie_beside_its_store(project: Path, edit_params):
    edit_params(project, lambda params: params["registry"].update(experiment="another"))
    with begin(project, "alignment") as run, track(run) as tracker:
        picture = run.folder / "grid.png"
        Image.new("RGB", (2, 2)).save(picture)
        tracker.picture(picture)
    (stored,) = (project / "outputs" / "mlflow" / "artifacts").rglob("grid.png")
    assert stored.read_bytes() == picture.read_bytes()
