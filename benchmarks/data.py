"""The data path against what it stands on, as ratios taken in one run: raw libjpeg-turbo decoding, the stock webdataset pipeline, a start.

    python benchmarks/data.py [--json FILE] [--pairs 7] [--images 400] [--index-rows 50000000]

Pairs are interleaved and their order alternates. A goal is missed if the whole 95% band of the median misses it (exit 1); where the band is
wider than a tenth of its median, the machine is too noisy to say (exit 3).
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ["WDS_SECURE"] = "1"
sys.path[0] = str(Path(__file__).resolve().parents[1])  # or this file would hide the package of its name

import numpy as np
import simplejpeg
from PIL import Image

from data.build import build_part
from data.config import DataConfig, ImageRules, MixtureConfig, PartConfig
from data.duplicates import near_pairs
from data.loader import Loader, Part
from data.mixture import resolve_mixture
from data.shards import INDEX, split_members
from runtime.files import sha256_file, write_json

SIDE = 512


@dataclass
class Row:
    """One ratio: the median of the pairs, its 95% band, and what it must reach."""

    name: str
    ratio: float
    low: float
    high: float
    goal: str
    met: bool | None  # None: too noisy to say


def pictures(folder: Path, number: int) -> None:
    """JPEG, 512 x 512, quality 90, 4:2:0, about 130 kB as a photograph has: a 1/f spectrum and some noise."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(SIDE), np.fft.rfftfreq(SIDE), indexing="ij"))
    frequency[0, 0] = 1
    for i in range(number):
        spectrum = rng.normal(size=(3, *frequency.shape)) + 1j * rng.normal(size=(3, *frequency.shape))
        field = np.fft.irfft2(spectrum / frequency, (SIDE, SIDE))
        pixels = 128 + 50 * field / field.std(axis=(1, 2), keepdims=True) + rng.normal(0, 6, (3, SIDE, SIDE))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8).transpose(1, 2, 0)).save(folder / f"{i:05d}.jpg", quality=90, subsampling=2)
        (folder / f"{i:05d}.txt").write_text(f"picture {i}, of which there is no other")


def part_settings(folder: Path) -> DataConfig:
    part = PartConfig(source="folder", task="text_to_image", split="train", licence="CC0-1.0", path=str(folder))
    return DataConfig(image_size=SIDE, shard_samples=200, images=ImageRules(), parts={"photos": part})


def pairs(first: Callable[[], float], second: Callable[[], float], number: int) -> list[float]:
    """second / first of `number` interleaved pairs after one of each to warm up. Both return seconds for the same work."""
    first(), second()
    ratios = []
    for i in range(number):
        a, b = (first(), second()) if i % 2 == 0 else (second(), first())[::-1]
        ratios.append(b / a)
    return ratios


def row(name: str, ratios: Sequence[float], goal: float, at_most: bool = False) -> Row:
    """The median with its bootstrapped 95% band, against a goal."""
    values = np.array(ratios)
    draws = np.median(np.random.default_rng(0).choice(values, (4000, len(values))), axis=1)
    low, high = np.quantile(draws, [0.025, 0.975])
    ratio = float(np.median(values))
    misses = low > goal if at_most else high < goal
    noisy = high - low > 0.1 * ratio
    good = ratio <= goal if at_most else ratio >= goal
    met = False if misses else None if noisy and not good else True
    return Row(name, ratio, float(low), float(high), f"{'<=' if at_most else '>='} {goal}", met)


