"""Notices of a failed run: of what its stages have not told themselves, such as a refused promotion, a failed check or a killed stage."""

from pathlib import Path
from typing import TYPE_CHECKING

from runtime.notices import ERROR_CHARACTERS, Notice, send_notices
from runtime.params import load_params, parse_params
from runtime.recipe import load_stages
from runtime.run_folder import ending_of

if TYPE_CHECKING:
    import dagster as dg

    from orchestration.pipeline_run import Outcome

TOLD_TAG = "deepgen/told"


def tell_failures(root: Path, instance: "dg.DagsterInstance", outcome: "Outcome") -> None:
    """Send one notice of the failures that nobody told of, by the ways in params.yaml, once a run. An interruption is no failure."""
    config = load_params(root / "params.yaml").notices
    record = instance.get_run_record_by_id(outcome.run_id)
    if (config.webhook, config.email) == (None, None) or record is None or TOLD_TAG in record.dagster_run.tags:
        return
    instance.add_run_tags(outcome.run_id, {TOLD_TAG: "yes"})
    since = record.start_time or record.create_timestamp.timestamp()
    untold = {} if outcome.interrupted else {name: said for name, said in outcome.failures.items() if not _told_itself(root, name, since)}
    if not untold:
        return
    words = "\n".join(f"{name}: {said.split(chr(10) + '```')[0]}" for name, said in untold.items())  # without its last log lines
    run = f"run {outcome.run_id[:8]} of {record.dagster_run.job_name}"
    send_notices(Notice(run, "failed", words[:ERROR_CHARACTERS], None, "deepgen run", outcome.run_id), config)


def _told_itself(root: Path, asset: str, since: float) -> bool:
    """Whether a stage of this asset has noted, and so told, that it failed since then. One that was killed has not."""
    from orchestration.assets import group_stages

    stages = group_stages(load_stages(root, parse_params((root / "params.yaml").read_text()))).get(asset, [])
    notes = [note for stage in stages for note in (root / "outputs" / "runs" / stage.name.replace("@", "/")).glob("*")]
    endings = [ending for note in notes if (ending := ending_of(note)) is not None]
    return any(ending["state"] != "finished" and ending["time"] >= since for ending in endings)


def build_failure_sensor(root: Path) -> "dg.SensorDefinition":
    """On from the start: without an address in params.yaml it sends nothing."""
    import dagster as dg

    from orchestration.pipeline_run import Outcome, read_events

    @dg.run_failure_sensor(
        name="run_failed",
        default_status=dg.DefaultSensorStatus.RUNNING,
        description="Tells by notices.webhook and notices.email of a failed run, where its stage has not told of it.",
    )
    def failed(context: dg.RunFailureSensorContext) -> None:
        outcome = Outcome(context.dagster_run.run_id, interrupted=False)
        events = context.instance.all_logs(context.dagster_run.run_id)
        read_events(outcome, [entry.dagster_event for entry in events if entry.dagster_event is not None])
        if not outcome.failures and not outcome.interrupted:
            outcome.failures["run"] = context.failure_event.message or "failed"
        tell_failures(root, context.instance, outcome)

    return failed
