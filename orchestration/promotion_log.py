"""The promotion log: who was champion when, by whom and why. It is the truth that the aliases of MLflow are held against."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestration.journal import append_row, read_rows
from orchestration.registry import CHAMPION, PREVIOUS, Registry
from runtime.files import fsync_folder, read_json, sha256_json, write_json

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

HISTORY = Path("outputs/registry/promotions.jsonl")
PENDING = Path("outputs/registry/pending.json")
ROW = "log_row"  # tag of a version: digest of the last row that made it champion, so that an edited log shows


def read_history(root: Path) -> list[dict[str, Any]]:
    """Every promotion and rollback, oldest first."""
    return read_rows(root / HISTORY)[0]


def last_champions(registry: Registry) -> Iterator[dict[str, Any]]:
    """The newest row of each version of this model that the log made champion, newest first."""
    seen: set[str] = set()
    for row in reversed(read_history(registry.root)):
        if row.get("model", registry.name) == registry.name and row["version"] not in seen:
            seen.add(row["version"])
            yield row


def way_back(registry: Registry, but: str) -> "ModelVersion | None":
    """The version that was champion last, other than `but`, and still exists."""
    rows = (row for row in last_champions(registry) if row["version"] != but)
    return next((version for row in rows if (version := registry.get(row["version"])) is not None), None)


def carry_out(registry: Registry, row: dict[str, Any]) -> None:
    """Move the aliases as `row` says and log it. Killed anywhere in between, `finish` does the rest. Call it under the registry's lock."""
    write_json(registry.root / PENDING, row)
    finish(registry)


def finish(registry: Registry) -> dict[str, Any] | None:
    """Complete what an earlier call decided and did not come to the end of; its row, or None. Call it under the registry's lock."""
    pending = registry.root / PENDING
    if not pending.is_file():
        return None
    row = read_json(pending)
    version = registry.get(row["version"])
    if version is not None:
        registry.tag(version, {ROW: sha256_json(row)})
        if row["previous"] is not None and registry.get(row["previous"]) is not None:
            registry.point(PREVIOUS, row["previous"])  # the way back first, so that at no moment there is a champion without it
        registry.point(CHAMPION, row["version"])
        if read_history(registry.root)[-1:] != [row]:
            append_row(registry.root / HISTORY, row)
    pending.unlink()
    fsync_folder(pending.parent)
    return row if version is not None else None


def why_ungated(registry: Registry) -> str | None:
    """Why the champion is not what the log says, in one line; None where the two agree, or where there never was a champion.

    Call it under the registry's lock.
    """
    if (registry.root / PENDING).is_file():
        row = read_json(registry.root / PENDING)
        return f"the {row['event']} of version {row['version']} was interrupted: `deepgen {_command(row)}` finishes it"
    last = next(last_champions(registry), None)
    champion = registry.by_alias(CHAMPION)
    if last is None:
        by_hand = f"and nothing in {HISTORY} says that it passed the gates: its alias was set by hand"
        return None if champion is None else f"version {champion.version} is champion, {by_hand}"
    if champion is None:
        how = "was deleted by hand" if registry.get(last["version"]) is None else "lost its alias by hand"
        return f"there is no champion: version {last['version']}, the last one promoted, {how}. `deepgen rollback` brings one back"
    if str(champion.version) != last["version"]:
        return (
            f"version {champion.version} was made champion by hand, past the gates; the last one promoted is version {last['version']}. "
            "`deepgen rollback` puts it back"
        )
    if champion.tags.get("model_digest") != last["model_digest"]:
        return (
            f"version {champion.version} is tagged with weights {champion.tags.get('model_digest')}, promoted were {last['model_digest']}"
        )
    if champion.tags.get(ROW) != sha256_json(last):
        return f"the row of version {champion.version} in {HISTORY}, or its tag {ROW}, was edited by hand: the two don't agree"
    return None


def _command(row: dict[str, Any]) -> str:
    return "rollback" if row["event"] == "rollback" else "promote"