def seconds(work: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    began = clock()
    work()
    return clock() - began


def loading(shards: Path, number: int, rates: dict[str, float]) -> list[Row]:
    """The loader against decoding the same images from memory into one buffer, and against webdataset with Pillow."""
    import webdataset

    part = Part(shards / "photos")
    contents = [_target(part, i) for i in range(len(part))]
    buffer = np.empty((SIDE, SIDE, 3), np.uint8)
    mixture = resolve_mixture("sft", MixtureConfig(seed=1, ratio={"text_to_image": 1}, parts={"photos": 1}), shards)
    batch = 8
    steps = len(contents) // batch

    def raw() -> float:
        return seconds(lambda: [simplejpeg.decode_jpeg(content, buffer=buffer) for content in contents[: steps * batch]])

    loaders = {workers: Loader(mixture, shards, batch, workers=workers) for workers in (0, 2)}

    def ours(workers: int) -> float:
        loaders[workers].next = 0
        return seconds(lambda: [batch.target_images.shape for batch in islice(loaders[workers], steps)])

    def raw_in_two() -> float:
        buffers = [np.empty((SIDE, SIDE, 3), np.uint8) for _ in range(2)]

        def half(start: int) -> None:
            for content in contents[start : steps * batch : 2]:
                simplejpeg.decode_jpeg(content, buffer=buffers[start])

        with ThreadPoolExecutor(2) as pool:
            return seconds(lambda: list(pool.map(half, range(2))))

    urls = [str(tar) for tar in sorted((shards / "photos").glob("*.tar"))]

    def stock() -> float:
        pipeline = (
            webdataset.WebDataset(urls, shardshuffle=False, empty_check=False).decode("rgb8").to_tuple("tgt.jpg", "json").batched(batch)
        )
        return seconds(lambda: [images.shape for images, _ in islice(pipeline, steps)])

    rates["decode_per_s"] = steps * batch / min(raw() for _ in range(3))
    rates["loader_per_s"] = steps * batch / min(ours(0) for _ in range(3))
    rates["bytes_per_image"] = sum(map(len, contents)) / len(contents)
    return [
        row("loader / raw decode, one process", pairs(lambda: ours(0), raw, number), 0.80),
        row("loader / raw decode, two threads", pairs(lambda: ours(2), raw_in_two, number), 0.80),
        row("loader / webdataset + Pillow", pairs(lambda: ours(0), stock, number), 1.3),
    ]


def _target(part: Part, row: int) -> bytes:

    shard, offset, size = (int(value) for value in part.index[row])
    members = split_members(part.tars.read(shard, offset, size), "target")
    return next(bytes(content) for name, content in members.items() if ".tgt." in name)


def resuming(shards: Path, number: int) -> Row:
    """Time to the first batch at 90% of an epoch over that at its start, a new loader each time."""
    mixture = resolve_mixture("sft", MixtureConfig(seed=1, ratio={"text_to_image": 1}, parts={"photos": 1}), shards)
    samples = mixture["tasks"]["text_to_image"][0]["samples"]

    def first_batch(start: int) -> float:
        loader = Loader(mixture, shards, 8)
        state = loader.state() | {"global_sample": start * 8}

        def go() -> None:
            loader.restore(state)
            next(iter(loader))

        return min(seconds(go) for _ in range(5))

    return row(
        "resumed first batch, 90% / start", pairs(lambda: first_batch(0), lambda: first_batch(int(samples * 0.9) // 8), number), 1.1, True
    )


def building(folder: Path, number: int, rates: dict[str, float]) -> list[Row]:
    """Building a part whose images stay as they are over decoding them, in CPU time: the disk's part is the disk's."""
    contents = [file.read_bytes() for file in sorted((folder / "photos").glob("*.jpg"))]
    data = part_settings(folder / "photos")

    def decode() -> float:
        return seconds(lambda: [simplejpeg.decode_jpeg(content) for content in contents], time.process_time)

    def build(clock: Callable[[], float] = time.process_time) -> float:
        with tempfile.TemporaryDirectory(dir=folder) as target:
            return seconds(lambda: build_part("photos", data, Path(target) / "photos", folder), clock)

    ratios = pairs(build, decode, number)
    rates["prepare_kept_per_s"] = len(contents) / build(time.perf_counter)
    return [row("build / decode alone, one process (goal line)", ratios, 0.75)]


def opening(rows: int, folder: Path) -> dict[str, float]:
    """An index of `rows` samples: written, opened in a fresh process that draws 1,000 batches from it, and what that process holds."""
    path = folder / "index.npy"
    began = time.perf_counter()
    index = np.lib.format.open_memmap(path, "w+", INDEX, (rows,))
    step = 4_000_000
    for start in range(0, rows, step):
        places = np.arange(start, min(start + step, rows), dtype=np.uint64)
        index["shard"][start : start + step] = places // 4000
        index["offset"][start : start + step] = places % 4000 * 140_000
        index["size"][start : start + step] = 140_000
    index.flush()
    written = time.perf_counter() - began
    script = (
        "import json, resource, sys, time; import numpy as np; from data.mixture import TaskStream\n"
        "def private():\n"
        "    text = open('/proc/self/smaps_rollup').read().split()\n"
        "    return int(text[text.index('Private_Dirty:') + 1]) * 1024\n"
        "rows = int(sys.argv[2]); before = private(); began = time.perf_counter()\n"
        "index = np.load(sys.argv[1], mmap_mode='r', allow_pickle=False)\n"
        "part = {'part': 'all', 'weight': 1.0, 'samples': rows, 'buckets': [{'bucket': '512x512', 'samples': rows}], 'removed': []}\n"
        "stream = TaskStream({'seed': 1, 'tasks': {'text_to_image': [part]}}, 'text_to_image')\n"
        "first = [index[row] for _, row in stream.batch(int(rows * 0.9) // 8, 8)[1]]\n"
        "opened = time.perf_counter() - began; began = time.perf_counter()\n"
        "drawn = [index[row] for n in range(1000) for _, row in stream.batch(n, 8)[1]]\n"
        "print(json.dumps({'opened_s': opened, 'draw_us': (time.perf_counter() - began) / 8000 * 1e6, 'private': private() - before}))"
    )
    found = json.loads(
        subprocess.run([sys.executable, "-c", script, str(path), str(rows)], capture_output=True, text=True, check=True).stdout
    )
    hashed = seconds(lambda: sha256_file(path))
    return {"written_s": written, "bytes_per_row": path.stat().st_size / rows, "sha256_s": hashed} | found


def recall(number: int) -> tuple[float, int]:
    """Share of the near pairs of a brute-force search, over random hashes with planted neighbours, that the banded search finds."""
    rng = np.random.default_rng(0)
    base = rng.integers(0, 2**64, number * 9 // 10, dtype=np.uint64)
    near = base[: number - len(base)] ^ (np.uint64(1) << rng.integers(0, 64, number - len(base), dtype=np.uint64))
    near ^= np.where(rng.random(len(near)) < 0.5, np.uint64(1) << rng.integers(0, 64, len(near), dtype=np.uint64), np.uint64(0))
    hashes = np.unique(np.concatenate([base, near]))
    found = {tuple(pair) for pair in near_pairs(hashes, 2).pairs.tolist()}
    wanted = set()
    for i in range(len(hashes) - 1):
        for j in np.flatnonzero(np.bitwise_count(hashes[i + 1 :] ^ hashes[i]) <= 2):
            wanted.add((i, i + 1 + int(j)))
    return len(wanted & found) / len(wanted), len(wanted)


def searching(number: int, pairs_: int) -> Row:
    """The near-duplicate search over six sorts of as many hashes."""
    hashes = np.random.default_rng(0).integers(0, 2**64, number, dtype=np.uint64)
    six = pairs(lambda: seconds(lambda: [np.sort(hashes) for _ in range(6)]), lambda: seconds(lambda: near_pairs(hashes, 2)), pairs_)
    return row(f"near duplicates of {number:,} / six sorts (goal line)", six, 2.5, True)


def flatness(folder: Path, samples: int, number: int) -> Row:
    """What a sample costs to build, deduplicate and index in a part of `samples` over that in a part of 1,000. Both are drawn."""

    def cost(size: int) -> float:
        part = PartConfig(source="drawn", task="text_to_image", split="train", licence="CC0-1.0", samples=size, deduplicate="near")
        data = DataConfig(image_size=64, shard_samples=1000, images=ImageRules(min_side=32), parts={"drawn": part})
        with tempfile.TemporaryDirectory(dir=folder) as target:
            return seconds(lambda: build_part("drawn", data, Path(target) / "drawn", folder)) / size

    cost(1000)
    large = cost(samples)
    return row(f"build, cost a sample, {samples:,} / 1,000", [large / cost(1000) for _ in range(number)], 1.1, True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--index-rows", type=int, default=50_000_000)
    parser.add_argument("--recall-rows", type=int, default=100_000)
    parser.add_argument("--flat-samples", type=int, default=100_000)
    arguments = parser.parse_args()
    rates: dict[str, float] = {}
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pictures(folder / "photos", arguments.images)
        build_part("photos", part_settings(folder / "photos"), folder / "shards" / "photos", folder)
        rows += loading(folder / "shards", arguments.pairs, rates)
        rows.append(resuming(folder / "shards", arguments.pairs))
        rows += building(folder, max(3, arguments.pairs // 2), rates)
        rows.append(searching(1_000_000, max(3, arguments.pairs // 2)))
        rows.append(flatness(folder, arguments.flat_samples, arguments.pairs))
        index = opening(arguments.index_rows, folder)
    share, planted = recall(arguments.recall_rows)
    rows.append(
        Row(f"near-duplicate recall over {planted:,} pairs of {arguments.recall_rows:,}", share, share, share, ">= 0.999", share >= 0.999)
    )
    bytes_per_row = index["bytes_per_row"]
    rows.append(Row("index, bytes a sample, shared", bytes_per_row, bytes_per_row, bytes_per_row, "<= 16", bytes_per_row <= 16.001))
    print(f"{'ratio':52} {'median':>7} {'95% band':>15}  goal")
    for entry in rows:
        verdict = {True: "met", False: "MISSED", None: "too noisy to say"}[entry.met]
        print(f"{entry.name:52} {entry.ratio:7.3f} [{entry.low:.3f}, {entry.high:.3f}]  {entry.goal}: {verdict}")
    print(f"\nindex of {arguments.index_rows:,} rows: written in {index['written_s']:.1f} s, sha256 in {index['sha256_s']:.2f} s,", end=" ")
    print(f"first batch {index['opened_s'] * 1e3:.1f} ms after opening, {index['draw_us']:.0f} us a sample,", end=" ")
    print(f"{index['private'] / 1e6:.1f} MB of memory not shared")
    print(f"peak memory of this process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3:.0f} MB; rates a second: ", end="")
    print(", ".join(f"{name} {value:,.0f}" for name, value in rates.items()))
    if arguments.json:
        write_json(arguments.json, {"rates": rates, "rows": [vars(entry) for entry in rows], "index": index})
    goals = [entry.met for entry in rows if "goal line" not in entry.name]
    sys.exit(1 if False in goals else 3 if None in goals else 0)


if __name__ == "__main__":
    main()
