"""Promotion: the one place where a challenger becomes champion. It believes no record: it measures again what can be measured again."""

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from orchestration.config import GatesConfig
from orchestration.datasets import evaluation_set_digest
from orchestration.dvc import DvcCommand
from orchestration.registry import CHALLENGER, CHAMPION, GATES, PREVIOUS, Registry, evidence_tags
from runtime.exits import Plain
from runtime.files import tensors_digest, write_atomic
from runtime.params import STAGES, Params

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

FINAL = STAGES[-1]
HISTORY = Path("outputs/registry/promotions.jsonl")


class GateFailed(Plain):
    """The challenger may not become champion. Each line names what was measured and what is asked."""


@dataclass(frozen=True)
class Promotion:
    """What a call of `promote` or `rollback` led to."""

    version: str
    model_digest: str
    changed: bool
    message: str


def promote(root: Path, params: Params, dvc: DvcCommand) -> Promotion:
    """Make the challenger champion if every gate holds for exactly its weights on exactly the present evaluation set.

    Calls that race for the same weights have one effect: the content digest is the key, and a file lock orders the callers.

    Raises:
        GateFailed: naming each metric, its value and its floor, or what is stale or missing.
    """
    registry = Registry.open(root, params)
    with registry.lock():
        challenger = registry.by_alias(CHALLENGER)
        if challenger is None:
            raise GateFailed(f"there is no challenger in {registry.name}: register one first (asset `challenger`, or `deepgen run`).")
        digest = tensors_digest(registry.pipeline_folder(challenger))
        champion = registry.by_alias(CHAMPION)
        gates, measured_set = check_evidence(root, params, dvc, challenger, digest)
        problems, notes = check_gates(gates, params.gates, _champion_values(champion, measured_set))
        if problems:
            raise GateFailed(f"version {challenger.version} stays challenger:\n" + "\n".join(f"  {problem}" for problem in problems))
        if champion is not None and champion.tags.get("model_digest") == digest:
            _record(root, champion, None, gates, once=True)
            return Promotion(str(champion.version), digest, False, f"version {champion.version} is champion already; nothing changes")
        registry.tag(challenger, evidence_tags(gates, measured_set))
        _move_aliases(registry, challenger, champion)
        _record(root, challenger, champion, gates)
        return Promotion(str(challenger.version), digest, True, "; ".join([f"version {challenger.version} is champion", *notes]))


def check_evidence(
    root: Path, params: Params, dvc: DvcCommand, challenger: "ModelVersion", digest: str
) -> tuple[list[dict[str, Any]], str]:
    """The measured gates and the digest of the set they were measured on, once shown to be about these weights, this set, and unedited.

    Raises:
        GateFailed: they are not.
    """
    try:
        evidence = json.loads((root / GATES).read_text())
        measured, measured_set, gates = evidence["model_digest"], evidence["evaluation_set_digest"], list(evidence["gates"])
    except FileNotFoundError:
        raise GateFailed(f"{GATES} is missing: nothing was measured. `dvc repro evaluation@{FINAL}` measures.") from None
    except (ValueError, KeyError, TypeError) as error:
        raise GateFailed(f"{GATES} can't be read ({error!r}): `dvc repro --force evaluation@{FINAL}` writes it anew.") from None
    if changed := dvc.changed_outs(f"evaluation@{FINAL}"):
        raise GateFailed(f"{', '.join(changed)} is not what dvc.lock recorded: measure again with `dvc repro --force evaluation@{FINAL}`.")
    registered = challenger.tags.get("model_digest")
    if digest != registered:
        raise GateFailed(
            f"version {challenger.version} holds weights {digest[:12]}, it was registered with {registered}: its files were changed."
        )
    if digest != measured:
        raise GateFailed(f"the gates were measured on weights {measured[:12]}, the challenger is {digest[:12]}: evaluate it first.")
    try:
        present = evaluation_set_digest(root, params)
    except Plain as error:
        raise GateFailed(f"the evaluation set can't be trusted: {error}") from None
    if present != measured_set:
        raise GateFailed(f"the gates were measured on evaluation set {measured_set[:12]}, on disk is {present[:12]}: evaluate again.")
    return gates, measured_set


