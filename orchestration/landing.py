"""New data that lands as PART/SNAPSHOT/ in the folder `retrain.landing`: noticed once it is whole and still, then its part is built.

Whoever copies writes _SUCCESS last. A part follows its newest snapshot, by name. Landed files are read, and never moved or removed.
"""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dagster as dg

from data.config import LANDED
from orchestration.pipeline_run import AlreadyRunning, in_progress, only_one
from runtime.files import folder_files, sha256_bytes, sha256_file, sha256_json
from runtime.params import Params, load_params

LAND = "land"
SNAPSHOT_TAG = "deepgen/snapshot"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
WHOLE_BYTES, EDGE_BYTES = 64 * 2**20, 2**20


@dataclass(frozen=True)
class Request:
    """A part is to be built from a snapshot. key: one landing, however often it is seen."""

    part: str
    snapshot: str
    key: str


@dataclass(frozen=True)
class Found:
    """What one look at the landing folder leads to. after: what the next look must know, by part."""

    request: Request | None
    words: tuple[str, ...]
    after: dict[str, dict[str, Any]]


def look_at_landing(root: Path, params: Params, before: dict[str, dict[str, Any]], busy: Callable[[], str | None]) -> Found:
    """At most one request a look, so that params.yaml is changed by one run at a time; the others' turn comes at later looks."""
    assert params.retrain.landing is not None, "there is no sensor without a landing folder"
    landing, request, words, after = root / params.retrain.landing, None, [], dict(before)
    if not landing.is_dir():
        return Found(None, (f"retrain.landing: {landing} is no folder",), after)
    for folder in _folders(landing):
        part = folder.name
        snapshots = [entry for entry in _folders(folder) if NAME.fullmatch(entry.name)]
        whole = [entry for entry in snapshots if (entry / LANDED).is_file()]
        words += [f"{part}/{entry.name}: no {LANDED} yet" for entry in snapshots if entry not in whole]
        if not whole:
            continue
        newest, seen = whole[-1], before.get(part, {})
        listing = _listing(newest)
        if seen.get("listing") != listing:
            after[part] = {"listing": listing, "content": seen.get("content"), "settled": False}
            words.append(f"{part}/{newest.name}: waits for a second look that finds the same files")
        elif not seen["settled"]:
            if part not in params.data.parts:
                words.append(_unknown(landing, part, newest))
                after[part] = seen | {"settled": True}
            elif reason := (f"{request.part} comes first" if request else busy()):
                words.append(f"{part}/{newest.name}: waits, for {reason}")
            else:
                content = content_digest(newest)
                if content == seen["content"]:
                    words.append(f"{part}/{newest.name}: the same content as before, {content[:12]}")
                else:
                    request = Request(part, newest.name, f"{part}:{content[:16]}:{listing[:16]}")
                after[part] = {"listing": listing, "content": content, "settled": True}
    return Found(request, tuple(words), after)


def _folders(folder: Path) -> list[Path]:
    """Sorted by name; no links, which might lead out of it."""
    return sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.is_symlink() and not entry.name.startswith("."))


def _unknown(landing: Path, part: str, snapshot: Path) -> str:
    return (
        f"{part}/{snapshot.name}: params.yaml has no part {part!r}, so nothing is built. Make it one: "
        f"deepgen data add {landing / part / snapshot.name} --name {part} --task ... --licence ..."
    )


def _listing(snapshot: Path) -> str:
    """Changes while files are copied: names, sizes and times of all of them, hidden ones too."""
    return sha256_json([(str(file.relative_to(snapshot)), *_size_and_time(file)) for file in sorted(snapshot.rglob("*"))])


def _size_and_time(file: Path) -> tuple[int, int]:
    facts = file.lstat()
    return facts.st_size, facts.st_mtime_ns


def content_digest(snapshot: Path) -> str:
    """Equal for equal names and bytes, whenever they were copied. Of files too large to be read at every change it takes size and both
    ends: what is built is held to the sha256 of all of them, which the run pins."""
    return sha256_json([(str(file.relative_to(snapshot)), file.stat().st_size, _digest(file)) for file in folder_files(snapshot)])


def _digest(file: Path) -> str:
    if file.stat().st_size <= WHOLE_BYTES:
        return sha256_file(file)
    with open(file, "rb") as handle:
        head = handle.read(EDGE_BYTES)
        handle.seek(-EDGE_BYTES, 2)
        return sha256_bytes(head + handle.read())


def build_landing(root: Path, params: Params) -> "tuple[list[Any], list[dg.SensorDefinition]]":
    """The job that builds a landed part and the sensor that asks for it; neither where no landing folder is set."""
    if params.retrain.landing is None:
        return [], []
    known = set(params.data.parts)
    job = dg.define_asset_job(LAND, dg.AssetSelection.assets("shards"), description="Points a part at what landed, and builds its shards.")

    @dg.sensor(
        job=job,
        name="data_landed",
        minimum_interval_seconds=60,
        default_status=dg.DefaultSensorStatus.STOPPED,
        description=f"Builds a part anew when a whole snapshot of it lies in {params.retrain.landing}/PART/SNAPSHOT/. Trains nothing.",
    )
    def landed(context: dg.SensorEvaluationContext) -> dg.SensorResult:
        now = load_params(root / "params.yaml")
        found = look_at_landing(root, now, json.loads(context.cursor or "{}"), lambda: in_progress(root, context.instance))
        words = "; ".join(found.words) or "nothing new has landed"
        if found.request is None:
            return dg.SensorResult(skip_reason=words, cursor=json.dumps(found.after))
        if found.request.part not in known:
            return dg.SensorResult(
                skip_reason=f"{found.request.part}: Dagster does not know this part yet; reload its code location, in the UI"
            )
        context.log.info(words)
        wanted = dg.RunRequest(run_key=found.request.key, partition_key=found.request.part, tags={SNAPSHOT_TAG: found.request.snapshot})
        return dg.SensorResult(run_requests=[wanted], cursor=json.dumps(found.after))

    return [job], [landed]


def land_if_asked(context: dg.AssetExecutionContext, root: Path) -> None:
    """In a run of the job `land`: point its part at the snapshot that the run names, through the data room's own command.

    Raises:
        dagster.Failure: the data room refuses, or `deepgen run` reads params.yaml meanwhile. Nothing was changed.
    """
    snapshot = context.run.tags.get(SNAPSHOT_TAG)
    if snapshot is None:
        return
    by_hand = f"By hand: python -m data land {context.partition_key} {snapshot}, then deepgen run."
    try:
        with only_one(root):
            command = [sys.executable, "-m", "data", "land", context.partition_key, snapshot]
            done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    except AlreadyRunning as error:
        raise dg.Failure(f"{error} {by_hand}", allow_retries=False) from None
    if done.returncode:
        raise dg.Failure(f"{done.stderr.strip()} {by_hand}", allow_retries=False)
    context.log.info(done.stdout.strip())
