"""Shards to batches. Position in the stream is one number, so that a stopped run goes on exactly, with any number of ranks."""

import json
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from data.images import decode_image
from data.mixture import TaskStream, cycle
from data.shards import ShardMismatch, check_file, split_members
from data.store import open_tars
from runtime.files import read_json

AHEAD = 2  # batches a worker makes ahead


class OtherData(Exception):
    """A saved position belongs to another mixture or dataset."""


@dataclass(frozen=True)
class Sample:
    """One decoded sample: target uint8 (H, W, 3), references likewise, scene the drawn world's description, empty elsewhere."""

    key: str
    task: str
    kind: str
    prompt: str
    target: np.ndarray
    references: tuple[np.ndarray, ...]
    scene: dict[str, Any]


@dataclass(frozen=True)
class Batch:
    """Samples of one task and one size.

    target_images uint8 (B, H, W, 3); reference_images k arrays (B, H, W, 3); positions: each sample's place in the stage's stream,
    the same on whatever rank; index: the micro-batch.
    """

    index: int
    task: str
    prompts: tuple[str, ...]
    target_images: np.ndarray
    reference_images: tuple[np.ndarray, ...]
    keys: tuple[str, ...]
    scenes: tuple[dict[str, Any], ...]
    positions: tuple[int, ...]


class Part:
    """Random access to a published part. Tars, index and samples are checked against the manifest, as `open_tars` says."""

    def __init__(self, folder: Path) -> None:
        if not (folder / "manifest.json").is_file():
            raise ShardMismatch(f"{folder}: no manifest.json. Build it with `dvc repro shards@{folder.name}` or `deepgen run`.")
        self.folder = folder
        self.manifest = read_json(folder / "manifest.json")
        self.tars = open_tars(folder, self.manifest)
        check_file(folder / "index.npy", self.manifest["files"]["index.npy"])

    @cached_property
    def index(self) -> np.ndarray:
        return np.load(self.folder / "index.npy", mmap_mode="r", allow_pickle=False)

    def __len__(self) -> int:
        return self.manifest["samples"]

    def __getitem__(self, row: int) -> Sample:
        return self.read(row, {})

    def read(self, row: int, out: Mapping[str, np.ndarray]) -> Sample:
        """Sample number `row`, its images decoded into the arrays of `out` (role -> uint8 (H, W, 3)) where there is one."""
        shard, offset, size = (int(value) for value in self.index[row])
        return parse_sample(self.tars.read(shard, offset, size), f"{self.folder.name} row {row}", out)

    def close(self) -> None:
        self.tars.close()


def parse_sample(content: bytes, name: str, out: Mapping[str, np.ndarray]) -> Sample:
    """The tar members of one sample -> Sample; nothing but json and images is looked at.

    Raises:
        ShardMismatch: naming `name`, where the bytes are no run of plain files.
        BadImage: an image is not whole.
    """
    members = split_members(content, name)
    key = next(iter(members)).partition(".")[0]
    facts = json.loads(bytes(members.pop(f"{key}.json")))
    return decode_sample(key, facts, {member.removeprefix(f"{key}."): bytes(image) for member, image in members.items()}, name, out)


def decode_sample(key: str, facts: dict[str, Any], images: Mapping[str, bytes], name: str, out: Mapping[str, np.ndarray]) -> Sample:
    """A sample's JSON and its encoded images ("tgt.png" -> bytes) -> Sample, decoded into the arrays of `out` where there is one.

    Raises:
        BadImage: naming `name`: an image is not whole.
    """
    pixels = {}
    for member, content in images.items():
        role, _, _ = member.rpartition(".")
        pixels[role] = decode_image(content, f"{name} {key}.{member}", out.get(role))
    target = pixels.pop("tgt")
    return Sample(
        key=key,
        task=facts["task"],
        kind=facts["kind"],
        prompt=facts["prompt"],
        target=target,
        references=tuple(pixels[f"src.{i}"] for i in range(len(pixels))),
        scene=facts["scene"] or {},
    )


def shapes_of(bucket: str) -> dict[str, tuple[int, int]]:
    """Role -> (height, width) of a bucket's images: "64x96<32x32" is a target 64 wide and 96 high, made from one reference."""
    sizes = [size.split("x") for size in bucket.split("<")]
    roles = ["tgt", *(f"src.{i}" for i in range(len(sizes) - 1))]
    return {role: (int(height), int(width)) for role, (width, height) in zip(roles, sizes, strict=True)}


def empty_images(bucket: str, number: int) -> dict[str, np.ndarray]:
    """Role -> uint8 (number, H, W, 3) of a bucket's images, to be decoded into."""
    return {role: np.empty((number, *shape, 3), np.uint8) for role, shape in shapes_of(bucket).items()}


