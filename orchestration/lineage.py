"""`deepgen lineage`: what made a registered version, or an exported folder, from what its registration recorded. Nothing is guessed."""

import json
import re
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestration.gc import shown_size
from orchestration.promotion_log import read_history
from orchestration.provenance import DATA, DIFF, EDITS, ENVIRONMENT, FOLDER, foundation_licences, read_environment
from orchestration.registry import NotRegistered, Registry
from runtime.files import read_json, sha256_json, tensors_digest
from runtime.params import STAGES, ParamsError, check_params, parse_params

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.entities.model_registry import ModelVersion

UNKNOWN = "not recorded"
RUN_ID = re.compile(r"[0-9a-f]{32}")
HEADLINES = ("loss", "reward", "reward_strict")  # and the held-out losses after the stage


@dataclass(frozen=True)
class Record:
    """What a registration left on its MLflow run: tags, and the files by name."""

    run_id: str
    tags: dict[str, str]
    files: dict[str, bytes]

    def text(self, name: str) -> str | None:
        return self.files[name].decode() if name in self.files else None

    def read(self, name: str) -> Any:
        """A JSON file, or None."""
        return json.loads(self.files[name]) if name in self.files else None

    @cached_property
    def commit(self) -> str | None:
        commit = self.tags.get("git_commit", "none")
        return None if commit == "none" else commit

    @cached_property
    def params(self) -> dict[str, Any] | None:
        text = self.text("params.yaml")
        return None if text is None else parse_params(text, f"params.yaml of run {self.run_id}")

    @cached_property
    def lock(self) -> dict[str, Any] | None:
        """Stage -> its entry in dvc.lock."""
        text = self.text("dvc.lock")
        return None if text is None else parse_params(text, f"dvc.lock of run {self.run_id}").get("stages", {})


def find_version(root: Path, registry: Registry, what: str) -> tuple["ModelVersion | None", str]:
    """The version that `what` names and the digest of its weights; None for a folder whose weights were never registered.

    Raises:
        NotRegistered: no such version; or `what` is no number, no @ALIAS, no models:/ address and no folder.
        FileNotFoundError: a folder without weights.
    """
    if Path(what).is_dir() and not what.startswith("@"):
        digest = tensors_digest(Path(what))
        found = registry.by_digest(digest)  # a search leaves its aliases out
        return found and registry.resolve(f"models:/{registry.name}/{found.version}"), digest
    address = f"models:/{registry.name}/{what}" if what.isdigit() else f"models:/{registry.name}{what}" if what.startswith("@") else what
    if not address.startswith("models:/"):
        raise NotRegistered(f"{what}: expected a version's number, @ALIAS, models:/{registry.name}/NUMBER, or an exported folder.")
    name = re.split("[/@]", address.removeprefix("models:/"))[0]
    if name != registry.name:
        raise NotRegistered(f"{what}: registry.model_name in params.yaml is {registry.name}; a version of {name} is in another registry.")
    version = registry.resolve(address)
    return version, version.tags.get("model_digest", UNKNOWN)


def read_record(registry: Registry, run_id: str) -> Record:
    """Raises NotRegistered if MLflow has no such run."""
    run = get_run(registry, run_id)
    if run is None:
        raise NotRegistered(f"{run_id}: MLflow ({registry.client.tracking_uri}) has no such run.")
    files = {}
    with tempfile.TemporaryDirectory() as place:
        present = [*registry.client.list_artifacts(run_id), *registry.client.list_artifacts(run_id, FOLDER)]
        for entry in present:
            if not entry.is_dir:
                files[Path(entry.path).name] = Path(registry.client.download_artifacts(run_id, entry.path, place)).read_bytes()
    return Record(run_id, dict(run.data.tags), files)


def get_run(registry: Registry, run_id: str) -> "Run | None":
    from mlflow.exceptions import MlflowException

    try:
        return registry.client.get_run(run_id)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        return None


