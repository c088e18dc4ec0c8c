"""Shards to batches. Position in the stream is one number, so that a stopped run goes on exactly, with any number of ranks."""

import json
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from data.images import decode_image
from data.latents import Latents, parse_latents, stack_latents
from data.mixture import TaskStream, cycle
from data.shards import split_members
from data.store import open_tars
from runtime.exits import Plain
from runtime.published import ShardMismatch, check_file, read_manifest

Bytes = bytes | memoryview
AHEAD = 2  # batches a worker makes ahead


class OtherData(Plain):
    """A saved position belongs to another mixture or dataset."""


@dataclass(frozen=True)
class Sample:
    """One decoded sample: target uint8 (H, W, 3), without rows of a mere prompt, references likewise, scene the drawn world's description,
    empty elsewhere."""

    key: str
    task: str
    kind: str
    prompt: str
    target: np.ndarray
    references: tuple[np.ndarray, ...]
    scene: dict[str, Any]


@dataclass(frozen=True)
class Encoded:
    """One sample as it lies in its tar. name: where, for messages; bucket: its sizes; images: role -> bytes of a file."""

    name: str
    key: str
    task: str
    kind: str
    prompt: str
    scene: dict[str, Any]
    bucket: str
    images: Mapping[str, Bytes]

    def image(self, role: str, out: np.ndarray | None = None) -> np.ndarray:
        """uint8 (H, W, 3), in `out` if given.

        Raises:
            BadImage: the image is not whole.
        """
        return decode_image(bytes(self.images[role]), f"{self.name} {self.key}.{role}", out)

    def decode(self) -> Sample:
        shapes = shapes_of(self.bucket)
        references = tuple(self.image(f"src.{i}") for i in range(len(shapes) - 1))
        target = self.image("tgt") if "tgt" in self.images else np.empty((0, shapes["tgt"][1], 3), np.uint8)
        return Sample(self.key, self.task, self.kind, self.prompt, target, references, self.scene)


@dataclass(frozen=True)
class Batch:
    """Samples of one task and one size.

    target_images uint8 (B, H, W, 3), or no rows (0, H, W, 3) where `latents` are read in their place,
    or where a sample is a mere prompt; reference_images k arrays
    (B, H, W, 3), which the VLM looks at in any case; positions: each sample's place in the stage's stream, the same on whatever rank;
    index: the micro-batch; parts: each sample's, of data.parts.
    """

    index: int
    task: str
    prompts: tuple[str, ...]
    target_images: np.ndarray
    reference_images: tuple[np.ndarray, ...]
    keys: tuple[str, ...]
    scenes: tuple[dict[str, Any], ...]
    positions: tuple[int, ...]
    latents: Latents | None = None
    parts: tuple[str, ...] = ()


class Part:
    """Random access to a published part, or to its latents. Tars, index and samples are checked against the manifest, as `open_tars` says.

    Args:
        stage: of dvc.yaml, that makes the folder; by default the part's own.
    """

    def __init__(self, folder: Path, stage: str | None = None) -> None:
        self.folder, self.stage = folder, stage or f"shards@{folder.name}"
        self.manifest = read_manifest(folder, self.stage)
        self.tars = open_tars(folder, self.manifest, self.stage)
        check_file(folder / "index.npy", self.manifest["files"]["index.npy"], self.stage)

    @cached_property
    def index(self) -> np.ndarray:
        return np.load(self.folder / "index.npy", mmap_mode="r", allow_pickle=False)

    def __len__(self) -> int:
        return self.manifest["samples"]

    def __getitem__(self, row: int) -> Sample:
        return self.read(row).decode()

    def read(self, row: int) -> Encoded:
        """Sample number `row`, its images as they lie in the tar."""
        return parse_sample(self.content(row), f"{self.folder.name} row {row}")

    def content(self, row: int) -> bytes:
        """The tar members of sample number `row`."""
        shard, offset, size = (int(value) for value in self.index[row])
        return self.tars.read(shard, offset, size)

    def close(self) -> None:
        self.tars.close()


def parse_sample(content: bytes, name: str) -> Encoded:
    """The tar members of one sample; nothing is decoded.

    Raises:
        ShardMismatch: naming `name`, where the bytes are no run of plain files.
    """
    members = split_members(content, name)
    key = next(iter(members)).partition(".")[0]
    facts = json.loads(bytes(members.pop(f"{key}.json")))
    images = {member.removeprefix(f"{key}."): image for member, image in members.items()}
    return encoded(name, key, facts, images)


def encoded(name: str, key: str, facts: dict[str, Any], images: Mapping[str, Bytes]) -> Encoded:
    """A sample's JSON and its image files ("tgt.png" -> bytes), put together."""
    by_role = {member.rpartition(".")[0]: image for member, image in images.items()}
    return Encoded(name, key, facts["task"], facts["kind"], facts["prompt"], facts["scene"] or {}, facts["bucket"], by_role)


