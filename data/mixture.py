"""Which sample is number i of a stage: arithmetic, no buffer, no state to lose."""

import math
from bisect import bisect_right
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.config import MixtureConfig
from runtime.files import read_json, sha256_json
from runtime.keys import seed_from

ROUNDS = 4


def resolve_mixture(stage: str, config: MixtureConfig, shards: Path, removed: dict[str, list[int]] | None = None) -> dict[str, Any]:
    """What `stage` reads, by dataset id: tasks in their fixed order, each with its parts, weights, sizes and the rows taken out of it.

    Args:
        removed: part -> sorted rows that are not read although they lie in its tars (taken down, or part of an evaluation set).

    Raises:
        FileNotFoundError: a part that is unknown or not built.
        ValueError: a task of the ratio that no part feeds, or a part of which nothing is left.
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
            gone = (removed or {}).get(name, [])
            if manifest["samples"] <= len(gone):
                raise ValueError(
                    f"mixture.{stage}.parts: {name!r} has weight {weight}, but of its {manifest['counts']['input']} records none is left "
                    f"to read; look at `python -m data quarantine list {name}`, or set its weight to 0."
                )
            part = {"part": name, "weight": weight, "samples": manifest["samples"] - len(gone), "dataset_id": manifest["dataset_id"]}
            tasks.setdefault(manifest["task"], []).append(part | {"buckets": manifest["buckets"], "removed": gone})
    for task, times in config.ratio.items():
        if times > 0 and task not in tasks:
            raise ValueError(f"mixture.{stage}: ratio.{task} is {times}, but the weights of its {task} parts sum to 0; must be above 0")
    ratio = {task: times for task, times in sorted(config.ratio.items()) if times > 0}
    mixture = {"stage": stage, "seed": config.seed, "ratio": ratio, "tasks": tasks}
    return mixture | {"mixture_hash": sha256_json(mixture)[:32]}


def cycle(mixture: dict[str, Any]) -> list[str]:
    """The task of each micro-batch of a cycle, e.g. edit, text, text, text."""
    return [task for task, times in mixture["ratio"].items() for _ in range(times)]


def task_counts(mixture: dict[str, Any], micro_batches: int) -> dict[str, int]:
    """How many of the first micro-batches each task has."""
    tasks = cycle(mixture)
    whole, rest = divmod(micro_batches, len(tasks))
    return {task: whole * tasks.count(task) + tasks[:rest].count(task) for task in mixture["tasks"]}


def part_counts(mixture: dict[str, Any], samples: int) -> dict[str, dict[str, int]]:
    """Of which parts the first samples of each task are."""
    counts = {}
    for task, parts in mixture["tasks"].items():
        stream = TaskStream(mixture, task)
        drawn = Counter(part for n in range(samples) for part, _ in stream.batch(n, 1)[1])
        counts[task] = {part["part"]: drawn[part["part"]] for part in parts}
    return counts


class TaskStream:
    """Micro-batch n of one task: which size, and which rows of which parts.

    Sizes take turns in proportion to the samples that have them, parts in proportion to their weights; the rows of a part that have one
    size are walked in a new permutation every epoch. Nothing is buffered, so nothing is lost or repeated wherever a run stops.
    """

    def __init__(self, mixture: dict[str, Any], task: str) -> None:
        parts = mixture["tasks"][task]
        self.seed, self.task = mixture["seed"], task
        self.groups: list[list[_Group]] = []
        shares = []
        for bucket in sorted({entry["bucket"] for part in parts for entry in part["buckets"]}):
            weighted = [(_group(part, bucket), part["weight"] / part["samples"]) for part in parts]
            present = [(group, weight * group.samples) for group, weight in weighted if group is not None and group.samples > 0]
            if present:
                self.groups.append([group for group, _ in present])
                shares.append([weight for _, weight in present])
        self.bucket_shares = _of_the_rest([sum(weights) for weights in shares])
        self.part_shares = [_of_the_rest(weights) for weights in shares]

    def batch(self, n: int, batch_size: int) -> tuple[str, list[tuple[str, int]]]:
        """(size, (part, row) of each sample) of the task's micro-batch number n over all ranks."""
        bucket, nth = apportion(n, self.bucket_shares)
        addresses = []
        for i in range(nth * batch_size, (nth + 1) * batch_size):
            place, turn = apportion(i, self.part_shares[bucket])
            group = self.groups[bucket][place]
            epoch, position = divmod(turn, group.samples)
            key = seed_from("order", self.seed, self.task, group.part, epoch)
            addresses.append((group.part, group.row(permuted(position, group.samples, key))))
        return self.groups[bucket][0].bucket, addresses


@dataclass(frozen=True)
class _Group:
    """The rows of one part that have one size: `samples` of them from `start` on, without those that were taken out."""

    part: str
    bucket: str
    start: int
    samples: int
    gaps: tuple[int, ...]  # for each row taken out, how many of the group's kept rows lie before it

    def row(self, position: int) -> int:
        return self.start + position + bisect_right(self.gaps, position)


def _group(part: dict[str, Any], bucket: str) -> _Group | None:
    start = 0
    for entry in part["buckets"]:
        if entry["bucket"] == bucket:
            gone = [row - start for row in part["removed"] if start <= row < start + entry["samples"]]
            return _Group(part["part"], bucket, start, entry["samples"] - len(gone), tuple(row - i for i, row in enumerate(gone)))
        start += entry["samples"]
    return None


def _of_the_rest(weights: list[float]) -> list[float]:
    """Each weight as a share of itself and those after it."""
    return [weight / sum(weights[i:]) for i, weight in enumerate(weights)]


def apportion(i: int, shares: list[float]) -> tuple[int, int]:
    """To whom turn i falls, and how many turns came to them before.

    One after the other takes their share of what those before left over, so each owns their share of every prefix, to within one a level.
    """
    for place, share in enumerate(shares):
        taken = math.floor(i * share + 0.5)
        if math.floor((i + 1) * share + 0.5) > taken:
            return place, taken
        i -= taken
    raise AssertionError("the last share is 1 and takes every turn")


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
