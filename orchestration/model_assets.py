"""The assets that live in the registry, not in dvc.yaml: the challenger and the champion."""

import json
from pathlib import Path
from typing import Any

import dagster as dg

from orchestration.comparison import side_by_side
from orchestration.console import say
from orchestration.dvc import DvcCommand
from orchestration.promotion import promote, rollback
from orchestration.promotion_log import last_champions, why_ungated
from orchestration.registry import CHALLENGER, CHAMPION, Registry, Untrusted, register_export
from runtime.exits import Plain
from runtime.params import STAGES, load_params
from runtime.stage import picture_markdown

EVALUATION = f"evaluation_{STAGES[-1]}"
GATED = "it_passed_the_gates"


def build_model_assets(root: Path) -> tuple[list[dg.AssetsDefinition], list[dg.AssetChecksDefinition]]:
    """Registration and promotion, with their checks."""
    return [challenger_asset(root), champion_asset(root)], [_alias_check(root, CHALLENGER), _champion_check(root)]


def challenger_asset(root: Path) -> dg.AssetsDefinition:
    @dg.asset(
        name=CHALLENGER,
        deps=["export_diffusers", EVALUATION],
        group_name="registry",
        kinds={"mlflow"},
        description="The exported pipeline as a version in the registry, keyed by the digest of its weights.",
        pool="registry",
    )
    def run(dvc: dg.ResourceParam[DvcCommand]) -> dg.MaterializeResult:
        params = load_params(root / "params.yaml")
        version, new = register_export(root, params, dvc)
        say(f"challenger: {version.name} version {version.version}" + ("" if new else ", registered before"))
        pictures, beside = side_by_side(Registry.open(root, params), version)
        metadata: dict[str, Any] = {"version": str(version.version), "uri": f"models:/{version.name}@{CHALLENGER}", "cached": not new}
        metadata |= {"compared": beside} | {title: dg.MetadataValue.md(picture_markdown(file)) for title, file in pictures.items()}
        return dg.MaterializeResult(metadata=metadata, data_version=dg.DataVersion(version.tags["model_digest"]))

    return run


def champion_asset(root: Path) -> dg.AssetsDefinition:
    @dg.asset(
        name=CHAMPION,
        deps=[CHALLENGER],
        group_name="registry",
        kinds={"mlflow"},
        description="The version that is served. Materializing it measures every gate again; a failed gate refuses, whoever asks.",
        pool="registry",
    )
    def run(context: dg.AssetExecutionContext, dvc: dg.ResourceParam[DvcCommand]) -> dg.MaterializeResult:
        params = load_params(root / "params.yaml")
        try:
            done = promote(root, params, dvc, via=f"dagster run {context.run.run_id}")
        except Plain as error:
            raise dg.Failure(f"champion: {error}", allow_retries=False) from None
        say(f"champion: {done.message}")
        metadata: dict[str, Any] = {
            "version": done.version,
            "uri": f"models:/{params.registry.model_name}@{CHAMPION}",
            "cached": not done.changed,
        }
        return dg.MaterializeResult(metadata=metadata, data_version=dg.DataVersion(done.model_digest))

    return run


def _alias_check(root: Path, alias: str) -> dg.AssetChecksDefinition:
    @dg.asset_check(
        asset=alias, name="weights_are_the_registered_ones", description="Its files hold the registered weights.", blocking=True
    )
    def check() -> dg.AssetCheckResult:
        registry = Registry.open(root, load_params(root / "params.yaml"))
        version = registry.by_alias(alias)
        if version is None:
            return dg.AssetCheckResult(passed=False, description=f"the registry has no {alias}")
        try:
            _, digest = registry.verify(version)
        except Untrusted as error:
            return dg.AssetCheckResult(passed=False, description=str(error), metadata={"version": str(version.version)})
        return dg.AssetCheckResult(passed=True, metadata={"version": str(version.version), "model_digest": digest})

    return check


def _champion_check(root: Path) -> dg.AssetChecksDefinition:
    @dg.asset_check(asset=CHAMPION, name=GATED, description="The alias was moved by a promotion, not by hand.", blocking=True)
    def check() -> dg.AssetCheckResult:
        passed, facts = champion_was_gated(root)
        return dg.AssetCheckResult(passed=passed, description=facts["why not"], metadata=_shown(facts))

    return check


def champion_was_gated(root: Path) -> tuple[bool, dict[str, str | None]]:
    """Whether the champion is the version that the last promotion, or rollback, made champion, and the facts to show."""
    registry = Registry.open(root, load_params(root / "params.yaml"))
    with registry.lock():  # a promotion that is going on is none that was interrupted
        champion, last, why = registry.by_alias(CHAMPION), next(last_champions(registry), None), why_ungated(registry)
    if champion is None and why is None:
        why = f"the registry has no {CHAMPION}"
    facts = {"champion": str(champion.version) if champion else None, "last promoted": last["version"] if last else None, "why not": why}
    return why is None, facts


def _shown(facts: dict[str, str | None]) -> dict[str, str]:
    return {name: value or "none" for name, value in facts.items()}


def build_alias_sensor(root: Path) -> dg.SensorDefinition:
    """Shows in the UI what was done to the champion outside of it."""

    @dg.sensor(
        name="aliases_watched",
        minimum_interval_seconds=60,
        default_status=dg.DefaultSensorStatus.STOPPED,
        description="Looks whether the champion is still the promoted one; one that was set or deleted by hand fails its check.",
    )
    def watch(context: dg.SensorEvaluationContext) -> dg.SensorResult | dg.SkipReason:
        passed, facts = champion_was_gated(root)
        seen = json.dumps(facts, sort_keys=True)
        if seen == context.cursor:
            return dg.SkipReason(f"nothing changed: {facts['why not'] or 'the champion is the promoted one'}")
        evaluation = dg.AssetCheckEvaluation(
            asset_key=dg.AssetKey(CHAMPION),
            check_name=GATED,
            passed=passed,
            description=facts["why not"],
            metadata=_shown(facts),
            blocking=True,
        )
        return dg.SensorResult(asset_events=[evaluation], cursor=seen)

    return watch


class RollbackConfig(dg.Config):
    """What the launchpad of `rollback` takes; nothing is needed."""

    reason: str | None = None


def build_rollback_job(root: Path) -> dg.JobDefinition:
    """`deepgen rollback` as a button."""

    @dg.op(name="roll_back", pool="registry")
    def roll_back(context: dg.OpExecutionContext, config: RollbackConfig) -> None:
        try:
            done = rollback(root, load_params(root / "params.yaml"), via=f"dagster run {context.run_id}", reason=config.reason)
        except Plain as error:
            raise dg.Failure(f"rollback: {error}", allow_retries=False) from None
        say(f"rollback: {done.message}")
        tags = {"dagster/data_version": done.model_digest}
        context.log_event(dg.AssetMaterialization(CHAMPION, metadata={"version": done.version, "rollback": True}, tags=tags))

    @dg.job(name="rollback", description="Makes the version that was champion before champion again.")
    def job() -> None:
        roll_back()

    return job
