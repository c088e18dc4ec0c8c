"""Evidence: what was measured of the challenger, shown to be about exactly its weights and the present evaluation set, and unedited."""

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from orchestration.config import GatesConfig
from orchestration.datasets import evaluation_set_digest, shards_folder
from orchestration.dvc import DvcCommand
from orchestration.registry import GATES
from runtime.exits import Plain
from runtime.files import read_json
from runtime.params import STAGES, Params
from runtime.published import read_manifest

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

EVALUATION = f"evaluation@{STAGES[-1]}"
AGAIN = f"measure again with `dvc repro --force --single-item {EVALUATION}`"


class GateFailed(Plain):
    """The challenger may not become champion. Each line names what was measured and what is asked."""


def check_evidence(
    root: Path, params: Params, dvc: DvcCommand, challenger: "ModelVersion", digest: str
) -> tuple[list[dict[str, Any]], str]:
    """The measured gates and the digest of the set they were measured on, once shown to be about these weights, this set, and unedited.

    Raises:
        GateFailed: they are not.
    """
    try:
        evidence = json.loads((root / GATES).read_text())
        measured, measured_set, gates = (
            evidence["model_digest"],
            evidence["evaluation_set_digest"],
            [dict(gate) for gate in evidence["gates"]],
        )
    except FileNotFoundError:
        raise GateFailed(f"{GATES} is missing: nothing was measured. `dvc repro {EVALUATION}` measures.") from None
    except (ValueError, KeyError, TypeError) as error:
        raise GateFailed(f"{GATES} can't be read ({error!r}): {AGAIN}.") from None
    changes = dvc.changes(EVALUATION)
    if changed := _named(changes, "changed outs"):
        raise GateFailed(f"{', '.join(changed)} is not what dvc.lock recorded: {AGAIN}.")
    if digest != measured:
        raise GateFailed(
            f"the gates were measured on weights {measured[:12]}, version {challenger.version} has {digest[:12]}: evaluate it first."
        )
    try:
        present = evaluation_set_digest(root, params)
    except Plain as error:
        raise GateFailed(f"the evaluation set can't be trusted: {error}") from None
    if present != measured_set:
        raise GateFailed(f"the gates were measured on evaluation set {measured_set[:12]}, on disk is {present[:12]}: evaluate again.")
    if moved := _measured_otherwise(changes):
        raise GateFailed(f"{', '.join(moved)} changed since the gates were measured: put it back, or {AGAIN}.")
    if wrong := _recount(root, params, gates):
        raise GateFailed("the gates are not what was scored:\n" + "\n".join(f"  {line}" for line in wrong) + f"\n{AGAIN}.")
    return gates, measured_set


def _named(changes: list[Any], kind: str) -> dict[str, Any]:
    return {path: how for entry in changes if isinstance(entry, dict) for path, how in entry.get(kind, {}).items()}


def _measured_otherwise(changes: list[Any]) -> list[str]:
    """What the evaluation depends on and was other when it ran. The gates of params.yaml are no part of it: they are judged anew."""
    moved: list[str] = [entry for entry in changes if isinstance(entry, str)]
    for path, how in _named(changes, "changed deps").items():
        moved += [f"{key} in {path}" for key in how if key != "gates"] if isinstance(how, dict) else [path]
    return moved


def _recount(root: Path, params: Params, gates: list[dict[str, Any]]) -> list[str]:
    """How the gates differ from the verdicts on the single samples, which are kept beside them."""
    path = GATES.with_name("samples.json")
    planned: dict[str, int] = {
        params.data.parts[part].task: read_manifest(shards_folder(root, part))["samples"] for part in params.evaluation.parts
    }
    try:
        verdicts = {task: [row["strict"] is True for row in rows] for task, rows in read_json(root / path).items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return [f"{path} can't be read: {error!r}"]
    wrong = []
    for gate in gates:
        name, value = gate.get("name"), gate.get("value")
        rows = verdicts.get(str(name), [])
        if len(rows) != planned.get(str(name)):
            wrong.append(f"{name}: {len(rows)} samples were scored, the evaluation set has {planned.get(str(name))}")
        elif is_number(value) and abs(value - sum(rows) / len(rows)) > 1e-4:  # shares are rounded to four places
            wrong.append(f"{name}: the gate says {value:.4g}, of its {len(rows)} samples {sum(rows)} are right")
    return wrong


def check_gates(gates: list[dict[str, Any]], config: GatesConfig, champion: dict[str, Any] | None) -> tuple[list[str], list[str]]:
    """Apply the floors of params.yaml, and the champion's values, to what was measured: problems, and remarks.

    What is missing, not a number, or not finite fails. The file's own verdict counts only against the model.
    """
    values = {gate.get("name"): gate.get("value") for gate in gates}
    problems = []
    for name, floor in config.floors.items():
        value = values.pop(name, None)
        if not is_number(value):
            problems.append(f"{name}: measured {value!r}, floor {floor}")
        elif value < floor:
            problems.append(f"{name}: {value:.4g} is below its floor {floor}")
    problems += [f"{name}: measured {value!r}, no finite number" for name, value in values.items() if not is_number(value)]
    problems += [f"{gate.get('name')}: the evaluation itself says failed" for gate in gates if gate.get("passed") is not True]
    if champion is None:
        return problems, ["no champion measured on this evaluation set: floors only"]
    values = {gate.get("name"): gate.get("value") for gate in gates}
    for name, best in champion.items():
        value = values.get(name)
        tolerance = config.tolerances.get(name, config.regression_tolerance)
        if not is_number(value) or not is_number(best):
            problems.append(f"{name}: measured {value!r}, the champion has {best!r}")
        elif value < best - tolerance:
            problems.append(f"{name}: {value:.4g} is more than {tolerance} below the champion's {best:.4g}")
    return problems, []


def is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
