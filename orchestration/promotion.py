"""Promotion: the one place where a challenger becomes champion. It believes no record: it measures again what can be measured again."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestration.approval import find_approval
from orchestration.dvc import DvcCommand
from orchestration.evidence import GateFailed, check_evidence, check_gates
from orchestration.journal import read_rows, signature
from orchestration.promotion_log import HISTORY, carry_out, finish, last_champions, way_back, why_ungated
from orchestration.registry import CHALLENGER, CHAMPION, Registry, evidence_tags
from runtime.params import Params

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion


@dataclass(frozen=True)
class Promotion:
    """What a call of `promote` or `rollback` led to."""

    version: str
    model_digest: str
    changed: bool
    message: str


def promote(root: Path, params: Params, dvc: DvcCommand, via: str = "python", reason: str | None = None) -> Promotion:
    """Make the challenger champion if every gate holds for exactly its weights on exactly the present evaluation set.

    Calls that race for the same weights have one effect: the content digest is the key, and a file lock orders the callers.

    Args:
        via: through what it was asked for, for the log: `cli`, `dagster run ID`.

    Raises:
        GateFailed: naming each metric, its value and its floor, or what is stale or missing.
        Untrusted: the challenger's files are not the registered ones, or hold a pickle.
    """
    registry = Registry.open(root, params)
    with registry.lock():
        finished = finish(registry)
        challenger = registry.by_alias(CHALLENGER)
        if challenger is None:
            raise GateFailed(f"there is no challenger in {registry.name}: register one first (asset `challenger`, or `deepgen run`).")
        _, digest = registry.verify(challenger)
        gates, measured_set = check_evidence(root, params, dvc, challenger, digest)
        yardstick, notes = _yardstick(registry, measured_set)
        problems, remarks = check_gates(gates, params.gates, yardstick)
        approval = find_approval(root, digest, measured_set)
        number = str(challenger.version)
        if params.registry.require_approval and approval is None:
            what = f"weights {digest[:12]} on evaluation set {measured_set[:12]}"
            problems.append(f"approval: nobody approved {what}; whoever may, does it with `deepgen approve {number} --by NAME`")
        if problems:
            raise GateFailed(f"version {number} stays challenger:\n" + "\n".join(f"  {line}" for line in [*problems, *notes]))
        if _is_champion(registry, challenger):
            how = "its promotion had been interrupted, and is complete now" if finished else "nothing changes"
            return Promotion(number, digest, finished is not None, f"version {number} is champion already; {how}")
        registry.tag(challenger, evidence_tags(gates, measured_set))
        row = _row("promotion", registry, challenger, gates, measured_set, signature(via, reason))
        asked = params.gates.model_dump()
        carry_out(registry, row | {"asked": asked, "approval": approval, "notes": [*notes, *remarks]})
        return Promotion(number, digest, True, "; ".join([f"version {number} is champion", *notes, *remarks]))


def _yardstick(registry: Registry, measured_set: str) -> tuple[dict[str, Any] | None, list[str]]:
    """The values of the last version that the log made champion, if they were measured on the same evaluation set, and what to say of them.

    They are the log's: neither an alias that was moved by hand, nor tags, nor a version's deletion changes what is asked.
    """
    notes = [f"{HISTORY}: line {number} can't be read, and is left as it is" for number in read_rows(registry.root / HISTORY)[1]]
    last = next(last_champions(registry), None)
    if why := why_ungated(registry):
        notes.append(why + (f"; the yardstick are the values of version {last['version']} in the log" if last else ""))
    if last is None or last["evaluation_set_digest"] != measured_set:
        return None, notes
    return {gate["name"]: gate["value"] for gate in last["gates"]}, notes


def _is_champion(registry: Registry, version: "ModelVersion") -> bool:
    champion = registry.by_alias(CHAMPION)
    return champion is not None and champion.version == version.version and why_ungated(registry) is None


def _row(
    event: str,
    registry: Registry,
    version: "ModelVersion",
    gates: list[dict[str, Any]],
    evaluation_set: str,
    who: dict[str, Any],
) -> dict[str, Any]:
    """A row of the log."""
    number = str(version.version)
    before = way_back(registry, but=number)
    return who | {
        "event": event,
        "model": registry.name,
        "version": number,
        "model_digest": version.tags["model_digest"],
        "files_digest": version.tags["files_digest"],
        "evaluation_set_digest": evaluation_set,
        "previous": str(before.version) if before is not None else None,
        "gates": gates,
    }


def rollback(root: Path, params: Params, via: str = "python", reason: str | None = None) -> Promotion:
    """Make the version that was champion before champion again; after an alias was moved or a champion deleted by hand, the last that was.

    Raises:
        GateFailed: there is none, or it is not the one that was promoted.
        Untrusted: its files were changed since it was registered, or hold a pickle.
    """
    registry = Registry.open(root, params)
    with registry.lock():
        finished = finish(registry)
        if finished is not None and finished["event"] == "rollback":
            number = finished["version"]
            return Promotion(
                number, finished["model_digest"], True, f"version {number} is champion again: an interrupted rollback is complete"
            )
        champion = registry.by_alias(CHAMPION)
        before = way_back(registry, but=str(champion.version) if champion is not None else "")
        if before is None:
            raise GateFailed(f"{registry.name} has no previous champion to go back to.")
        number = str(before.version)
        promoted = next(row for row in last_champions(registry) if row["version"] == number)
        _, digest = registry.verify(before)
        if (digest, before.tags["files_digest"]) != (promoted["model_digest"], promoted.get("files_digest")):
            raise GateFailed(f"version {number} is not what was promoted on {promoted['time']}: its files and its tags were changed.")
        why = why_ungated(registry)
        row = _row("rollback", registry, before, promoted["gates"], promoted["evaluation_set_digest"], signature(via, reason))
        carry_out(registry, row | {"notes": [why] if why else []})
        return Promotion(number, digest, True, f"version {number} is champion again")
