"""What a registered version must remember of its making: the edits beside its commit, the environment, the data and who licensed it."""

import platform
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestration.datasets import shards_folder
from runtime.environment import git, installed_packages, instructions, packages_digest
from runtime.files import write_atomic, write_json
from runtime.params import Params
from runtime.published import read_manifest

FOLDER = "lineage"  # of the MLflow run's artifacts
DIFF, EDITS, ENVIRONMENT, DATA = "diff.patch", "edits.json", "environment.json", "data.json"  # files in it
NAMES = ("-c", "core.quotePath=false")
LARGEST_NEW_FILE = 1_000_000  # bytes; a larger one that git does not hold is named, and not stored


@dataclass(frozen=True)
class Edits:
    """How the clone differs from its commit: a patch for `git apply`, and the new files that were too large for it."""

    patch: bytes
    left_out: tuple[str, ...]


def read_edits(root: Path) -> Edits:
    """Edits of tracked files and whole new files, those that git ignores and dvc.lock aside."""
    inside = (".", ":(exclude)dvc.lock")
    patch = git(root, *NAMES, "diff", "HEAD", "--binary", "--", *inside).stdout
    left_out = []
    new = git(root, "ls-files", "--others", "--exclude-standard", "-z", "--", *inside).stdout.decode()
    for name in filter(None, new.split("\0")):
        if name.endswith("/") or (root / name).lstat().st_size > LARGEST_NEW_FILE:  # a folder here is a git clone of its own
            left_out.append(name)
        else:
            patch += git(root, *NAMES, "diff", "--no-index", "--binary", "--", "/dev/null", name).stdout
    return Edits(patch, tuple(left_out))


def files_of_patch(patch: bytes) -> list[str]:
    """The files that a patch of `read_edits` changes."""
    heads = [line for line in patch.decode(errors="replace").splitlines() if line.startswith("diff --git ")]
    return sorted({head.rpartition(" b/")[2].rstrip('"') for head in heads})


def read_environment() -> dict[str, Any]:
    """Python, platform, CPU with the instructions it may use, and every installed package, with the digest of the packages."""
    packages = installed_packages()
    return {
        "digest": packages_digest(packages),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu(),
        "instructions": instructions(),
        "packages": packages,
    }


def environment_tags() -> dict[str, str]:
    facts = read_environment()
    return {"environment_digest": facts["digest"], "python": facts["python"], "platform": facts["platform"]}


def _cpu() -> str:
    """The processor's name: on another one, sums may round differently."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def read_data(root: Path, params: Params) -> dict[str, dict[str, Any]]:
    """Part -> dataset id, samples, split, task, licence, and the catalogue's data set, of every part that has a manifest."""
    facts = {}
    for name, part in params.data.parts.items():
        folder = shards_folder(root, name)
        if (folder / "manifest.json").is_file():
            manifest = read_manifest(folder)
            told = part.model_dump(mode="json", include={"split", "task", "licence", "source", "data_set"})
            facts[name] = told | {"dataset_id": manifest["dataset_id"], "samples": manifest["samples"]}
    return facts


def foundation_licences(params: Params) -> dict[str, str | None]:
    """What training started from -> its licence as params.yaml names it; None where it names none."""
    foundation = params.foundation
    if foundation.source == "hub":
        return {f"{part} {weights.repo}@{weights.revision}": weights.licence for part, weights in foundation.hub.items()}
    return {f"folder {foundation.path}": None} if foundation.source == "folder" else {}


def log_provenance(root: Path, params: Params) -> None:
    """Put it on the active MLflow run, as artifacts."""
    import mlflow

    edits = read_edits(root)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_json(folder / ENVIRONMENT, read_environment())
        write_json(folder / DATA, read_data(root, params))
        write_json(folder / EDITS, {"files": files_of_patch(edits.patch), "left_out": edits.left_out})
        write_atomic(folder / DIFF, edits.patch)
        mlflow.log_artifacts(name, FOLDER)
