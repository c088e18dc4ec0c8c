"""What surrounds a process: the variables that hold in every one of the project (no network, no telemetry, no unsafe decoding), the
packages installed, and git."""

import os
import re
import subprocess
import tempfile
from collections.abc import Iterable
from functools import cache
from importlib.metadata import Distribution, distributions
from pathlib import Path

from runtime.files import sha256_json

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DIFFUSERS_DISABLE_REMOTE_CODE": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    "DAGSTER_DISABLE_TELEMETRY": "1",
    "DVC_NO_ANALYTICS": "1",
    "WDS_SECURE": "1",  # webdataset reads it at import: tar members and URLs never run code
}
# torch, MKL and oneDNN choose instructions by the CPU, and with them the order of sums. Held to these, a run is to have the same bits
# on every x86 CPU with AVX2; their own choice is faster, by half and more (LOG.md).
SAME_INSTRUCTIONS = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_CBWR": "COMPATIBLE"}
PREFERRED = {
    "OMP_WAIT_POLICY": "PASSIVE",  # idle threads sleep, so that two processes share two cores
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",  # one for every file, however small
}


def set_environment() -> None:
    """Call before any heavy import. What guards safety is set; the rest gives way to the caller's own value."""
    os.environ.update(ENVIRONMENT)
    for name, value in (PREFERRED | (SAME_INSTRUCTIONS if has_avx2() else {})).items():
        os.environ.setdefault(name, value)
    # torch.compile's cache does not ask which instructions its code was made for: shared, it gave wrong numbers and broken memory.
    cache = f"torchinductor-{os.getuid()}-{os.environ.get('ATEN_CPU_CAPABILITY', 'own')}"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(tempfile.gettempdir()) / cache))


def has_avx2(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether Linux says so; elsewhere nothing is known, and nothing is held."""
    return cpuinfo.is_file() and "avx2" in cpuinfo.read_text().split()


def instructions() -> str:
    """Which of the CPU's instructions torch, oneDNN and MKL were told to use: with others a run has other bits."""
    return " ".join(f"{name}={os.environ.get(name, 'own')}" for name in SAME_INSTRUCTIONS)


@cache
def installed_packages() -> dict[str, str]:
    """`packages_of` what this interpreter has. Read once: it takes a third of a second."""
    return packages_of(distributions())


def packages_of(found: Iterable[Distribution]) -> dict[str, str]:
    """Name -> version; names spelt as packaging normalises them."""
    packages: dict[str, str] = {}
    for distribution in found:
        packages.setdefault(normalised(distribution.name), distribution.version)  # of two the first on the path is imported
    return packages


def normalised(name: str) -> str:
    return re.sub("[-_.]+", "-", name).lower()


def packages_digest(packages: dict[str, str]) -> str:
    """The digest of an environment: of its packages' names and versions, in order."""
    return sha256_json(sorted(packages.items()))


def git(root: Path, *arguments: str) -> "subprocess.CompletedProcess[bytes]":
    """A git command at `root`, to its end, whatever its exit code."""
    return subprocess.run(["git", *arguments], cwd=root, capture_output=True, check=False)


def git_state(root: Path) -> dict[str, str]:
    """The commit that the clone stands on, and whether files differ from it. dvc.lock does not count: every run writes it."""

    def said(*arguments: str) -> str:
        done = git(root, *arguments)
        return done.stdout.decode().strip() if done.returncode == 0 else ""

    dirty = said("status", "--porcelain", "--", ".", ":(exclude)dvc.lock")
    return {"git_commit": said("rev-parse", "HEAD") or "none", "git_dirty": str(bool(dirty)).lower()}
