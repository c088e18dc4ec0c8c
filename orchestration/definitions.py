"""What Dagster loads: assets from dvc.yaml, the registry's two, checks, jobs, and the triggers of retraining."""

import warnings
from pathlib import Path

import dagster as dg

from orchestration.assets import build_assets, sources_asset
from orchestration.checks import build_checks
from orchestration.dvc import DvcCommand
from orchestration.model_assets import build_model_assets
from orchestration.retraining import build_schedule, build_sensor
from orchestration.stage_process import StageProcess
from runtime.environment import set_environment
from runtime.params import load_params, parse_params
from runtime.recipe import load_stages
from runtime.stage import find_root

warnings.filterwarnings("ignore", category=dg.BetaWarning)  # backfill_policy, observable_source_asset: the version is pinned
PIPELINE, RETRAIN = "pipeline", "retrain"


def build_definitions(root: Path) -> dg.Definitions:
    """Everything, for the project at `root`. Reads its params.yaml and dvc.yaml; imports neither torch nor MLflow."""
    set_environment()
    params = load_params(root / "params.yaml")
    stages = load_stages(root, parse_params((root / "params.yaml").read_text()))
    assets, checks = build_assets(root, stages), build_checks(root, stages)
    if "export_diffusers" in stages:
        more_assets, more_checks = build_model_assets(root)
        assets, checks = assets + more_assets, checks + more_checks
    pipeline = dg.define_asset_job(
        PIPELINE, dg.AssetSelection.all(), description="Everything, from data to champion. Done parts are skipped."
    )
    beyond_shards = dg.AssetSelection.assets("shards").downstream(include_self=False)
    retrain = dg.define_asset_job(RETRAIN, beyond_shards, description="From the mixtures on: train, evaluate, export, register, promote.")
    return dg.Definitions(
        assets=[sources_asset(root), *assets],
        asset_checks=checks,
        jobs=[pipeline, retrain],
        schedules=[build_schedule(root, params, retrain)],
        sensors=[build_sensor(root, retrain)],
        resources={"stage_process": StageProcess(root), "dvc": DvcCommand(root)},
        executor=dg.in_process_executor,  # one stage after another, each a process of its own: its parent is the run, and it dies with it
    )


@dg.definitions
def defs() -> dg.Definitions:
    return build_definitions(find_root())
