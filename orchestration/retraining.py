"""When to train again: one decision, asked by a weekly schedule, by a sensor on the data, and by `deepgen retrain`. The first two are off
until someone turns them on in the UI."""

import contextlib
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dagster as dg

from orchestration.budget import PREDICTED_TAG, over_budget, predict, stages_to_make
from orchestration.config import RetrainConfig
from orchestration.console import say
from orchestration.datasets import dataset_ids, recipe_digest, training_samples
from orchestration.dvc import DvcCommand
from orchestration.pipeline_run import Outcome, execute, in_progress, only_one, own_instance
from orchestration.registry import CHALLENGER, CHAMPION, Registry
from runtime.files import read_json, sha256_json, write_json
from runtime.mlflow_store import locked
from runtime.params import Params, load_params, parse_params

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

RETRAIN = "retrain"
RETRAIN_KEY, REASON_TAG = "deepgen/retrain", "deepgen/reason"
CLAIMS = Path("outputs/retrain")
CLAIM_SECONDS = 600  # a launch that left no run in that time never came: whoever asked for it is gone
DAY = 86400.0


@dataclass(frozen=True)
class Launch:
    """Train again. predicted: what it will take, once that was asked."""

    reason: str
    key: str
    predicted: str = ""


@dataclass(frozen=True)
class Skip:
    """Don't."""

    reason: str


@dataclass(frozen=True)
class Made:
    """What the champion was made from, as far as it says."""

    version: str
    data_digest: str | None
    params_digest: str | None
    samples: int | None
    age_days: float


@dataclass(frozen=True)
class Situation:
    """All that the decision to train again depends on.

    samples: built for training. earlier: what came of this data and these params before. busy: what is at work on this clone.
    over_budget: one line a limit.
    """

    data_digest: str
    params_digest: str
    samples: int
    champion: Made | None
    config: RetrainConfig
    earlier: str | None = None
    busy: str | None = None
    over_budget: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """Equal for equal data and params, so that no such run is started twice."""
        return f"{self.data_digest[:16]}:{self.params_digest[:16]}"


def decide(now: Situation) -> Launch | Skip:
    """Whether to train again, and why, in words that name the numbers and digests compared."""
    if not now.samples:
        return Skip("no training shards have been built")
    wanted = _reason(now)
    if isinstance(wanted, Skip):
        return wanted
    if now.earlier:
        return Skip(f"{wanted.reason}; but {now.earlier}")
    if now.busy:
        return Skip(f"{wanted.reason}; but {now.busy}, and one works at a time")
    if now.over_budget:
        return Skip(f"{wanted.reason}; but it is above the budget. " + " ".join(now.over_budget))
    return wanted


def _reason(now: Situation) -> Launch | Skip:
    """Whether data, params or age ask for it."""
    made, config = now.champion, now.config
    if made is None:
        return Launch("there is no champion yet", now.key)
    champion = f"the champion (version {made.version})"
    if made.params_digest != now.params_digest:
        return Launch(f"params changed: {champion} was made with {_short(made.params_digest)}, now {_short(now.params_digest)}", now.key)
    if made.data_digest == now.data_digest:
        same = f"data {_short(now.data_digest)} and params {_short(now.params_digest)}"
        return Skip(f"nothing changed: {champion} was made from {same}, which are the present ones")
    changed = f"data changed from {_short(made.data_digest)} to {_short(now.data_digest)}"
    if made.samples is None:
        return Launch(f"{changed}, and {champion} does not say of how many samples it was made", now.key)
    new = max(now.samples - made.samples, 0)
    grown = f"{changed}: {new:,} new samples (retrain.min_new_samples {config.min_new_samples:,})"
    old = f"{champion} is {made.age_days:.1f} days old (retrain.max_age_days {config.max_age_days:g})"
    if new >= config.min_new_samples or made.age_days >= config.max_age_days:
        return Launch(f"{grown}, {old}", now.key)
    return Skip(f"{grown}, and {old}: neither is enough")


def _short(digest: str | None) -> str:
    return "unknown" if digest is None else digest[:12]


def look(root: Path, params: Params, instance: dg.DagsterInstance) -> Situation:
    """The data and params as they are, those that the champion was made from, and what is at work. Not yet what it would take."""
    registry = Registry.open(root, params)
    champion, challenger = registry.by_alias(CHAMPION), registry.by_alias(CHALLENGER)
    digests = {"recipe_digest": recipe_digest(root), "params_digest": sha256_json(parse_params((root / "params.yaml").read_text()))}
    # Versions from before there was a digest of the recipe have one of all of params.yaml.
    name = "recipe_digest" if champion is None or "recipe_digest" in champion.tags else "params_digest"
    now = Situation(
        data_digest=sha256_json(dataset_ids(root, params)),
        params_digest=digests[name],
        samples=training_samples(root, params),
        champion=_made(champion, name) if champion is not None else None,
        config=params.retrain,
        busy=in_progress(root, instance),
    )
    return replace(now, earlier=_earlier(root, instance, now, challenger, name))


