"""What dvc.lock records of the outputs, held against their bytes.

DVC trusts its cache: what it restores from a damaged one, by checkout or pull, it calls up to date. So whoever reads an output hashes it.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path

import yaml

from runtime.exits import Plain
from runtime.recipe import Stage, overlap

IGNORED = re.compile(r"__pycache__$|.*\.pyc$|\..*\.(tmp|old)$")  # as .dvcignore has it


class NotAsRecorded(Plain):
    """An output is not the one that dvc.lock records, or dvc.lock can't be read."""


def recorded_paths(root: Path, kinds: tuple[str, ...] = ("deps", "outs")) -> dict[str, dict[str, str]]:
    """Stage -> path -> its md5, of the dependencies and outputs of every stage of dvc.lock; nothing where there is no dvc.lock.

    Raises:
        NotAsRecorded: dvc.lock is damaged.
    """
    path = root / "dvc.lock"
    if not path.is_file():
        return {}
    try:
        stages = (yaml.load(path.read_text(), yaml.CSafeLoader) or {}).get("stages", {})  # libyaml: there may be thousands of parts
        return {name: {row["path"]: row["md5"] for kind in kinds for row in entry.get(kind, [])} for name, entry in stages.items()}
    except (yaml.YAMLError, AttributeError, KeyError, TypeError) as error:
        raise NotAsRecorded(
            f"dvc.lock can't be read ({str(error).splitlines()[0]}). Put back one that was whole (git checkout dvc.lock), "
            "or remove it: `dvc repro` then writes it anew."
        ) from None


def recorded_outputs(root: Path) -> dict[str, dict[str, str]]:
    """`recorded_paths` of the outputs alone, each stage's in their order."""
    return recorded_paths(root, ("outs",))


def md5_of(path: Path) -> str:
    """DVC's own hash of a file, or of a folder's relative names and bytes."""
    if path.is_file():
        with open(path, "rb") as handle:
            return hashlib.file_digest(handle, "md5").hexdigest()
    rows = []
    for folder, folders, files in os.walk(path):
        folders[:] = [name for name in folders if not IGNORED.match(name)]
        rows += [Path(folder, name) for name in files if not IGNORED.match(name)]
    listed = sorted(({"md5": md5_of(file), "relpath": file.relative_to(path).as_posix()} for file in rows), key=lambda row: row["relpath"])
    return hashlib.md5(json.dumps(listed, sort_keys=True).encode()).hexdigest() + ".dir"


def differing_outputs(root: Path, stages: Iterable[str]) -> dict[str, str]:
    """Path -> its stage, for those outputs of recorded stages that are there and hold other bytes than dvc.lock says."""
    names = list(stages)
    recorded = recorded_outputs(root) if names else {}  # of thousands of parts, which read nothing, none reads the long lock either
    return {
        path: name
        for name in names
        for path, md5 in recorded.get(name, {}).items()
        if (root / path).exists() and md5_of(root / path) != md5
    }


def check_inputs(root: Path, stage: Stage, stages: dict[str, Stage]) -> None:
    """Raises NotAsRecorded unless what `stage` reads from recorded stages is what they were recorded with."""
    read = [other.name for other in stages.values() if any(overlap(out, path) for out in other.outs for path in stage.inputs)]
    for path, name in differing_outputs(root, read).items():
        raise NotAsRecorded(
            f"{stage.name}: its input {path} is not what dvc.lock records. If it came out of a damaged cache or was edited, make it "
            f"anew: `dvc repro --force --single-item {name}`. If you made it so by hand, record it: `dvc commit {name}`."
        )
