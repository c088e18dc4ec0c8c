"""One Dagster asset per stage of dvc.yaml. The graph is written there; here it is only read."""

from collections import defaultdict
from pathlib import Path
from typing import Any

import dagster as dg

from orchestration.budget import refuse_over_budget
from orchestration.console import say
from orchestration.dvc import DvcCommand, DvcError
from orchestration.landing import land_if_asked
from orchestration.sources import SOURCES
from orchestration.stage_process import PASSING, StageFailed, StageProcess, pause
from orchestration.ui import mlflow_page
from runtime.files import sha256_json, sha256_path
from runtime.params import parse_params
from runtime.recipe import Stage, stages_above
from runtime.stage import stage_digests

RETRIES = 2
RETRY_SECONDS = 30.0  # before the first, doubled by the next


def asset_name(stage: Stage) -> str:
    """The thing that exists afterwards: `sft`, `mixture_sft`; all parts of a partitioned group share the group's name."""
    return stage.group if stage.key is None or stage.meta.get("partitioned") else f"{stage.group}_{stage.key}"


def group_stages(stages: dict[str, Stage]) -> dict[str, list[Stage]]:
    """Asset name -> its stages: one, or one a partition."""
    grouped: dict[str, list[Stage]] = defaultdict(list)
    for stage in stages.values():
        grouped[asset_name(stage)].append(stage)
    return dict(grouped)


def upstream(stage: Stage, stages: dict[str, Stage]) -> list[str]:
    """Names of the assets whose outputs this stage reads."""
    return sorted({asset_name(stages[name]) for name in stages_above(stage, stages)})


def build_assets(root: Path, stages: dict[str, Stage]) -> list[dg.AssetsDefinition]:
    """Every stage as an asset, in the order of dvc.yaml."""
    return [stage_asset(root, name, members, stages) for name, members in group_stages(stages).items()]


def stage_asset(root: Path, name: str, members: list[Stage], stages: dict[str, Stage]) -> dg.AssetsDefinition:
    """The asset of one stage, or of a partitioned group of stages."""
    first = members[0]
    deps = sorted({dep for stage in members for dep in upstream(stage, stages)})
    partitioned = bool(first.meta.get("partitioned"))
    by_key = {str(stage.key): stage for stage in members}

    @dg.asset(
        name=name,
        deps=deps or ([SOURCES] if partitioned else []),
        group_name=first.meta.get("group", first.group),
        kinds=set(first.meta.get("kinds", [])) | {"dvc"},
        owners=[first.meta["owner"]] if "owner" in first.meta else None,
        description=first.desc,
        pool=first.meta.get("pool"),
        code_version=sha256_json({path: sha256_path(root / path) for path in first.code})[:16],
        partitions_def=dg.StaticPartitionsDefinition(list(by_key)) if partitioned else None,
        backfill_policy=dg.BackfillPolicy.single_run() if partitioned else None,
    )
    def run(context: dg.AssetExecutionContext, stage_process: dg.ResourceParam[StageProcess], dvc: dg.ResourceParam[DvcCommand]) -> Any:
        if not partitioned:
            metadata = materialize(context, first, stage_process, dvc)
            return dg.MaterializeResult(metadata=metadata, data_version=dg.DataVersion(dvc.lock_md5(first)))
        chosen = [by_key[key] for key in context.partition_keys]
        for stage in chosen:
            context.add_asset_metadata(materialize(context, stage, stage_process, dvc), partition_key=stage.key)
        versions = {stage.name: dvc.lock_md5(stage) for stage in chosen}
        return dg.MaterializeResult(data_version=dg.DataVersion(sha256_json(versions) if len(versions) > 1 else versions[chosen[0].name]))

    return run


def materialize(context: dg.AssetExecutionContext, stage: Stage, stage_process: StageProcess, dvc: DvcCommand) -> dict[str, Any]:
    """Bring one stage up to date and recorded; the metadata to show. What is clean already is left alone.

    Raises:
        dagster.RetryRequested: it was killed, hung, or a store did not answer: it goes on from its last checkpoint, RETRIES times.
        dagster.Failure: it failed otherwise, or what it depends on changed while it ran. Not retried: the same again would fail again.
    """
    land_if_asked(context, stage_process.root)
    try:
        if dvc.is_clean(stage.name):
            say(f"{stage.name}: up to date, skipped")
            return shown_before(context, stage, dvc.lock_md5(stage)) | {"cached": True, "md5": dvc.lock_md5(stage)}
        refuse_over_budget(context, stage_process.root, dvc)
        say(f"{stage.name}: {stage.cmd}")
        reported = stage_process.run_stage(context, stage)
        _refuse_if_moved(stage_process.root, stage, reported)
        dvc.commit(stage)
        return reported | mlflow_link(reported) | {"cached": False, "md5": dvc.lock_md5(stage)}
    except StageFailed as error:
        if error.code in PASSING and context.retry_number < RETRIES:
            _try_again(context, error)
        raise dg.Failure(str(error), allow_retries=False, metadata=error.metadata) from None
    except DvcError as error:
        raise dg.Failure(f"{stage.name}: {error}", allow_retries=False) from None


def _try_again(context: dg.AssetExecutionContext, error: StageFailed) -> None:
    seconds = RETRY_SECONDS * 2**context.retry_number
    words = f"{error} Tried again in {seconds:g} s, {context.retry_number + 1} of {RETRIES}."
    say(words)
    context.log.warning(f"{words}\n{error.tail}")
    pause(context, seconds)
    raise dg.RetryRequested(max_retries=RETRIES) from None


def mlflow_link(reported: dict[str, Any]) -> dict[str, Any]:
    """The page of the MLflow run that a stage reported, where its pictures are whole; the run is tagged with Dagster's in turn."""
    run, experiment = (reported.get(f"mlflow_{name}_id") for name in ("run", "experiment"))
    if run is None or experiment is None:
        return {}
    return {"MLflow": dg.MetadataValue.url(mlflow_page(f"experiments/{experiment.value}/runs/{run.value}"))}


def shown_before(context: dg.AssetExecutionContext, stage: Stage, md5: str) -> dict[str, Any]:
    """Pictures and numbers that were reported when these very bytes were made; none if DVC made them."""
    partitions = [str(stage.key)] if stage.meta.get("partitioned") else None
    wanted = dg.AssetRecordsFilter(asset_key=context.asset_key, asset_partitions=partitions)
    records = context.instance.fetch_materializations(wanted, limit=1).records
    if not records or records[0].asset_materialization is None:
        return {}
    metadata = dict(records[0].asset_materialization.metadata)
    return metadata if "md5" in metadata and metadata["md5"].value == md5 else {}


def _refuse_if_moved(root: Path, stage: Stage, reported: dict[str, Any]) -> None:
    """What the command recorded when it began must still hold now, or dvc.lock would pair new inputs with old outputs."""
    began = reported.get("digests")
    if began is None:
        raise dg.Failure(f"{stage.name}: its command reported no digests of what it read; nothing is recorded.", allow_retries=False)
    before = dict(began.value)
    after = stage_digests(root, stage, parse_params((root / "params.yaml").read_text()))
    moved = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    if moved:
        raise dg.Failure(
            f"{stage.name}: {', '.join(moved)} changed while it ran. Its outputs are kept, and not recorded. "
            "Run `deepgen run` again for the settings as they are now, or put the change back first.",
            allow_retries=False,
        )
