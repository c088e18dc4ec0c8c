"""The assets that live in the registry, not in dvc.yaml: the challenger and the champion."""

from pathlib import Path
from typing import Any

import dagster as dg

from orchestration.console import say
from orchestration.dvc import DvcCommand, DvcError
from orchestration.promotion import GateFailed, promote, read_history
from orchestration.registry import CHALLENGER, CHAMPION, Registry, register_export
from runtime.files import tensors_digest
from runtime.params import STAGES, load_params

EVALUATION = f"evaluation_{STAGES[-1]}"


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
        metadata: dict[str, Any] = {"version": str(version.version), "uri": f"models:/{version.name}@{CHALLENGER}", "cached": not new}
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
    def run(dvc: dg.ResourceParam[DvcCommand]) -> dg.MaterializeResult:
        params = load_params(root / "params.yaml")
        try:
            done = promote(root, params, dvc)
        except (GateFailed, DvcError) as error:
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
        found, registered = tensors_digest(registry.pipeline_folder(version)), version.tags.get("model_digest")
        return dg.AssetCheckResult(passed=found == registered, metadata={"found": found, "registered": str(registered)})

    return check


def _champion_check(root: Path) -> dg.AssetChecksDefinition:
    @dg.asset_check(
        asset=CHAMPION, name="it_passed_the_gates", description="The alias was moved by a promotion, not by hand.", blocking=True
    )
    def check() -> dg.AssetCheckResult:
        return champion_was_gated(root)

    return check


def champion_was_gated(root: Path) -> dg.AssetCheckResult:
    """Whether the champion is the version that the last promotion, or rollback, made champion."""
    version = Registry.open(root, load_params(root / "params.yaml")).by_alias(CHAMPION)
    rows = read_history(root)
    last = rows[-1]["version"] if rows else None
    return dg.AssetCheckResult(
        passed=version is not None and str(version.version) == last,
        metadata={"champion": str(version.version) if version is not None else "none", "last promoted": str(last)},
    )
