"""Checkpoints that are whole or absent, hashed when written and checked when read."""

import json
import logging
import os
import shutil
import signal
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from runtime.exits import Plain
from runtime.files import fsync_folder, fsync_tree, read_json, sha256_file, write_json
from runtime.run_folder import checkpoints, kept_checkpoints, step_of, tell_score
from runtime.stage import rank
from training.optim import EMA
from training.randomness import global_generators, restore_global_generators, seed_global_generators
from training.ranks import from_every_rank, from_first_rank, shard

FORMAT = 2
MARGIN = 1.1  # free space asked for, over the bytes of a checkpoint
ALWAYS = {"weights.safetensors", "optimizer.safetensors", "random.safetensors", "state.json"}
Files = dict[str, dict[str, Tensor]]
Facts = dict[str, Any]
logger = logging.getLogger(__name__)


class CheckpointCorrupt(Plain):
    """A file of a checkpoint is missing or not the one that was written."""


class NewerFormat(Plain):
    """A checkpoint was written by later code than this. It is not damaged, and left where it is."""


class CannotSave(Plain):
    """A checkpoint could not be written, most often for want of disk space. Those before it are whole."""


@dataclass
class TrainState:
    """All that must survive an interruption.

    step counts optimizer steps; data is the loader's own state (dataset ids, mixture hash, seed, position); history holds the logged
    series, so that a resumed curve is whole; guard holds the counts of `training.guards`.
    """

    trained: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    ema: EMA | None = None
    step: int = 0
    data: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, float]] = field(default_factory=list)
    guard: dict[str, int] = field(default_factory=dict)

    def tensors(self) -> Files:
        """By file: weights, optimizer moments, the average. Not copied."""
        moments: dict[str, Tensor] = {}
        for index, slots in self.optimizer.state_dict()["state"].items():
            moments |= {f"{index}.{slot}": torch.as_tensor(value) for slot, value in slots.items()}
        files = {"weights": {name: p.detach() for name, p in self.trained.items()}, "optimizer": moments}
        if self.ema is not None:
            files["ema"] = self.ema.average
        return files

    def load(self, tensors: Files, facts: Facts) -> None:
        """Take over what a checkpoint holds, and this rank's generators.

        A rank that the run had not when it was saved seeds them by its name and the step: no two runs of it differ, and no two ranks agree.

        Raises:
            CheckpointCorrupt: naming weights that are missing, surplus or of another shape.
        """
        weights = tensors["weights"]
        stored, wanted = set(weights), set(self.trained)
        if stored != wanted:
            raise CheckpointCorrupt(f"weights: missing {sorted(wanted - stored)[:5]}, surplus {sorted(stored - wanted)[:5]}")
        odd = [name for name, parameter in self.trained.items() if parameter.shape != weights[name].shape]
        if odd:
            raise CheckpointCorrupt(f"weights: {odd[:5]} have another shape than the model's")
        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter.copy_(shard(weights[name], parameter))
        current = self.optimizer.state_dict()
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors["optimizer"].items():
            index, _, slot = key.partition(".")
            state.setdefault(int(index), {})[slot] = value
        current["state"] = state
        self.optimizer.load_state_dict(current)
        for stepped, slots in self.optimizer.state.items():
            self.optimizer.state[stepped] = {slot: shard(value, stepped) for slot, value in slots.items()}
        if self.ema is not None:
            for name, value in tensors["ema"].items():
                self.ema.average[name].copy_(shard(value, self.ema.average[name]))
            self.ema.updates = facts["ema_updates"]
        self.step, self.data, self.history, self.guard = facts["step"], facts["data"], facts["history"], facts["guard"]
        mine = {key.partition(".")[2]: value for key, value in tensors["random"].items() if key.partition(".")[0] == str(rank())}
        if mine:
            restore_global_generators(mine)
        else:
            seed_global_generators("rank", rank(), "from step", self.step)

    def facts(self) -> Facts:
        return {
            "format": FORMAT,
            "step": self.step,
            "data": self.data,
            "history": self.history,
            "ema_updates": self.ema.updates if self.ema is not None else 0,
            "guard": self.guard,
        }