def _made(version: "ModelVersion", name: str) -> Made:
    samples = version.tags.get("samples")
    return Made(
        version=str(version.version),
        data_digest=version.tags.get("data_digest"),
        params_digest=version.tags.get(name),
        samples=None if samples is None else int(samples),
        age_days=(time.time() - version.creation_timestamp / 1000) / DAY,
    )


def _earlier(root: Path, instance: dg.DagsterInstance, now: Situation, challenger: "ModelVersion | None", name: str) -> str | None:
    """What came of this data and these params before: a run, a launch that is on its way, or a challenger that was not promoted."""
    if runs := instance.get_runs(dg.RunsFilter(tags={RETRAIN_KEY: now.key}), limit=1):
        run = f"run {runs[0].run_id[:8]} ({runs[0].status.value.lower()})"
        return f"{run} was launched for this data and these params. Once more only by hand: deepgen run"
    claim = _claim(root, now.key)
    if claim.is_file():
        told = read_json(claim)
        if (seconds := time.time() - told["time"]) < CLAIM_SECONDS:
            return f"{told['by']} launched it {seconds:.0f} s ago"
    if challenger is not None and (challenger.tags.get("data_digest"), challenger.tags.get(name)) == (now.data_digest, now.params_digest):
        return f"version {challenger.version} was made of this data and these params, and is challenger: see its gates"
    return None


def ask(root: Path, instance: dg.DagsterInstance, by: str) -> Launch | Skip:
    """The decision for `by`; a launch is claimed, so that of several who ask at once one gets it."""
    with locked(root / CLAIMS / "lock"):
        decision = ask_only(root, instance)
        if isinstance(decision, Launch):
            write_json(_claim(root, decision.key), {"by": by, "time": time.time()})
        return decision


def ask_only(root: Path, instance: dg.DagsterInstance) -> Launch | Skip:
    """The decision, and nothing is claimed."""
    params = load_params(root / "params.yaml")
    now = look(root, params, instance)
    if isinstance(decision := decide(now), Skip):
        return decision
    # What it would take is asked only now: it takes a status of all stages.
    prediction = predict(root, params, [stage for stage in stages_to_make(root, DvcCommand(root)) if stage.group != "shards"])
    decision = decide(replace(now, over_budget=tuple(over_budget(prediction, params))))
    return replace(decision, predicted=prediction.total) if isinstance(decision, Launch) else decision


def _claim(root: Path, key: str) -> Path:
    return root / CLAIMS / f"{key.replace(':', '-')}.json"


def retrain(root: Path, dry_run: bool = False) -> Outcome | None:
    """Say the decision and, unless `dry_run`, follow it; how the run ended, if there was one.

    Raises:
        AlreadyRunning: another run works on this clone.
    """
    params = load_params(root / "params.yaml")
    with contextlib.nullcontext() if dry_run else only_one(root), own_instance(root, params) as instance:
        decision = ask_only(root, instance) if dry_run else ask(root, instance, "`deepgen retrain`")
        say(f"skip: {decision.reason}" if isinstance(decision, Skip) else f"launch: {decision.reason}\npredicted: {decision.predicted}")
        if dry_run or isinstance(decision, Skip):
            return None
        return execute(root, instance, DvcCommand(root), RETRAIN, {RETRAIN_KEY: decision.key})


def build_schedule(root: Path, params: Params, job: Any) -> dg.ScheduleDefinition:
    @dg.schedule(
        job=job,
        name="weekly_retrain",
        cron_schedule=params.retrain.cron,
        execution_timezone="UTC",
        default_status=dg.DefaultScheduleStatus.STOPPED,
        description="Trains again on params.retrain.cron, if data or params changed enough since the champion.",
    )
    def weekly(context: dg.ScheduleEvaluationContext) -> dg.RunRequest | dg.SkipReason:
        return _request(root, context.instance, "the schedule weekly_retrain")

    return weekly


def build_sensor(root: Path, job: Any) -> dg.SensorDefinition:
    @dg.sensor(
        job=job,
        name="data_changed",
        minimum_interval_seconds=300,
        default_status=dg.DefaultSensorStatus.STOPPED,
        description="Trains again when the shards on disk, or params.yaml, differ enough from what the champion was made from.",
    )
    def changed(context: dg.SensorEvaluationContext) -> dg.RunRequest | dg.SkipReason:
        return _request(root, context.instance, "the sensor data_changed")

    return changed


def _request(root: Path, instance: dg.DagsterInstance, by: str) -> dg.RunRequest | dg.SkipReason:
    decision = ask(root, instance, by)
    if isinstance(decision, Skip):
        return dg.SkipReason(decision.reason)
    return dg.RunRequest(
        run_key=decision.key, tags={RETRAIN_KEY: decision.key, REASON_TAG: decision.reason, PREDICTED_TAG: decision.predicted}
    )
