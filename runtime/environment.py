"""Environment variables that hold in every process of the project: no network, no telemetry, no unsafe decoding, quiet threads."""

import os

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
