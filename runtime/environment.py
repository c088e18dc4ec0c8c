"""What surrounds a process: the variables that hold in every one of the project (no network, no telemetry, no unsafe decoding), and git."""

import os
import subprocess
from pathlib import Path

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
PREFERRED = {"OMP_WAIT_POLICY": "PASSIVE"}  # idle threads sleep, so that two processes share two cores


def set_environment() -> None:
    """Call before any heavy import. What guards safety is set; what tunes speed gives way to the caller's own value."""
    os.environ.update(ENVIRONMENT)
    for name, value in PREFERRED.items():
        os.environ.setdefault(name, value)


def git_state(root: Path) -> dict[str, str]:
    """The commit that the clone stands on, and whether files differ from it."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    return {"git_commit": git("rev-parse", "HEAD") or "none", "git_dirty": str(bool(git("status", "--porcelain"))).lower()}
