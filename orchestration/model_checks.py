"""What is measured of training stages, evaluations and the export: from what they wrote, and from the weights themselves."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from orchestration.data_checks import TOLERANCE, Outcome
from orchestration.datasets import shards_folder
from orchestration.evidence import check_gates
from orchestration.promotion_log import last_champions
from orchestration.registry import EXPORT, GATES, Registry
from runtime.files import read_json, sha256_file, tensors_digest
from runtime.params import load_params
from runtime.published import read_manifest
from runtime.recipe import Stage


def check_finite(root: Path, stage: Stage) -> Outcome:
    metrics = _metrics(root, stage)
    planned = metrics.get("stopped_early_at", getattr(load_params(root / "params.yaml"), stage.group).steps)
    problems = not_finite(metrics)
    if metrics["steps"] != planned:
        problems.append(f"trained {metrics['steps']} steps of {planned}")
    return problems, numbers(metrics)


def check_samples(root: Path, stage: Stage) -> Outcome:
    """Of a step that was skipped the samples are left behind, and mr_grpo.refill draws further ones: then there are more, never fewer."""
    metrics, config = _metrics(root, stage), getattr(load_params(root / "params.yaml"), stage.group)
    batch = config.prompts_per_step if stage.group == "mr_grpo" else config.batch_size
    seen, by_task, planned = metrics["samples_seen"], metrics["samples_by_task"], metrics["steps"] * batch
    measured = {"seen": seen, "planned": planned} | {f"seen {task}": n for task, n in by_task.items()}
    problems = []
    more = metrics["steps_skipped"] or getattr(config, "refill", 0)
    if not (seen == planned or (more and seen > planned)):
        problems.append(f"saw {seen} samples, {metrics['steps']} steps of {batch} are {planned}")
    ratio = read_json(root / "outputs" / "mixture" / f"{stage.group}.json")["ratio"]
    for task, times in ratio.items():
        asked, got = times / sum(ratio.values()), by_task.get(task, 0) / seen
        if not abs(got - asked) <= TOLERANCE:
            problems.append(f"{task}: {got:.3f} of the samples, the mixture asks for {asked:.3f}")
    return problems, measured


def check_learnt(root: Path, stage: Stage) -> Outcome:
    metrics = _metrics(root, stage)
    return improved(stage.group, metrics), numbers(metrics)


def improved(stage: str, metrics: dict[str, Any]) -> list[str]:
    """What did not get better: the reward of the reinforcement stage, the loss of the others."""
    name, better = ("reward", 1) if stage == "mr_grpo" else ("loss", -1)
    first, last = metrics[f"{name}_first"], metrics[f"{name}_last"]
    return [] if better * (last - first) > 0 else [f"{name} went from {first:.4g} to {last:.4g}"]


def check_scored(root: Path, stage: Stage) -> Outcome:
    params, metrics = load_params(root / "params.yaml"), _metrics(root, stage)
    planned = {params.data.parts[part].task: read_manifest(shards_folder(root, part))["samples"] for part in params.evaluation.parts}
    problems = not_finite(metrics)
    for task, n in planned.items():
        found = metrics[task]["n"]
        if found != n:
            problems.append(f"{task}: scored {found} samples of {n}")
    return problems, {f"{task} strict": row["strict"] for task, row in metrics.items()}


def check_floors(root: Path, stage: Stage) -> Outcome:
    gates, config = _gates(root, stage), load_params(root / "params.yaml").gates
    measured = {f"{name} floor": floor for name, floor in config.floors.items()}
    return check_gates(gates, config, None)[0], measured | _values(gates)


def check_regression(root: Path, stage: Stage) -> Outcome:
    """Against the last version that was promoted, if it was measured on this evaluation set; else there is nothing to compare with."""
    params, gates = load_params(root / "params.yaml"), _gates(root, stage)
    last = next(last_champions(Registry.open(root, params)), None)
    measured_set = read_json(root / stage.outs[0] / "gates.json")["evaluation_set_digest"]
    if last is None or last["evaluation_set_digest"] != measured_set:
        return [], _values(gates) | {"champion": "none measured on this evaluation set"}
    best = {gate["name"]: gate["value"] for gate in last["gates"]}
    without_floors = params.gates.model_copy(update={"floors": {}})
    return check_gates(gates, without_floors, best)[0], _values(gates) | {
        f"{name} of champion {last['version']}": value for name, value in best.items()
    }


def check_export(root: Path, stage: Stage) -> Outcome:
    exported, evaluated = tensors_digest(root / EXPORT), read_json(root / GATES)["model_digest"]
    problems = [] if exported == evaluated else [f"exported weights {exported[:12]}, evaluated {evaluated[:12]}"]
    files = read_json(root / EXPORT / "files.json")
    problems += [
        f"{name} is not the file that was exported" for name, digest in files.items() if sha256_file(root / EXPORT / name) != digest
    ]
    return problems, {"model_digest": exported, "files": len(files)}


def check_proof(root: Path, stage: Stage) -> Outcome:
    """What the stage proved when it made these weights; it is not run again."""
    proof, exported = read_json(root / EXPORT / "proof.json"), tensors_digest(root / EXPORT)
    problems = []
    if proof["model_digest"] != exported:
        problems.append(f"proven of weights {proof['model_digest'][:12]}, exported are {exported[:12]}")
    if proof["process"] != "fresh" or proof["network"] != "off":
        problems.append(f"it was loaded in a {proof['process']} process with the network {proof['network']}")
    if proof["largest_pixel_difference"] != 0:
        problems.append(f"its image differs by up to {proof['largest_pixel_difference']} of 255")
    return problems, {"largest pixel difference": proof["largest_pixel_difference"], "seed": proof["seed"]}


def check_licences(root: Path, stage: Stage) -> Outcome:
    facts, params = read_json(root / EXPORT / "provenance.json"), load_params(root / "params.yaml")
    problems = [f"{row['name']} ({row['repo']}): no licence" for row in facts["upstream"] if not row["licence"]]
    grown_from = {row["repo"] for row in facts["upstream"]}
    if params.foundation.source == "hub":
        problems += [f"{weights.repo} is not named" for weights in params.foundation.hub.values() if weights.repo not in grown_from]
    used = {params.data.parts[name].licence for mixture in params.mixture.values() for name in mixture.parts}
    problems += [f"{licence}, of training data, is not named" for licence in sorted(used - set(facts["licences"]))]
    return problems, {"data": ", ".join(facts["licences"]), "upstream": ", ".join(sorted(grown_from)) or "none"}


def _metrics(root: Path, stage: Stage) -> dict[str, Any]:
    metrics: dict[str, Any] = read_json(root / stage.outs[0] / "metrics.json")
    return metrics


def _gates(root: Path, stage: Stage) -> list[dict[str, Any]]:
    return list(read_json(root / stage.outs[0] / "gates.json")["gates"])


def _values(gates: list[dict[str, Any]]) -> dict[str, float]:
    return numbers({gate["name"]: gate["value"] for gate in gates})


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
