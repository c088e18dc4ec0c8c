"""Approvals: a person's word that these weights, as measured on this evaluation set, may become champion."""

from pathlib import Path
from typing import Any

from orchestration.dvc import DvcCommand
from orchestration.evidence import check_evidence
from orchestration.journal import append_row, read_rows, signature
from orchestration.registry import NotRegistered, Registry
from runtime.params import Params

APPROVALS = Path("outputs/registry/approvals.jsonl")


def approve(root: Path, params: Params, dvc: DvcCommand, number: str, by: str, reason: str | None = None) -> dict[str, Any]:
    """Record that `by` approves a version, and return the row. It holds for the weights and the evaluation set of now, and for no others.

    Raises:
        NotRegistered: there is no such version.
        Plain: its files were changed, or it was not evaluated as it is: there is nothing to approve.
    """
    registry = Registry.open(root, params)
    with registry.lock():
        version = registry.get(number)
        if version is None:
            known = ", ".join(sorted(str(version.version) for version in registry.versions())) or "none yet"
            raise NotRegistered(f"{registry.name} has no version {number}; there are: {known}.")
        _, digest = registry.verify(version)
        gates, evaluation_set = check_evidence(root, params, dvc, version, digest)
        row = {"version": str(version.version), "model_digest": digest, "evaluation_set_digest": evaluation_set, "gates": gates, "by": by}
        row |= signature("cli", reason)
        append_row(root / APPROVALS, row)
    return row


def find_approval(root: Path, model_digest: str, evaluation_set_digest: str) -> dict[str, Any] | None:
    """The latest approval of exactly these weights on exactly this evaluation set."""
    wanted = (model_digest, evaluation_set_digest)
    rows = reversed(read_rows(root / APPROVALS)[0])
    return next((row for row in rows if (row.get("model_digest"), row.get("evaluation_set_digest")) == wanted), None)
