"""When to train again: a weekly schedule and a sensor on the data. Both are off until someone turns them on in the UI."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dagster as dg

from orchestration.datasets import dataset_ids, shards_folder
from orchestration.registry import CHAMPION, Registry
from runtime.files import sha256_json
from runtime.params import Params, load_params, parse_params
from runtime.published import read_manifest

RETRAIN_KEY = "deepgen/retrain"


@dataclass(frozen=True)
class Situation:
    """What the decision to train again depends on."""

    data_digest: str
    params_digest: str
    samples: int
    champion_data: str | None
    champion_params: str | None

    @property
    def key(self) -> str:
        """Equal for equal data and params, so that no such run is started twice."""
        return f"{self.data_digest[:16]}:{self.params_digest[:16]}"


def look(root: Path, params: Params) -> Situation:
    """The data and params as they are, and those that the champion was made from."""
    registry = Registry.open(root, params)
    champion = registry.by_alias(CHAMPION)
    tags = champion.tags if champion is not None else {}
    parts = dataset_ids(root, params)
    return Situation(
        data_digest=sha256_json(parts),
        params_digest=sha256_json(parse_params((root / "params.yaml").read_text())),
        samples=sum(read_manifest(shards_folder(root, part))["samples"] for part in parts if params.data.parts[part].split == "train"),
        champion_data=tags.get("data_digest"),
        champion_params=tags.get("params_digest"),
    )


def reason_to_skip(now: Situation) -> str | None:
    """Why there is nothing to train, in words that name the digests compared; None if there is something."""
    if not now.samples:
        return "no training shards have been built"
    if (now.data_digest, now.params_digest) == (now.champion_data, now.champion_params):
        made_from = f"data {now.data_digest[:12]} and params {now.params_digest[:12]}"
        return f"nothing changed: the champion was made from {made_from}, which are the present ones"
    return None


def build_schedule(root: Path, params: Params, job: Any) -> dg.ScheduleDefinition:
    @dg.schedule(
        job=job,
        name="weekly_retrain",
        cron_schedule=params.retrain.cron,
        execution_timezone="UTC",
        default_status=dg.DefaultScheduleStatus.STOPPED,
        description="Trains again on params.retrain.cron, if data or params changed since the champion.",
    )
    def weekly(context: dg.ScheduleEvaluationContext) -> dg.RunRequest | dg.SkipReason:
        return _decide(root, context.instance)

    return weekly


def build_sensor(root: Path, job: Any) -> dg.SensorDefinition:
    @dg.sensor(
        job=job,
        name="data_changed",
        minimum_interval_seconds=300,
        default_status=dg.DefaultSensorStatus.STOPPED,
        description="Trains again when the shards on disk, or params.yaml, differ from what the champion was made from.",
    )
    def changed(context: dg.SensorEvaluationContext) -> dg.RunRequest | dg.SkipReason:
        return _decide(root, context.instance)

    return changed


def _decide(root: Path, instance: dg.DagsterInstance) -> dg.RunRequest | dg.SkipReason:
    """One decision for both: skip with a reason, or one run for this pair of digests."""
    now = look(root, load_params(root / "params.yaml"))
    if reason := reason_to_skip(now):
        return dg.SkipReason(reason)
    if earlier := instance.get_runs(dg.RunsFilter(tags={RETRAIN_KEY: now.key}), limit=1):
        return dg.SkipReason(
            f"run {earlier[0].run_id[:8]} was started for this data and params ({now.key}); it is {earlier[0].status.value.lower()}"
        )
    return dg.RunRequest(run_key=now.key, tags={RETRAIN_KEY: now.key})