def differing_packages(recorded: dict[str, Any] | None) -> list[str]:
    """Where the present environment is not the recorded one, a line each; empty where nothing was recorded."""
    if recorded is None:
        return []
    present = read_environment()
    machine = ("python", "platform", "cpu", "instructions")
    rows = [(name, recorded[name], present[name]) for name in machine if name in recorded]  # a record of old has no instructions
    then, now = recorded["packages"], present["packages"]
    rows += [(name, then.get(name, "absent"), now.get(name, "absent")) for name in sorted(then | now)]
    return [f"{name}: {before} then, {after} now" for name, before, after in rows if before != after]


def read_lineage(root: Path, registry: Registry, version: "ModelVersion") -> dict[str, Any]:
    """Everything that is known of a version. None stands for what was not recorded."""
    tags = dict(version.tags)
    known = version.run_id and get_run(registry, version.run_id)  # one registered by hand has none, and a run can be deleted
    record = read_record(registry, version.run_id) if known else Record("", tags, {})
    environment, data, edits = record.read(ENVIRONMENT), record.read(DATA), record.read(EDITS)
    number = str(version.version)
    return {
        "model": registry.name,
        "version": number,
        "aliases": sorted(version.aliases),
        "model_digest": tags.get("model_digest"),
        "registered": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(version.creation_timestamp / 1000)),
        "run_id": version.run_id if known else None,
        "git_commit": record.commit,
        "git_dirty": None if record.commit is None else tags.get("git_dirty") == "true",
        "edits": None if edits is None else edits | {"bytes": len(record.files[DIFF])},
        "preset": tags.get("preset"),
        "params": record.params,
        "dvc_lock": record.lock
        and {name: {out["path"]: out["md5"] for out in entry.get("outs", [])} for name, entry in record.lock.items()},
        "data": data,
        "licences": _licences(record.params),
        "parents": [_parent(registry, stage, tags[f"parent_run.{stage}"]) for stage in STAGES if f"parent_run.{stage}" in tags],
        "environment": environment,
        "environment_differs": differing_packages(environment),
        "promotions": [row for row in read_history(root) if number in (row.get("version"), row.get("previous"))],
    }


def _licences(params: dict[str, Any] | None) -> dict[str, dict[str, str | None]] | None:
    """Of the data, by part, and of the weights that training started from; None where there are no params, or none that are understood."""
    if params is None:
        return None
    try:
        checked = check_params(params)
    except ParamsError:  # of a version with other settings
        return None
    return {
        "data": {name: part.licence for name, part in checked.data.parts.items()},
        "foundation": foundation_licences(checked),
    }


def _parent(registry: Registry, stage: str, run_id: str) -> dict[str, Any]:
    """A training run: what it started from, and its headline numbers; with those alone that are known if MLflow lost it."""
    run = get_run(registry, run_id)
    facts: dict[str, Any] = {"stage": stage, "run_id": run_id, "in_mlflow": run is not None, "starts_from": None, "metrics": {}}
    if run is None:
        return facts
    tags = run.data.tags
    shown = {name: value for name, value in run.data.metrics.items() if name in HEADLINES or name.startswith("held_out_loss_after")}
    start = tags.get("parent_stage")
    if start is not None and start not in STAGES:  # the champion of that time
        found = registry.by_digest(tags["parent_model_digest"])
        start = f"{start} (version {found.version})" if found else start
    return facts | {"starts_from": start, "metrics": shown}


