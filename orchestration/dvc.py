"""DVC, as a command: is a stage's output up to date, record it, and what did `dvc.lock` record."""

import configparser
import json
import math
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any, cast

from runtime.exits import Plain
from runtime.recipe import Stage
from runtime.recorded import recorded_outputs

BUSY = ("Unable to acquire lock", "is busy, it is being blocked by", "Unable to acquire rwlock")
WAITS = (0.5, 1, 2, 4, 8, 15, 30)  # seconds between tries while another DVC command holds the clone

SURVEY_SECONDS = 30


class DvcError(Plain):
    """DVC refused, or is not installed."""


def find_dvc(root: Path) -> str:
    """The dvc program: $DVC_BIN, else `.venv-dvc/bin/dvc` in the clone, else `dvc` on PATH."""
    if given := os.environ.get("DVC_BIN"):
        if not os.access(given, os.X_OK):
            raise DvcError(f"DVC_BIN is {given}, which is no program. Unset it, or point it at dvc.")
        return given
    own = root / ".venv-dvc" / "bin" / "dvc"
    found = str(own) if os.access(own, os.X_OK) else shutil.which("dvc")
    if found is None:
        raise DvcError(f"dvc is not installed: expected {own} or `dvc` on PATH. Run `make setup`, or set DVC_BIN.")
    return found


def dvc_environment(root: Path) -> dict[str, str]:
    """What a dvc command at `root` is given: no word to anyone, and nothing left outside the clone."""
    return {"DVC_NO_ANALYTICS": "1", "DVC_SITE_CACHE_DIR": str(root / ".dvc" / "tmp" / "site")}


def dvc_config(root: Path) -> dict[str, dict[str, str]]:
    """Section -> settings of .dvc/config and .dvc/config.local, as DVC merges them."""
    parser = configparser.ConfigParser(interpolation=None)
    parser.read([root / ".dvc" / "config", root / ".dvc" / "config.local"])
    return {name.strip("'"): {key: value.strip("\"'") for key, value in parser[name].items()} for name in parser.sections()}


def cache_folder(root: Path) -> Path:
    """Where DVC keeps the objects of the clone."""
    return root / ".dvc" / dvc_config(root).get("cache", {}).get("dir", "cache")


class DvcCommand:
    """The commands of DVC that the assets need, run at `root`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._survey: tuple[float, dict[str, list[Any]]] | None = (
            -math.inf,
            {},
        )  # one status of all stages; None once this process recorded one

    def changes(self, name: str) -> list[Any]:
        """What `dvc status` says of one stage; empty if its params, inputs, code, command and outputs are as recorded."""
        return json.loads(self._run("status", "--json", name) or "{}").get(name, [])

    def is_clean(self, name: str) -> bool:
        """Whether a stage may be skipped. DVC starts slowly, so it is not asked about a stage that was never recorded, and the first calls
        share one status of all stages."""
        if name not in self.recorded():
            return False
        return not (self.changes(name) if self._survey is None else self._all_changes().get(name))

    def clean_stages(self) -> set[str]:
        """The stages that may be skipped; of a clone where nothing was recorded DVC is not asked."""
        recorded = self.recorded()
        if not recorded:
            return set()
        changed = self._all_changes()
        return {name for name in recorded if not changed.get(name)}

    def _all_changes(self) -> dict[str, list[Any]]:
        """One status of all stages, shared for SURVEY_SECONDS as long as this process records none."""
        if self._survey is not None and time.monotonic() - self._survey[0] <= SURVEY_SECONDS:
            return self._survey[1]
        changes = json.loads(self._run("status", "--json") or "{}")
        if self._survey is not None:
            self._survey = (time.monotonic(), changes)
        return cast(dict[str, list[Any]], changes)

    def commit(self, stage: Stage) -> None:
        """Record the stage's inputs and outputs in dvc.lock, and its outputs in the cache."""
        self.record(stage.name)

    def record(self, address: str) -> None:
        """`commit` for a stage of any dvc.yaml: its name in ours, or `folder/dvc.yaml:name`."""
        self._survey = None
        self._run("commit", "--force", address)

    def lock_md5(self, stage: Stage) -> str:
        """Content hash of the stage's first output, as recorded.

        Raises:
            DvcError: dvc.lock does not know the stage.
        """
        md5 = self.recorded().get(stage.name)
        if md5 is None:
            raise DvcError(f"dvc.lock holds no output of {stage.name}: record it with `dvc repro {stage.name}` or `deepgen run`.")
        return md5

    def collect_garbage(self, dry: bool) -> str:
        """Drop objects from the cache that neither the workspace nor dvc.lock names, or with `dry` only tell of them; DVC's own words."""
        return self._run("gc", "--workspace", "--force", *(["--dry"] if dry else []))

    def recorded(self) -> dict[str, str]:
        """Stage name -> content hash of its first output, for every stage in dvc.lock."""
        return {name: next(iter(outs.values())) for name, outs in recorded_outputs(self.root).items() if outs}

    def _run(self, *arguments: str) -> str:
        command = [find_dvc(self.root), *arguments]
        for wait in (*WAITS, None):
            # A session of its own: Ctrl-C at the terminal must not cut a commit in two.
            process = subprocess.Popen(
                command,
                cwd=self.root,
                env=self._environment(),
                text=True,
                start_new_session=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
            try:
                output, errors = process.communicate()
            except BaseException:
                process.wait()
                raise
            if process.returncode == 0:
                return output
            if wait is None or not any(sign in errors for sign in BUSY):
                break
            time.sleep(wait)
        raise DvcError(f"`dvc {' '.join(arguments)}` failed ({process.returncode}): {errors.strip() or output.strip()}")

    def _environment(self) -> dict[str, str]:
        return os.environ | dvc_environment(self.root)