def join_samples(index: int, samples: Sequence[Sample], images: dict[str, np.ndarray], positions: tuple[int, ...]) -> Batch:
    """A batch of samples of one task, whose pixels lie in `images` (role -> uint8 (B, H, W, 3))."""
    return Batch(
        index=index,
        task=samples[0].task,
        prompts=tuple(sample.prompt for sample in samples),
        target_images=images["tgt"],
        reference_images=tuple(pixels for role, pixels in images.items() if role != "tgt"),
        keys=tuple(sample.key for sample in samples),
        scenes=tuple(sample.scene for sample in samples),
        positions=positions,
    )


def read_part(folder: Path, stop: int | None = None) -> Iterator[Sample]:
    """Samples of a published part in order, the first `stop` of them."""
    part = Part(folder)
    try:
        for row in range(len(part) if stop is None else min(stop, len(part))):
            yield part[row]
    finally:
        part.close()


class Loader:
    """Batches of a stage's mixture, without end, from micro-batch `start`.

    A micro-batch has one task and one size, the same on every rank; tasks follow the ratio in a fixed cycle. Each rank takes its slice of
    the global micro-batch, so that the union over ranks is the same whatever their number. Batch number n is a function of n alone: workers
    and the batches that they made ahead are no part of the state.

    Args:
        mixture: as resolved by `resolve_mixture`.
        shards: folder of published parts.
        batch_size: samples a micro-batch over all ranks; a multiple of `world_size`.
        workers: threads that make batches ahead (decoding leaves Python's lock alone); 0 makes each when it is asked for.

    Raises:
        ShardMismatch: a part is missing, or not the dataset that the mixture names.
    """

    def __init__(
        self,
        mixture: dict[str, Any],
        shards: Path,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        start: int = 0,
        workers: int = 0,
    ) -> None:
        if batch_size % world_size:
            raise ValueError(f"batch_size: {batch_size} samples can't be shared by {world_size} ranks; it must be a multiple.")
        self.mixture, self.batch_size, self.rank, self.world_size, self.next = mixture, batch_size, rank, world_size, start
        self.workers = workers
        self.cycle = cycle(mixture)
        self.streams = {task: TaskStream(mixture, task) for task in mixture["tasks"]}
        self.parts: dict[str, Part] = {}
        for parts in mixture["tasks"].values():
            for entry in parts:
                part = self.parts[entry["part"]] = Part(shards / entry["part"])
                if part.manifest["dataset_id"] != entry["dataset_id"]:
                    raise ShardMismatch(
                        f"{part.folder}: dataset {part.manifest['dataset_id'][:12]}, the {mixture['stage']} mixture was made for "
                        f"{entry['dataset_id'][:12]}. Make it again with `dvc repro mixture@{mixture['stage']}`, or `deepgen run`."
                    )

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: which data, by dataset id and mixture hash, in which order, and the next global sample."""
        return {
            "datasets": {name: part.manifest["dataset_id"] for name, part in sorted(self.parts.items())},
            "mixture_hash": self.mixture["mixture_hash"],
            "seed": self.mixture["seed"],
            "batch_size": self.batch_size,
            "global_sample": self.next * self.batch_size,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a saved state.

        Raises:
            OtherData: the state was saved with other data, in another order, or with another batch size.
        """
        mine = self.state()
        for name in ("mixture_hash", "datasets", "seed", "batch_size"):
            if state[name] != mine[name]:
                raise OtherData(f"saved position has {name} {state[name]}, this run has {mine[name]}: it can't go on from there.")
        self.next = state["global_sample"] // self.batch_size

    def __iter__(self) -> Iterator[Batch]:
        if self.workers == 0:
            while True:
                batch = self.batch(self.next)
                self.next += 1
                yield batch
        pool = ThreadPoolExecutor(self.workers, "batches")
        try:
            ahead = deque(pool.submit(self.batch, self.next + i) for i in range(self.workers * AHEAD))
            while True:
                batch = ahead.popleft().result()
                ahead.append(pool.submit(self.batch, self.next + 1 + len(ahead)))
                self.next += 1
                yield batch
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def batch(self, index: int) -> Batch:
        """This rank's slice of micro-batch `index`."""
        turn, place = divmod(index, len(self.cycle))
        task = self.cycle[place]
        nth = turn * self.cycle.count(task) + self.cycle[:place].count(task)
        share = self.batch_size // self.world_size
        first = self.rank * share
        size, addresses = self.streams[task].batch(nth, self.batch_size)
        images = empty_images(size, share)
        samples = []
        for i, (part, row) in enumerate(addresses[first : first + share]):
            samples.append(self.parts[part].read(row, {role: pixels[i] for role, pixels in images.items()}))
        return join_samples(index, samples, images, tuple(index * self.batch_size + first + i for i in range(share)))
