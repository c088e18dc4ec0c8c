"""Picture lists (an address a picture: LAION, RedCaps) through img2dataset, guarded, in an environment of its own."""

import os
import subprocess
from pathlib import Path

from runtime import guarded_img2dataset
from runtime.fetched import FetchRefused

ENVIRONMENT = ".venv-img2dataset"  # its pins (webdataset below 0.3) exclude ours
INSTALL = f"python3 -m venv {ENVIRONMENT} && {ENVIRONMENT}/bin/pip install img2dataset==1.47.0"
FORMATS = {f"{kind}{packed}" for kind in ("txt", "csv", "tsv", "json", "jsonl") for packed in ("", ".gz")} | {"parquet"}
OPT_OUTS = '["noai", "noimageai", "noindex", "noimageindex"]'  # a site's X-Robots-Tag that forbids this use
INHERITED = ("PATH", "HOME", "LANG", "TMPDIR", "SSL_CERT_FILE", "PYTHONPATH")  # no proxy, which would connect in our place, and no secret


def fetch_urls(root: Path, urls: Path, out: Path, url_col: str, caption_col: str | None, processes: int) -> int:
    """img2dataset's exit code. Shards that are done are kept and not loaded again.

    Raises:
        FetchRefused: it is not installed, or the list is of no known format.
    """
    python = root / ENVIRONMENT / "bin" / "python"
    if not python.exists():
        raise FetchRefused(f"{ENVIRONMENT} is missing: img2dataset can't live beside our packages. Make it: {INSTALL}")
    environment = {name: os.environ[name] for name in INHERITED if name in os.environ}
    environment |= {"WANDB_MODE": "disabled", "NO_ALBUMENTATIONS_UPDATE": "1"}
    command = [str(python), "-P", str(Path(guarded_img2dataset.__file__).resolve())]
    return subprocess.run(command + arguments(urls, out, url_col, caption_col, processes), env=environment, check=False).returncode


def arguments(urls: Path, out: Path, url_col: str, caption_col: str | None, processes: int) -> list[str]:
    """Pictures stay the bytes that the sites sent, undecoded: decoding is the data stages' work, and theirs is guarded."""
    kind = next((kind for kind in sorted(FORMATS, key=len, reverse=True) if urls.name.endswith(f".{kind}")), None)
    if kind is None:
        raise FetchRefused(f"{urls}: a list is one of {', '.join(sorted(FORMATS))}, told by its ending.")
    options = {
        "url_list": str(urls.resolve()),
        "input_format": kind,
        "output_folder": str(out.resolve()),
        "output_format": "webdataset",
        "processes_count": str(processes),
        "thread_count": "32",
        "number_sample_per_shard": "10000",
        "timeout": "10",
        "retries": "1",
        "compute_hash": "sha256",
        "incremental_mode": "incremental",
        "resize_mode": "no",
        "disable_all_reencoding": "True",
        "extract_exif": "False",
        "enable_wandb": "False",
        "disallowed_header_directives": OPT_OUTS,
    }
    if not kind.startswith("txt"):
        options |= {"url_col": url_col} | ({"caption_col": caption_col} if caption_col else {})
    return [f"--{name}={value}" for name, value in options.items()]