def check_gates(gates: list[dict[str, Any]], config: GatesConfig, champion: dict[str, float] | None) -> tuple[list[str], list[str]]:
    """Apply the floors of params.yaml, and the champion's values, to what was measured: problems, and remarks.

    What is missing, not a number, or not finite fails. The file's own verdict counts only against the model.
    """
    values = {gate.get("name"): gate.get("value") for gate in gates}
    problems = []
    for name, floor in config.floors.items():
        value: Any = values.get(name)
        if not _is_number(value):
            problems.append(f"{name}: measured {value!r}, floor {floor}")
        elif value < floor:
            problems.append(f"{name}: {value:.4g} is below its floor {floor}")
    problems += [f"{gate.get('name')}: the evaluation itself says failed" for gate in gates if gate.get("passed") is not True]
    if champion is None:
        return problems, ["no champion measured on this evaluation set: floors only"]
    for name, best in champion.items():
        value = values.get(name)
        if not _is_number(value):
            problems.append(f"{name}: measured {value!r}, the champion has {best:.4g}")
        elif value < best - config.regression_tolerance:
            problems.append(f"{name}: {value:.4g} is more than {config.regression_tolerance} below the champion's {best:.4g}")
    return problems, []


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _champion_values(champion: "ModelVersion | None", measured_set: str) -> dict[str, float] | None:
    """The champion's gate values, if they were measured on the same evaluation set; else they say nothing about the challenger."""
    if champion is None or champion.tags.get("evaluation_set_digest") != measured_set:
        return None
    return {name.removeprefix("gate."): float(value) for name, value in champion.tags.items() if name.startswith("gate.")}


def _move_aliases(registry: Registry, new: "ModelVersion", old: "ModelVersion | None") -> None:
    """The way back first, so that at no moment there is a champion without it."""
    if old is not None:
        registry.client.set_registered_model_alias(registry.name, PREVIOUS, old.version)
    registry.client.set_registered_model_alias(registry.name, CHAMPION, new.version)


def rollback(root: Path, params: Params) -> Promotion:
    """Make the previous champion champion again, if its weights are still the ones it was registered with."""
    registry = Registry.open(root, params)
    with registry.lock():
        previous, champion = registry.by_alias(PREVIOUS), registry.by_alias(CHAMPION)
        if previous is None:
            raise GateFailed(f"{registry.name} has no previous champion to go back to.")
        digest = tensors_digest(registry.pipeline_folder(previous))
        if digest != previous.tags.get("model_digest"):
            raise GateFailed(f"version {previous.version} holds weights {digest[:12]}, not the ones it was registered with.")
        _move_aliases(registry, previous, champion)
        _record(root, previous, champion, [], event="rollback")
        return Promotion(str(previous.version), digest, True, f"version {previous.version} is champion again")


def read_history(root: Path) -> list[dict[str, Any]]:
    """Who was champion when, oldest first."""
    path = root / HISTORY
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def _record(
    root: Path,
    version: "ModelVersion",
    before: "ModelVersion | None",
    gates: list[dict[str, Any]],
    event: str = "promotion",
    once: bool = False,
) -> None:
    """Append a row to the history, whole or not at all. `once`: unless the last row names this version (a killed promotion left none)."""
    rows = read_history(root)
    if once and rows and rows[-1]["version"] == str(version.version):
        return
    row = {
        "event": event,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "version": str(version.version),
        "model_digest": version.tags.get("model_digest"),
        "evaluation_set_digest": version.tags.get("evaluation_set_digest"),
        "previous": str(before.version) if before is not None else None,
        "gates": gates,
    }
    write_atomic(root / HISTORY, "".join(json.dumps(entry, sort_keys=True) + "\n" for entry in [*rows, row]))