def describe(facts: dict[str, Any]) -> Iterator[str]:
    """`read_lineage` for a person."""
    aliases = f" ({', '.join(facts['aliases'])})" if facts["aliases"] else ""
    yield f"{facts['model']} version {facts['version']}{aliases}"
    yield _row("weights", facts["model_digest"])
    yield _row("registered", f"{facts['registered']}, MLflow run {facts['run_id'] or UNKNOWN}")
    yield _row("commit", facts["git_commit"] and facts["git_commit"] + (", with uncommitted changes" if facts["git_dirty"] else ", clean"))
    yield from _edits(facts)
    values = facts["params"]
    yield _row("params", values and f"preset {facts['preset']}, digest {sha256_json(values)[:16]} (--json prints all)")
    lock = facts["dvc_lock"]
    yield _row("dvc.lock", lock and f"{sum(map(len, lock.values()))} outputs of {len(lock)} stages (--json prints all)")
    yield _row("data", None if facts["data"] is None else f"{len(facts['data'])} parts")
    for part, row in (facts["data"] or {}).items():
        yield f"    {part:<28} {row['samples']:>10,} samples  {row['split']:<10} {row['licence']:<14} id {row['dataset_id'][:16]}"
    yield _row("trained by", None if not facts["parents"] else f"{len(facts['parents'])} runs, first to last")
    for parent in facts["parents"]:
        numbers = ", ".join(f"{name} {value:.4g}" for name, value in sorted(parent["metrics"].items())) or "no numbers"
        start = f" from {parent['starts_from']}" if parent["starts_from"] else ""
        yield f"    {parent['stage']:<10} run {parent['run_id']}{start}: {numbers if parent['in_mlflow'] else 'MLflow no longer has it'}"
    yield from _environment(facts)
    yield from _licence_rows(facts["licences"])
    yield _row("promotions", "none" if not facts["promotions"] else f"{len(facts['promotions'])}")
    for row in facts["promotions"]:
        now = "made champion" if row["version"] == facts["version"] else f"replaced by version {row['version']}"
        yield f"    {row['time']} {row['event']}: {now}, by {row.get('by') or UNKNOWN}, reason: {row.get('reason') or UNKNOWN}"


def _row(name: str, text: str | None) -> str:
    return f"  {name:<12} {text or UNKNOWN}"


def _edits(facts: dict[str, Any]) -> Iterator[str]:
    edits = facts["edits"]
    if edits is None:
        yield _row("diff", None)
    elif edits["files"] or edits["left_out"]:
        yield _row("diff", f"{shown_size(edits['bytes'])} in {', '.join(edits['files']) or 'no file'} (--diff prints it)")
        if edits["left_out"]:
            yield _row("", f"too large to be stored: {', '.join(edits['left_out'])}")


def _environment(facts: dict[str, Any]) -> Iterator[str]:
    environment = facts["environment"]
    if environment is None:
        yield _row("environment", None)
        return
    yield _row(
        "environment", f"{len(environment['packages'])} packages, digest {environment['digest'][:16]}, Python {environment['python']}"
    )
    yield _row("", f"{environment['platform']}, {environment['cpu']}")
    if "instructions" in environment:
        yield _row("", environment["instructions"])
    if facts["environment_differs"]:
        yield _row("", "warning: the present environment is another one:")
        yield from (f"    {line}" for line in facts["environment_differs"])


def _licence_rows(licences: dict[str, dict[str, str | None]] | None) -> Iterator[str]:
    if licences is None:
        yield _row("licences", None)
        return
    yield _row("licences", f"data: {', '.join(sorted({str(name) for name in licences['data'].values()}))}")
    for name, licence in licences["foundation"].items():
        yield _row("", f"foundation, {name}: {licence or UNKNOWN}")
    if not licences["foundation"]:
        yield _row("", "foundation: random weights, no licence")


def describe_stranger(folder: Path, digest: str, registry: Registry) -> Iterator[str]:
    """An exported folder whose weights the registry does not know: what it says of itself."""
    yield f"{folder}: weights {digest}"
    yield f"  the registry ({registry.name} in {registry.client.tracking_uri}) knows no version with these weights: they were registered"
    yield "  elsewhere, or never. Commit, params and runs are not recorded here."
    if (folder / "provenance.json").is_file():
        yield "  its own provenance.json says:"
        yield from (f"    {line}" for line in json.dumps(read_json(folder / "provenance.json"), indent=1, sort_keys=True).splitlines())
