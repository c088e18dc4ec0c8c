"""Which sample is number i of a stage: arithmetic, no buffer, no state to lose."""

import math
from pathlib import Path
from typing import Any

from data.config import MixtureConfig
from runtime.files import read_json, sha256_json
from runtime.keys import seed_from

ROUNDS = 4


def resolve_mixture(stage: str, config: MixtureConfig, shards: Path) -> dict[str, Any]:
    """What `stage` reads, by dataset id: tasks in their fixed order, each with its parts, weights and sizes.

    Raises:
        FileNotFoundError: a part that is unknown or not built.
        ValueError: a task of the ratio that no part feeds.
    """
    tasks: dict[str, Any] = {}
    for name, weight in sorted(config.parts.items()):
        if not (shards / name / "manifest.json").is_file():
            raise FileNotFoundError(
                f"mixture.{stage}.parts: {name!r} has no shards in {shards}. Build them with `dvc repro shards@{name}`, or `deepgen run`; "
                "if the name is wrong, allowed are the keys of data.parts."
            )
        manifest = read_json(shards / name / "manifest.json")
        if weight > 0 and config.ratio.get(manifest["task"], 0) > 0:
            part = {"part": name, "weight": weight, "samples": manifest["samples"], "dataset_id": manifest["dataset_id"]}
            tasks.setdefault(manifest["task"], []).append(part)
    for task, times in config.ratio.items():
        if times > 0 and task not in tasks:
            raise ValueError(f"mixture.{stage}: ratio.{task} is {times}, but the weights of its {task} parts sum to 0; must be above 0")
    ratio = {task: times for task, times in sorted(config.ratio.items()) if times > 0}
    mixture = {"stage": stage, "seed": config.seed, "ratio": ratio, "tasks": tasks}
    return mixture | {"mixture_hash": sha256_json(mixture)[:32]}


def cycle(mixture: dict[str, Any]) -> list[str]:
    """The task of each micro-batch of a cycle, e.g. edit, text, text, text."""
    return [task for task, times in mixture["ratio"].items() for _ in range(times)]


class TaskStream:
    """Sample i of one task: which part, and which row of it.

    Parts are interleaved in proportion to their weights; each part is walked in a new permutation every epoch.
    """

    def __init__(self, mixture: dict[str, Any], task: str) -> None:
        parts = mixture["tasks"][task]
        self.names = [part["part"] for part in parts]
        self.sizes = [part["samples"] for part in parts]
        self.seed, self.task = mixture["seed"], task
        weights = [part["weight"] for part in parts]
        self.shares = [weight / sum(weights[p:]) for p, weight in enumerate(weights)]  # of what the parts before leave over

    def address(self, i: int) -> tuple[str, int]:
        """(part, row) of the task's sample number i."""
        part, turn = self._part_and_turn(i)
        epoch, position = divmod(turn, self.sizes[part])
        row = permuted(position, self.sizes[part], seed_from("order", self.seed, self.task, self.names[part], epoch))
        return self.names[part], row

    def _part_and_turn(self, i: int) -> tuple[int, int]:
        """The part that sample i falls to, and how many of that part came before.

        Part after part takes its share of what those before left over, so each owns its share of every prefix, to within one a level.
        """
        for part, share in enumerate(self.shares):
            taken = math.floor(i * share + 0.5)
            if math.floor((i + 1) * share + 0.5) > taken:
                return part, taken
            i -= taken
        raise AssertionError("the last share is 1 and takes every sample")


def permuted(position: int, size: int, key: int) -> int:
    """A keyed bijection of range(size): a Feistel network on the next even number of bits, walked until it lands inside."""
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    value = position
    while True:
        left, right = value >> half, value & mask
        for turn in range(ROUNDS):
            left, right = right, left ^ (_mix(right, key, turn) & mask)
        value = (left << half) | right
        if value < size:
            return value


def _mix(value: int, key: int, turn: int) -> int:
    """Finaliser of SplitMix64 over value, key and turn."""
    x = (value * 0x9E3779B97F4A7C15 + key + turn * 0xD1B54A32D192ED03) & 0xFFFFFFFFFFFFFFFF
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return x ^ (x >> 31)