def fault(point: str, step: int) -> None:
    """For kill tests: die here where DEEPGEN_FAULT says so, as `save:before_rename`, or `save:before_rename:200` for that step alone."""
    if os.environ.get("DEEPGEN_FAULT") in (point, f"{point}:{step}"):
        os.kill(os.getpid(), signal.SIGKILL)


class Checkpoints:
    """`step-000200/` folders in a run folder; the newest whole one is resumed from.

    Kept are the latest `keep`, the latest that was due (others come from a stop), the best by the scores that were told, and the
    registered. Every rank calls `save` and `restore`, which exchange the generators' states and the choice; rank 0 alone writes.

    Args:
        every: steps between two.
        background: `save` copies the tensors and returns; one thread writes. The next save, and leaving the context, wait for it and
            raise what it raised.
    """

    def __init__(self, folder: Path, every: int, keep: int, background: bool = False) -> None:
        self.folder, self.every, self.keep, self.background = folder, every, keep, background
        self.writer = ThreadPoolExecutor(1, "checkpoint")
        self.writing: Future[None] | None = None

    def due(self, step: int) -> bool:
        return step % self.every == 0

    def steps(self) -> list[Path]:
        """Oldest first."""
        return checkpoints(self.folder)

    def save(self, state: TrainState, score: float | None = None) -> None:
        """Write `state`, unless its step has been saved.

        Args:
            score: its loss on held-out samples, lower is better; None where it is not known.

        Raises:
            CannotSave: too little free disk, or the write failed; also for an earlier write in the background.
        """
        random = from_every_rank(global_generators())
        if rank() != 0:
            return
        self.wait()
        final = self.folder / f"step-{state.step:06d}"
        if score is not None:
            try:
                tell_score(final, score)
            except OSError as error:
                raise self._cannot_save(final, 0, str(error)) from error
        if final.exists():
            return
        files = state.tensors()
        files["random"] = {f"{number}.{name}": value for number, states in enumerate(random) for name, value in states.items()}
        files = {
            file: {name: tensor.to("cpu", copy=self.background).contiguous() for name, tensor in tensors.items()}
            for file, tensors in files.items()
        }
        content = json.dumps(state.facts(), indent=1, sort_keys=True, allow_nan=False)
        needed = int(MARGIN * (sum(tensor.nbytes for tensors in files.values() for tensor in tensors.values()) + len(content)))
        if shutil.disk_usage(self.folder).free < needed:
            raise self._cannot_save(final, needed, "too little free disk")
        if self.background:
            self.writing = self.writer.submit(self._write, final, files, content, needed)
        else:
            self._write(final, files, content, needed)

    def wait(self) -> None:
        """Until what is being written in the background is whole. Raises what its thread raised."""
        writing, self.writing = self.writing, None
        if writing is not None:
            writing.result()

    def _write(self, final: Path, files: Files, facts: str, needed: int) -> None:
        step = step_of(final)
        temporary = self.folder / f".{final.name}.{os.getpid()}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)  # of a killed process that had the same number
        fault("save:before_write", step)
        try:
            temporary.mkdir()
            for name, tensors in files.items():
                save_file(tensors, temporary / f"{name}.safetensors")
            (temporary / "state.json").write_text(facts + "\n")
            fault("save:after_files", step)
            write_json(temporary / "complete.json", {file.name: sha256_file(file) for file in sorted(temporary.iterdir())})
            fsync_tree(temporary)
            fault("save:before_rename", step)
            os.rename(temporary, final)
            fsync_folder(self.folder)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise self._cannot_save(final, needed, str(error)) from error
        fault("save:after_rename", step)
        self._prune()

    def _cannot_save(self, final: Path, needed: int, why: str) -> CannotSave:
        before = self.steps()
        goes_on = f"goes on from {before[-1].name}" if before else "begins again, as there is none before it"
        free = shutil.disk_usage(self.folder).free
        return CannotSave(
            f"checkpoint {final.name} can't be written to {self.folder}: {why}. {free / 1e6:,.1f} MB are free, it needs "
            f"{needed / 1e6:,.1f} MB. Make room, or lower keep_checkpoints; the same command then {goes_on}."
        )

    def _prune(self) -> None:
        due = [path for path in self.steps() if self.due(step_of(path))]
        kept = {*self.steps()[-self.keep :], *due[-1:], *kept_checkpoints(self.folder)}
        for old in self.steps():
            if old in kept:
                continue
            try:
                shutil.rmtree(old)
            except OSError as error:  # tried again after the next save
                logger.warning("old checkpoint %s can't be deleted: %s", old.name, error)

    def restore(self, state: TrainState, due: bool = False) -> bool:
        """Load the newest whole checkpoint into `state`; a damaged one is set aside by name and the one before is used.

        Rank 0 looks and sets aside; the others load what it chose.

        Args:
            due: only one of a step that is due, which an uninterrupted run has as well.

        Raises:
            NewerFormat: the newest is of a later format.
        """
        self.wait()
        chosen = from_first_rank(self._restore_newest(state, due) if rank() == 0 else None)
        if chosen is None:
            return False
        if rank() != 0:
            state.load(*read_checkpoint(self.folder / chosen))
        return True

    def _restore_newest(self, state: TrainState, due: bool) -> str | None:
        for folder in reversed(self.steps()):
            if due and not self.due(step_of(folder)):
                continue
            try:
                state.load(*read_checkpoint(folder))
            except CheckpointCorrupt as error:
                aside = folder.with_name(folder.name + ".bad")
                shutil.rmtree(aside, ignore_errors=True)
                os.rename(folder, aside)
                logger.warning("checkpoint %s is damaged (%s): set aside as %s, using the one before", folder.name, error, aside.name)
                continue
            return folder.name
        return None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self.wait()
        except CannotSave as error:
            if value is None:
                raise
            logger.warning("%s", error)  # what ended the body is the first thing to know
        finally:
            self.writer.shutdown()


