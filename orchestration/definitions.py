"""What Dagster loads: assets from dvc.yaml, the registry's two, checks, jobs, and the triggers of retraining."""

import warnings
from pathlib import Path

import dagster as dg

from orchestration.alerts import build_failure_sensor
from orchestration.assets import build_assets
from orchestration.checks import build_checks
from orchestration.dvc import DvcCommand
from orchestration.experiment import build_experiment_job
from orchestration.landing import build_landing
from orchestration.model_assets import build_alias_sensor, build_model_assets, build_rollback_job
from orchestration.pipeline_run import PIPELINE
from orchestration.retraining import RETRAIN, build_schedule, build_sensor
from orchestration.sources import sources_asset
from orchestration.stage_process import StageProcess
from runtime.environment import set_environment
from runtime.params import check_params, parse_params
from runtime.recipe import load_stages
from runtime.stage import find_root

warnings.filterwarnings("ignore", category=dg.BetaWarning)  # backfill_policy, observable_source_asset: the version is pinned


def build_definitions(root: Path, dvc: DvcCommand | None = None) -> dg.Definitions:
    """Everything, for the project at `root`. Reads its params.yaml and dvc.yaml; imports neither torch nor MLflow.

    dvc: one that was asked already, so that it need not be asked again.
    """
    set_environment()
    values = parse_params((root / "params.yaml").read_text())
    params, stages = check_params(values), load_stages(root, values)
    assets, checks = build_assets(root, stages), build_checks(root, stages)
    if "export_diffusers" in stages:
        more_assets, more_checks = build_model_assets(root)
        assets, checks = assets + more_assets, checks + more_checks
    pipeline = dg.define_asset_job(
        PIPELINE, dg.AssetSelection.all(), description="Everything, from data to champion. Done parts are skipped."
    )
    beyond_shards = dg.AssetSelection.assets("shards").downstream(include_self=False)
    retrain = dg.define_asset_job(RETRAIN, beyond_shards, description="From the mixtures on: train, evaluate, export, register, promote.")
    landing_jobs, landing_sensors = build_landing(root, params)
    return dg.Definitions(
        assets=[sources_asset(root, list(values["data"]["parts"])), *assets],
        asset_checks=checks,
        jobs=[pipeline, retrain, build_experiment_job(root, stages), build_rollback_job(root), *landing_jobs],
        schedules=[build_schedule(root, params, retrain)],
        sensors=[build_sensor(root, retrain), *landing_sensors, build_alias_sensor(root), build_failure_sensor(root)],
        resources={"stage_process": StageProcess(root), "dvc": dvc or DvcCommand(root)},
        executor=dg.in_process_executor,  # one stage after another, each a process of its own: its parent is the run, and it dies with it
    )


@dg.definitions
def defs() -> dg.Definitions:
    return build_definitions(find_root())
