"""A whole project of seconds: the smoke recipe, smaller still, with its own data already built."""

import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
import yaml

from runtime.exits import StopRequest
from runtime.stage import StageRun, begin_stage

REPO = Path(__file__).parents[2]
CODE = ("data", "model", "training", "runtime")


def nano_params() -> dict:
    """The smoke preset with fewer layers and samples."""
    params = yaml.safe_load((REPO / "presets" / "smoke.yaml").read_text())
    params["model"]["vlm"] |= {"layers": 6, "stacked_layers": [5, 4, 3, 2, 1, 0]}
    params["model"]["vlm"]["vision"] |= {"depth": 2, "full_attention_blocks": [1]}
    params["model"]["dit"] |= {"layers": 3, "dual_attention_layers": 2}
    params["model"]["connector"] |= {"layers": 2, "num_think_tokens": 4}
    for part in params["data"]["parts"].values():
        part["samples"] = min(part["samples"], 24)
    params["data"]["shard_samples"] = 9
    params["alignment"] |= {"steps": 4, "checkpoint_every": 2}
    params["sft"] |= {"steps": 4, "checkpoint_every": 2, "lora": {"rank": 4, "alpha": 8.0, "dropout": 0.1}}
    params["launch"] |= {"threads": 1}
    return params


def begin(root: Path, name: str, stop: StopRequest | None = None) -> AbstractContextManager[StageRun]:
    return begin_stage(root, name, StopRequest() if stop is None else stop)


def make_project(root: Path, params: dict) -> Path:
    """A clone in small: params, recipe, code, built data and foundation."""
    from data.stages import run_mixture, run_shards
    from training.foundation import run_foundation
    from training.latents import run_latents

    root.mkdir(parents=True, exist_ok=True)
    for name in CODE:
        (root / name).symlink_to(REPO / name)
    (root / "foundation").mkdir()
    (root / "foundation" / "params.yaml").write_text((REPO / "foundation" / "params.yaml").read_text())
    for name in ("clip", "tokenizer"):
        (root / "foundation" / name).symlink_to(REPO / "foundation" / name)
    for name in ("dvc.yaml", "takedown.txt"):
        shutil.copyfile(REPO / name, root / name)
    (root / "params.yaml").write_text(yaml.safe_dump(params))
    for part in params["data"]["parts"]:
        with begin(root, f"shards@{part}") as run:
            run_shards(run)
    for stage in ("alignment", "sft", "mr_grpo"):
        with begin(root, f"mixture@{stage}") as run:
            run_mixture(run)
    with begin(root, "foundation") as run:
        run_foundation(run)
    with begin(root, "latents") as run:
        run_latents(run)
    return root


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A built project that no test changes."""
    torch.set_num_threads(1)
    return make_project(tmp_path_factory.mktemp("built") / "project", nano_params())


@pytest.fixture
def project(built: Path, tmp_path: Path) -> Path:
    """A copy of the built project for one test to train in."""
    copy = tmp_path / "project"
    shutil.copytree(built, copy, symlinks=True, ignore=shutil.ignore_patterns("runs"))
    return copy


@pytest.fixture
def edit_params() -> Callable[[Path, Callable[[dict], None]], None]:
    def edit(root: Path, change: Callable[[dict], None]) -> None:
        params = yaml.safe_load((root / "params.yaml").read_text())
        change(params)
        (root / "params.yaml").write_text(yaml.safe_dump(params))

    return edit