def read_checkpoint(folder: Path) -> tuple[Files, Facts]:
    """Tensors by file and the facts of a checkpoint, every byte checked, brought up to this code's format.

    Raises:
        CheckpointCorrupt: naming the file.
        NewerFormat: it was written by later code.
    """
    try:
        hashes: dict[str, str] = read_json(folder / "complete.json")
    except (OSError, ValueError) as error:
        raise CheckpointCorrupt(f"complete.json: {error}") from error
    if "state.json" not in hashes:
        raise CheckpointCorrupt("complete.json: does not name state.json")
    for name, expected in hashes.items():
        if not (folder / name).is_file():
            raise CheckpointCorrupt(f"{name} is missing")
        if sha256_file(folder / name) != expected:
            raise CheckpointCorrupt(f"{name} has not the sha256 it was written with")
    facts = read_json(folder / "state.json")
    if facts["step"] != step_of(folder):
        raise CheckpointCorrupt(f"state.json is of step {facts['step']}")
    if facts["format"] > FORMAT:
        raise NewerFormat(
            f"{folder}: has format {facts['format']}, this code reads up to {FORMAT}. Go on with the code that wrote it, or move it away "
            "to go on from the one before."
        )
    if missing := sorted(ALWAYS - set(hashes)):
        raise CheckpointCorrupt(f"complete.json: does not name {missing}")
    tensors = {Path(name).stem: load_file(folder / name) for name in hashes if name.endswith(".safetensors")}
    while facts["format"] < FORMAT:
        tensors, facts = UPGRADES[facts["format"]](tensors, facts)
    return tensors, facts


def from_format_1(tensors: Files, facts: Facts) -> tuple[Files, Facts]:
    """The generators of rank 0 alone, in part in state.json; no guard."""
    position, waits, deviate = facts["random"]["numpy"]
    version, words, waiting = facts["random"]["python"]
    rest = {
        "numpy_rest": torch.tensor([position, waits, deviate], dtype=torch.float64),
        "python": torch.tensor([version, *words], dtype=torch.int64),
        "python_deviate": torch.tensor([] if waiting is None else [waiting], dtype=torch.float64),
    }
    random = {f"0.{name}": value for name, value in (tensors["random"] | rest).items()}
    facts = {name: value for name, value in facts.items() if name != "random"}
    return tensors | {"random": random}, facts | {"format": 2, "guard": {}}


UPGRADES: dict[int, Callable[[Files, Facts], tuple[Files, Facts]]] = {1: from_format_1}
