"""Blocking asset checks, one a group: is the thing there, whole, finite, and what it says it is. Whatever can't be measured fails.

They gate only what runs after them in the same run; promotion therefore measures for itself.
"""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dagster as dg

from orchestration.assets import asset_name
from orchestration.datasets import shards_folder
from orchestration.registry import EXPORT, GATES
from runtime.exits import Plain
from runtime.files import read_json, tensors_digest
from runtime.params import STAGES, load_params
from runtime.published import read_manifest, verify_part
from runtime.recipe import Stage

Outcome = tuple[list[str], dict[str, Any]]  # problems, and what was measured


def build_checks(root: Path, stages: dict[str, Stage]) -> list[dg.AssetChecksDefinition]:
    """The checks of every asset that dvc.yaml defines and that this project knows how to measure."""
    present = {stage.group for stage in stages.values()}
    checks: list[dg.AssetChecksDefinition] = []
    if "shards" in present:
        checks.append(
            _check(
                "shards",
                "manifest_matches_files",
                "Each shard has the sha256 in its manifest; in a store, its size.",
                lambda: check_shards(root),
            )
        )
    for stage in stages.values():
        if stage.group == "mixture":
            checks.append(_mixture_check(root, stage))
        elif stage.group in STAGES:
            checks += [_training_check(root, stage.group), _progress_check(root, stage.group)]
        elif stage.group == "evaluation":
            checks.append(_evaluation_check(root, stage))
    if "export_diffusers" in present:
        description = "The exported weights are the evaluated ones."
        checks.append(_check("export_diffusers", "weights_are_the_evaluated_ones", description, lambda: check_export(root)))
    return checks


def _check(asset: str, name: str, description: str, measure: Callable[[], Outcome], severity: Any = None) -> dg.AssetChecksDefinition:
    """An asset check that passes if `measure` finds no problem. An unreadable or missing file is a problem."""

    @dg.asset_check(asset=asset, name=name, description=description, blocking=True)
    def check() -> dg.AssetCheckResult:
        try:
            problems, measured = measure()
        except (OSError, ValueError, KeyError, TypeError, Plain) as error:
            problems, measured = [f"can't be measured: {error}"], {}
        return dg.AssetCheckResult(
            passed=not problems,
            severity=severity or dg.AssetCheckSeverity.ERROR,
            description="; ".join(problems) or None,
            metadata=measured,
        )

    return check


def check_shards(root: Path) -> Outcome:
    """Every part that has been built, file by file; tars in a store by their sizes, for this runs after each build and fetches nothing."""
    samples = {}
    for part in load_params(root / "params.yaml").data.parts:
        if (root / "outputs" / "shards" / part).is_dir():
            samples[part] = verify_part(shards_folder(root, part), whole=False)["samples"]
    return ([] if samples else ["no part has been built"]), {f"samples {part}": n for part, n in samples.items()}


def _mixture_check(root: Path, stage: Stage) -> dg.AssetChecksDefinition:
    def measure() -> Outcome:
        config = load_params(root / "params.yaml").mixture[stage.key]  # type: ignore[index]
        mixture = read_json(root / stage.outs[0])
        rows = [row for task in mixture["tasks"].values() for row in task]
        problems = [] if rows else ["it holds no parts"]
        for row in rows:
            built = read_manifest(shards_folder(root, row["part"]))["dataset_id"]
            if row["dataset_id"] != built:
                problems.append(f"{row['part']}: the mixture names dataset {row['dataset_id'][:12]}, on disk is {built[:12]}")
        if {task: times for task, times in config.ratio.items() if times > 0} != mixture["ratio"]:
            problems.append(f"the mixture has ratio {mixture['ratio']}, params.yaml asks for {config.ratio}")
        return problems, {f"samples {row['part']}": row["samples"] for row in rows}

    return _check(
        asset_name(stage), "names_the_data_on_disk", "Its parts are the ones asked for, by the ids of the shards on disk.", measure
    )


def _training_check(root: Path, stage: str) -> dg.AssetChecksDefinition:
    def measure() -> Outcome:
        metrics = read_json(root / "outputs" / stage / "metrics.json")
        planned = getattr(load_params(root / "params.yaml"), stage).steps
        problems = not_finite(metrics)
        if metrics["steps"] != planned:
            problems.append(f"trained {metrics['steps']} steps of {planned}")
        return problems, numbers(metrics)

    return _check(stage, "numbers_are_finite", "Every number of the stage is finite, and it took all its steps.", measure)


def _progress_check(root: Path, stage: str) -> dg.AssetChecksDefinition:
    """A warning, not a gate: a run of a few steps may honestly have learnt nothing yet."""

    def measure() -> Outcome:
        metrics = read_json(root / "outputs" / stage / "metrics.json")
        return improved(stage, metrics), numbers(metrics)

    return _check(stage, "it_learnt", "Loss fell, or reward rose, from first to last.", measure, dg.AssetCheckSeverity.WARN)


def improved(stage: str, metrics: dict[str, Any]) -> list[str]:
    """What did not get better: the reward of the reinforcement stage, the loss of the others."""
    name, better = ("reward", 1) if stage == "mr_grpo" else ("loss", -1)
    first, last = metrics[f"{name}_first"], metrics[f"{name}_last"]
    return [] if better * (last - first) > 0 else [f"{name} went from {first:.4g} to {last:.4g}"]


def _evaluation_check(root: Path, stage: Stage) -> dg.AssetChecksDefinition:
    def measure() -> Outcome:
        params = load_params(root / "params.yaml")
        metrics = read_json(root / stage.outs[0] / "metrics.json")
        planned = {params.data.parts[part].task: read_manifest(shards_folder(root, part))["samples"] for part in params.evaluation.parts}
        problems = not_finite(metrics)
        for task, n in planned.items():
            found = metrics[task]["n"]
            if found != n:
                problems.append(f"{task}: scored {found} samples of {n}")
        return problems, {f"{task} strict": row["strict"] for task, row in metrics.items()}

    return _check(asset_name(stage), "scored_all_samples", "Every metric is finite, and every planned sample was scored.", measure)


def check_export(root: Path) -> Outcome:
    exported, evaluated = tensors_digest(root / EXPORT), read_json(root / GATES)["model_digest"]
    problems = [] if exported == evaluated else [f"exported weights {exported[:12]}, evaluated {evaluated[:12]}"]
    return problems, {"model_digest": exported}


def walk(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of nested metrics with their dotted names."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from walk(inner, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from walk(inner, f"{path}.{index}")
    else:
        yield path, value


def numbers(metrics: dict[str, Any]) -> dict[str, float]:
    return {path: value for path, value in walk(metrics) if isinstance(value, int | float) and math.isfinite(value)}


def not_finite(metrics: dict[str, Any]) -> list[str]:
    """Leaves that are no finite number. None at all is a problem too."""
    leaves = list(walk(metrics))
    bad = [f"{path} is {value!r}" for path, value in leaves if not (isinstance(value, int | float) and math.isfinite(value))]
    return bad if leaves else ["there are no metrics"]