def shapes_of(bucket: str) -> dict[str, tuple[int, int]]:
    """Role -> (height, width) of a bucket's images: "64x96<32x32" is a target 64 wide and 96 high, made from one reference."""
    sizes = [size.split("x") for size in bucket.split("<")]
    roles = ["tgt", *(f"src.{i}" for i in range(len(sizes) - 1))]
    return {role: (int(height), int(width)) for role, (width, height) in zip(roles, sizes, strict=True)}


def make_batch(index: int, bucket: str, samples: Sequence[Encoded], positions: tuple[int, ...], latents: Latents | None = None) -> Batch:
    """Samples of one task and one size, decoded; of those that have latents, the references only.

    Raises:
        BadImage: an image is not whole.
    """
    shapes = shapes_of(bucket)
    pictured = latents is None and all("tgt" in sample.images for sample in samples)
    rows = dict.fromkeys(shapes, len(samples)) | ({} if pictured else {"tgt": 0})
    images = {role: np.empty((rows[role], *shape, 3), np.uint8) for role, shape in shapes.items()}
    for role, pixels in images.items():
        for i in range(rows[role]):
            samples[i].image(role, pixels[i])
    return Batch(
        index=index,
        task=samples[0].task,
        prompts=tuple(sample.prompt for sample in samples),
        target_images=images.pop("tgt"),
        reference_images=tuple(images.values()),
        keys=tuple(sample.key for sample in samples),
        scenes=tuple(sample.scene for sample in samples),
        positions=positions,
        latents=latents,
    )


def read_part(folder: Path, count: int | None = None) -> Iterator[Sample]:
    """Samples of a published part in order; with `count`, so many, spread evenly: parts lie sorted by size and number of references."""
    part = Part(folder)
    try:
        for row in spread_rows(len(part), count):
            yield part[row]
    finally:
        part.close()


def spread_rows(total: int, count: int | None) -> list[int]:
    """`count` of `total` rows, evenly; all where there are no more."""
    count = total if count is None else min(count, total)
    return [i * total // count for i in range(count)]


def open_latents(folder: Path, parts: Mapping[str, Part]) -> dict[str, Part]:
    """The latents in `folder` of those `parts` that have them there.

    Raises:
        ShardMismatch: they were made from another version of the part.
    """
    found = {name: Part(folder / name, "latents") for name in parts if (folder / name / "manifest.json").is_file()}
    for name, latents in found.items():
        ours, theirs = parts[name].manifest["dataset_id"], latents.manifest["dataset_id"]
        if ours != theirs:
            raise ShardMismatch(
                f"{latents.folder}: made from dataset {theirs[:12]}, {name} is {ours[:12]}. Make it again with `dvc repro -f latents`."
            )
    return found


class Loader:
    """Batches of a stage's mixture, without end: from the first, or from where `restore` says.

    A micro-batch has one task and one size, the same on every rank; tasks follow the ratio in a fixed cycle. Each rank takes its slice of
    the global micro-batch, so that the union over ranks is the same whatever their number. Batch number n is a function of n alone: workers
    and the batches that they made ahead are no part of the state.

    Args:
        mixture: as resolved by `resolve_mixture`.
        shards: folder of published parts.
        batch_size: samples a micro-batch over all ranks; a multiple of `world_size`.
        workers: threads that make batches ahead (decoding leaves Python's lock alone); 0 makes each when it is asked for.
        latents: folder of the parts' latents; a micro-batch all of whose parts have them there is read from them. None reads images only.

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
        workers: int = 0,
        latents: Path | None = None,
    ) -> None:
        if batch_size % world_size:
            raise ValueError(f"batch_size: {batch_size} samples can't be shared by {world_size} ranks; it must be a multiple.")
        self.mixture, self.batch_size, self.rank, self.world_size, self.next = mixture, batch_size, rank, world_size, 0
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
        self.latents = open_latents(latents, self.parts) if latents else {}

    def _latents(self, addresses: Sequence[tuple[str, int]], samples: Sequence[Encoded]) -> Latents:
        found = [(f"latents of {part} row {row}", self.latents[part].content(row)) for part, row in addresses]
        return stack_latents([parse_latents(content, name, sample.key) for (name, content), sample in zip(found, samples, strict=True)])

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
        mine = addresses[first : first + share]
        samples = [self.parts[part].read(row) for part, row in mine]
        positions = tuple(index * self.batch_size + first + i for i in range(share))
        cached = all(part in self.latents for part, _ in addresses)
        batch = make_batch(index, size, samples, positions, self._latents(mine, samples) if cached else None)
        return replace(batch, parts=tuple(part for part, _ in mine))
