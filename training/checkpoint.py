"""Checkpoints that are whole or absent, hashed when written and checked when read."""

import json
import logging
import os
import random
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from runtime.exits import Plain
from runtime.files import fsync_tree, read_json, sha256_file, write_json
from training.optim import EMA

FORMAT = 1
logger = logging.getLogger(__name__)


class CheckpointCorrupt(Plain):
    """A file of a checkpoint is missing or not the one that was written."""


@dataclass
class TrainState:
    """All that must survive an interruption.

    step counts optimizer steps; data is the loader's own state (dataset ids, mixture hash, seed, position); history holds the logged
    series, so that a resumed curve is whole.
    """

    trained: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    ema: EMA | None = None
    step: int = 0
    data: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, float]] = field(default_factory=list)

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """By file: weights, optimizer moments, the average, and the global generators (dropout draws from torch's)."""
        moments: dict[str, Tensor] = {}
        for index, slots in self.optimizer.state_dict()["state"].items():
            moments |= {f"{index}.{slot}": torch.as_tensor(value) for slot, value in slots.items()}
        files = {
            "weights": {name: p.detach() for name, p in self.trained.items()},
            "optimizer": moments,
            "random": {"torch": torch.get_rng_state(), "numpy": torch.from_numpy(numpy_state()[1].astype(np.int64))},
        }
        if torch.cuda.is_available():
            files["random"]["cuda"] = torch.cuda.get_rng_state()
        if self.ema is not None:
            files["ema"] = self.ema.average
        return files

    def load(self, tensors: dict[str, dict[str, Tensor]], facts: dict[str, Any]) -> None:
        stored, wanted = set(tensors["weights"]), set(self.trained)
        if stored != wanted:
            raise CheckpointCorrupt(f"weights: missing {sorted(wanted - stored)[:5]}, surplus {sorted(stored - wanted)[:5]}")
        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter.copy_(tensors["weights"][name])
        current = self.optimizer.state_dict()
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors["optimizer"].items():
            index, _, slot = key.partition(".")
            state.setdefault(int(index), {})[slot] = value
        current["state"] = state
        self.optimizer.load_state_dict(current)
        torch.set_rng_state(tensors["random"]["torch"])
        np.random.set_state(("MT19937", tensors["random"]["numpy"].numpy().astype(np.uint32), *facts["random"]["numpy"]))
        version, words, gauss = facts["random"]["python"]
        random.setstate((version, tuple(words), gauss))
        if torch.cuda.is_available() and "cuda" in tensors["random"]:
            torch.cuda.set_rng_state(tensors["random"]["cuda"])
        if self.ema is not None:
            for name, value in tensors["ema"].items():
                self.ema.average[name].copy_(value)
            self.ema.updates = facts["ema_updates"]
        self.step, self.data, self.history = facts["step"], facts["data"], facts["history"]

    def facts(self) -> dict[str, Any]:
        updates = self.ema.updates if self.ema is not None else 0
        return {
            "format": FORMAT,
            "step": self.step,
            "data": self.data,
            "history": self.history,
            "ema_updates": updates,
            "random": {"python": random.getstate(), "numpy": list(numpy_state()[2:])},
        }


def numpy_state() -> tuple[Any, ...]:
    """numpy's global generator: name, 624 words, position, whether a normal deviate waits, and that deviate."""
    return tuple(np.random.get_state(legacy=True))


class Checkpoints:
    """`step-000200/` folders in a run folder; the newest whole one is resumed from."""

    def __init__(self, folder: Path, every: int, keep: int) -> None:
        self.folder, self.every, self.keep = folder, every, keep

    def due(self, step: int) -> bool:
        return step % self.every == 0

    def steps(self) -> list[Path]:
        """Oldest first."""
        return sorted(self.folder.glob("step-??????"))

    def save(self, state: TrainState) -> None:
        final = self.folder / f"step-{state.step:06d}"
        if final.exists():
            return
        temporary = self.folder / f".{final.name}.{os.getpid()}.tmp"
        temporary.mkdir()
        for name, tensors in state.tensors().items():
            save_file({key: value.contiguous().cpu() for key, value in tensors.items()}, temporary / f"{name}.safetensors")
        write_json(temporary / "state.json", state.facts())
        hashes = {file.name: sha256_file(file) for file in sorted(temporary.iterdir())}
        write_json(temporary / "complete.json", hashes)
        fsync_tree(temporary)
        os.rename(temporary, final)
        for old in self.steps()[: -self.keep]:
            shutil.rmtree(old)

    def restore(self, state: TrainState) -> bool:
        """Load the newest whole checkpoint into `state`; a damaged one is set aside by name and the one before is used."""
        for folder in reversed(self.steps()):
            try:
                tensors, facts = read_checkpoint(folder)
                state.load(tensors, facts)
            except CheckpointCorrupt as error:
                aside = folder.with_name(folder.name + ".bad")
                shutil.rmtree(aside, ignore_errors=True)
                os.rename(folder, aside)
                logger.warning("checkpoint %s is damaged (%s): set aside as %s, using the one before", folder.name, error, aside.name)
                continue
            return True
        return False


def read_checkpoint(folder: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Tensors by file and the facts of a checkpoint, every byte checked.

    Raises:
        CheckpointCorrupt: naming the file.
    """
    try:
        hashes: dict[str, str] = read_json(folder / "complete.json")
    except (OSError, json.JSONDecodeError) as error:
        raise CheckpointCorrupt(f"complete.json: {error}") from error
    for name, expected in hashes.items():
        if not (folder / name).is_file():
            raise CheckpointCorrupt(f"{name} is missing")
        if sha256_file(folder / name) != expected:
            raise CheckpointCorrupt(f"{name} has not the sha256 it was written with")
    facts = read_json(folder / "state.json")
    if facts["format"] != FORMAT:
        raise CheckpointCorrupt(f"state.json has format {facts['format']}, this code reads {FORMAT}")
    return {Path(name).stem: load_file(folder / name) for name in hashes if name.endswith(".safetensors")}, facts
