"""What the data room says of the catalogue: asked through its own command, for this room imports no more of it than its settings."""

import json
import subprocess
import sys
from pathlib import Path

from runtime import exits
from runtime.fetched import Wanted
from runtime.params import Params, ParamsError


def check_catalogue(root: Path, params: Params) -> None:
    """Raises ParamsError, before anything is started, for a part that its entry contradicts, or whose entry is refused."""
    if _named(params):
        _ask(root, "check")


def catalogue_wants(root: Path, params: Params, file: Path) -> list[Wanted]:
    """The data sets that the parts of `file` need from the network.

    Raises:
        ParamsError: a part that the catalogue's entry contradicts, or a catalogue that can't be used.
    """
    if not _named(params):
        return []
    wants = json.loads(_ask(root, "wants", "--params", str(file)))
    return [Wanted(**(wanted | {"allow_patterns": tuple(wanted["allow_patterns"])})) for wanted in wants]


def _named(params: Params) -> bool:
    return any(part.data_set is not None for part in params.data.parts.values())


def _ask(root: Path, *words: str) -> str:
    done = subprocess.run([sys.executable, "-m", "data", *words], cwd=root, capture_output=True, text=True, check=False)
    if done.returncode == exits.BAD_PARAMS:
        raise ParamsError(done.stderr.strip())
    if done.returncode != exits.DONE:
        raise RuntimeError(f"python -m data {' '.join(words)}: ended with code {done.returncode}:\n{done.stderr}")
    return done.stdout
