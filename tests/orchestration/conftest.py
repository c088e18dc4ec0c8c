"""A toy project: a clone of its own with git, DVC, the real stage names, and stages that take no time."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from orchestration.assets import build_assets
from orchestration.checks import build_checks
from orchestration.dvc import DvcCommand, find_dvc
from orchestration.stage_process import StageProcess
from runtime.params import Params, load_params, parse_params
from runtime.recipe import Stage, load_stages

PROJECT = Path(__file__).resolve().parent.parent.parent
HERE = Path(__file__).resolve().parent
DEEPGEN = str(Path(sys.executable).parent / "deepgen")
SCRATCH = {"DAGSTER_HOME", "MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID", "DEEPGEN_TRACEBACK"}


@dataclass
class Toy:
    """The toy clone at `root`."""

    root: Path

    @property
    def params(self) -> Params:
        return load_params(self.root / "params.yaml")

    @property
    def stages(self) -> dict[str, Stage]:
        return load_stages(self.root, parse_params((self.root / "params.yaml").read_text()))

    @property
    def dvc(self) -> DvcCommand:
        return DvcCommand(self.root)

    def edit(self, old: str, new: str, file: str = "params.yaml") -> None:
        """Replace text that must be there."""
        path = self.root / file
        text = path.read_text()
        assert old in text, f"{file} has no {old!r}"
        path.write_text(text.replace(old, new))

    def environment(self, **more: str) -> dict[str, str]:
        return {name: value for name, value in os.environ.items() if name not in SCRATCH} | more

    def deepgen(self, *arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [DEEPGEN, *arguments], cwd=self.root, env=self.environment(**environment), capture_output=True, text=True, timeout=240
        )

    def start(self, *arguments: str, **environment: str) -> "subprocess.Popen[str]":
        """`deepgen` in the background, its lines in run.log, in a session of its own as from a terminal."""
        with open(self.root / "run.log", "a") as log:
            return subprocess.Popen(
                [DEEPGEN, *arguments],
                cwd=self.root,
                env=self.environment(**environment),
                stdout=log,
                stderr=log,
                text=True,
                start_new_session=True,
            )

    def wait_for(self, words: str, seconds: float = 60) -> str:
        """The log, once `words` are in it."""
        return wait_until(lambda: words in self.log and self.log, seconds, f"{words!r} in run.log")

    @property
    def log(self) -> str:
        path = self.root / "run.log"
        return path.read_text() if path.exists() else ""

    def materialize(self, *names: str, instance: dg.DagsterInstance | None = None) -> dg.ExecuteInProcessResult:
        """Materialize assets in this process, all partitions; failures are in the result. Remembered where an instance is given."""
        stages = self.stages
        keys = [stage.key for stage in stages.values() if stage.group == "shards"]
        tags = {"dagster/asset_partition_range_start": str(keys[0]), "dagster/asset_partition_range_end": str(keys[-1])}
        resources = {"stage_process": StageProcess(self.root), "dvc": self.dvc}
        definitions = [*build_assets(self.root, stages), *build_checks(self.root, stages)]
        with contextlib.nullcontext(instance) if instance else dg.DagsterInstance.ephemeral() as remembering:
            return dg.materialize(
                definitions, selection=list(names), resources=resources, instance=remembering, raise_on_error=False, tags=tags
            )


def cached(result: dg.ExecuteInProcessResult, name: str) -> list[bool]:
    """Whether each materialization of an asset was a skip."""
    return [bool(event.metadata["cached"].value) for event in result.asset_materializations_for_node(name)]


def failure_text(result: dg.ExecuteInProcessResult, name: str) -> str:
    """What the failed asset says."""
    data = result.failure_data_for_node(name)
    assert data is not None and data.user_failure_data is not None, f"{name} did not fail with a message of ours"
    return str(data.user_failure_data.description)


def wait_until(condition: Any, seconds: float, what: str) -> Any:
    """The first true value of `condition()`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.1)
    raise AssertionError(f"waited {seconds} s in vain for {what}")


def make_toy(root: Path) -> Toy:
    (root / ".dvc").mkdir(parents=True)
    for name in (".dvc/config", ".dvc/.gitignore", ".dvcignore", ".gitignore"):
        shutil.copy(PROJECT / name, root / name)
    shutil.copytree(PROJECT / "presets", root / "presets")
    shutil.copy(PROJECT / "presets" / "smoke.yaml", root / "params.yaml")
    shutil.copy(HERE / "toy_dvc.yaml", root / "dvc.yaml")
    shutil.copy(HERE / "toy.py", root / "toy.py")
    git = ["git", "-c", "user.name=toy", "-c", "user.email=toy@example.org"]
    for arguments in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "toy"]):
        subprocess.run([*git, *arguments], cwd=root, check=True)
    return Toy(root)


@pytest.fixture(scope="session", autouse=True)
def _tools() -> Iterator[None]:
    """DVC of this project, for clones elsewhere; no store but the clone's own."""
    kept = {name: os.environ.pop(name) for name in SCRATCH if name in os.environ}
    path = os.environ.get("PATH", os.defpath)
    os.environ["DVC_BIN"] = find_dvc(PROJECT)
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), path])
    yield
    os.environ.update(kept | {"PATH": path})


@pytest.fixture
def toy(tmp_path: Path) -> Toy:
    return make_toy(tmp_path / "toy")


@pytest.fixture(scope="session")
def _shards_once(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    toy = make_toy(tmp_path_factory.mktemp("shards") / "toy")
    assert toy.materialize("shards", "mixture_alignment").success
    return toy


@pytest.fixture
def with_shards(_shards_once: Toy, tmp_path: Path) -> Toy:
    """A toy with its shards and its first mixture built and recorded."""
    shutil.copytree(_shards_once.root, tmp_path / "toy", symlinks=True)
    return Toy(tmp_path / "toy")


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    """A toy on which `deepgen run` has gone through once: read it, or copy it."""
    toy = make_toy(tmp_path_factory.mktemp("finished") / "toy")
    done = toy.deepgen("run")
    assert done.returncode == 0, done.stdout + done.stderr
    (toy.root / "first_run.txt").write_text(done.stdout)
    return toy


@pytest.fixture
def copy(finished: Toy, tmp_path: Path) -> Toy:
    """A finished toy, moved: its stores follow."""
    shutil.copytree(finished.root, tmp_path / "copy", symlinks=True)
    return Toy(tmp_path / "copy")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def stop(process: "subprocess.Popen[str]", number: int = signal.SIGINT) -> int:
    """Signal the whole process group, as a terminal does on Ctrl-C; the exit code."""
    os.killpg(process.pid, number)
    return process.wait(timeout=60)


def stage_processes(root: Path) -> list[int]:
    """Processes that run a toy stage of this clone."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if b"toy.py" in (folder / "cmdline").read_bytes() and (folder / "cwd").resolve() == root.resolve():
                found.append(int(folder.name))
        except OSError:
            continue
    return found
