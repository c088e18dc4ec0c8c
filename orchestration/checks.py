"""Asset checks: is the thing there, whole, finite, and what it says it is. Whatever can't be measured fails.

They gate only what runs after them in the same run, where they are blocking; promotion therefore measures for itself.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import dagster as dg

from orchestration import data_checks, model_checks
from orchestration.assets import asset_name
from orchestration.data_checks import Outcome
from runtime.exits import Plain
from runtime.params import STAGES
from runtime.recipe import Stage

ERROR, WARN = dg.AssetCheckSeverity.ERROR, dg.AssetCheckSeverity.WARN  # of a warning what comes after goes on
Row = tuple[str, str, Callable[[Path, Stage], Outcome], Any]  # name, description, measure, severity
CHECKS: dict[str, list[Row]] = {
    "shards": [
        ("manifest_matches_files", "Each shard has the sha256 in its manifest; in a store, its size.", data_checks.check_shards, ERROR),
        ("samples_decode", "Samples of each part were read back and decoded before it was published.", data_checks.check_decoded, ERROR),
        ("every_record_is_accounted_for", "Written, duplicate, dropped or quarantined; no part twice.", data_checks.check_counts, ERROR),
    ],
    "mixture": [
        (
            "names_the_data_on_disk",
            "Its parts are the ones asked for, by the ids of the shards on disk.",
            data_checks.check_mixture,
            ERROR,
        ),
        (
            "draws_the_shares_asked_for",
            "Each part has the share of samples that its weight asks.",
            data_checks.check_shares,
            ERROR,
        ),
        ("holds_no_evaluation_samples", "No part is an evaluation set, and each was searched for them.", data_checks.check_leaks, ERROR),
    ],
    "training": [
        ("numbers_are_finite", "Every number of the stage is finite, and it took all its steps.", model_checks.check_finite, ERROR),
        ("saw_the_samples_planned", "Steps times batch, each task in its share.", model_checks.check_samples, ERROR),
        (
            "it_learnt",
            "Loss fell, or reward rose, from first to last. A few steps may honestly not.",
            model_checks.check_learnt,
            WARN,
        ),
    ],
    "evaluation": [
        ("scored_all_samples", "Every metric is finite, and every planned sample was scored.", model_checks.check_scored, ERROR),
        ("floors_are_met", "Every metric reaches its floor; promotion asks again.", model_checks.check_floors, WARN),
    ],
    "export_diffusers": [
        ("weights_are_the_evaluated_ones", "The exported weights are the evaluated ones.", model_checks.check_export, ERROR),
        (
            "makes_the_same_image_alone",
            "A fresh process with the network off made the image of the training code, of the same seed.",
            model_checks.check_proof,
            ERROR,
        ),
        ("licences_are_carried_along", "Of the data, and of every model that it grew from.", model_checks.check_licences, ERROR),
    ],
}
FINAL_CHECKS: list[Row] = [
    ("champion_is_not_better", "No metric is below the champion's by more than its tolerance.", model_checks.check_regression, WARN),
]


def build_checks(root: Path, stages: dict[str, Stage]) -> list[dg.AssetChecksDefinition]:
    """The checks of every asset that dvc.yaml defines and that this project knows how to measure."""
    checks: list[dg.AssetChecksDefinition] = []
    for asset, stage in {asset_name(stage): stage for stage in stages.values()}.items():
        checks += [_check(root, asset, stage, *row) for row in CHECKS.get("training" if stage.group in STAGES else stage.group, [])]
        if asset == f"evaluation_{STAGES[-1]}":
            checks += [_check(root, asset, stage, *row) for row in FINAL_CHECKS]
    return checks


def _check(
    root: Path, asset: str, stage: Stage, name: str, description: str, measure: Callable[[Path, Stage], Outcome], severity: Any
) -> dg.AssetChecksDefinition:
    """An asset check that passes if `measure` finds no problem. An unreadable or missing file is a problem."""

    @dg.asset_check(asset=asset, name=name, description=description, blocking=severity == ERROR)
    def check() -> dg.AssetCheckResult:
        try:
            problems, measured = measure(root, stage)
        except (OSError, ArithmeticError, LookupError, ValueError, TypeError, AttributeError, Plain) as error:
            problems, measured = [f"can't be measured: {type(error).__name__}: {error}"], {}
        return dg.AssetCheckResult(passed=not problems, severity=severity, description="; ".join(problems) or None, metadata=measured)

    return check
