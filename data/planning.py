"""What a build and its training feed take: shards, bytes, core-hours, hours and cores, each figure with the formula behind it."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import Field, PositiveFloat, PositiveInt

from data.catalog import Catalog
from runtime.settings import Settings

STAGES = ("alignment", "sft")


class Rate(NamedTuple):
    """A rate we go by until somebody measures it on the machines at hand."""

    value: float
    unit: str
    why: str


ASSUMED = {
    "bytes_per_image": Rate(134_000, "bytes", "512-pixel JPEG at quality 90"),
    "decode_per_s": Rate(700, "images/s a core", "one full decode of such a JPEG"),
    "prepare_kept_per_s": Rate(1000 / 1.9, "images/s a core", "1.9 ms to decode, hash and compare an image whose bytes are kept"),
    "prepare_resized_per_s": Rate(1000 / 16, "images/s a core", "16 ms where it is resized and encoded again"),
    "loader_per_s": Rate(700 * 0.8, "images/s a core", "0.8 of a full decode"),
    "core_share": Rate(0.85, "of 1", "share of the cores that a build keeps busy"),
    "io_bytes_per_s": Rate(1e9, "bytes/s a machine", "read or written, not both at once"),
    "gpu_samples_per_s": Rate(6.0, "samples/s a GPU", "nobody measured a training step; replace it first"),
}


class Counts(Settings):
    """How much there is to build and to feed."""

    samples: PositiveInt
    images: PositiveInt
    images_per_sample: dict[str, PositiveFloat] = Field(description="by training stage, as its task ratio draws them")


@dataclass(frozen=True)
class Row:
    """One figure: how it is computed, and which rates in it were assumed rather than measured."""

    name: str
    value: float
    unit: str
    formula: str
    basis: str


def count_catalog(catalog: Catalog, stages: tuple[str, ...] = STAGES) -> Counts:
    """Samples and images of every set that `stages` read, each set once."""
    sets = catalog.union(stages).values()
    per_sample: dict[str, float] = {}
    for stage, mixture in catalog.mixtures.items():
        if stage in stages:
            draws = {task: times * (2 if task == "image_edit" else 1) for task, times in mixture.ratio.items()}
            per_sample[stage] = sum(draws.values()) / sum(mixture.ratio.values())
    return Counts(samples=sum(s.count for s in sets), images=sum(s.images for s in sets), images_per_sample=per_sample)


def read_rates(path: Path) -> dict[str, float]:
    """The `rates` of a JSON file, any of ASSUMED's keys; what else the file holds is its own.

    Raises:
        ValueError: naming the file, the keys that are no rates of ours or the value that is not above 0, and what is allowed.
    """
    held = json.loads(Path(path).read_text())
    rates = held.get("rates") if isinstance(held, dict) else None
    if not isinstance(rates, dict):
        raise ValueError(f'{path}: holds no "rates"; expected {{"rates": {{name: number}}}} with any of {list(ASSUMED)}.')
    return _check_rates(rates, str(path))


def _check_rates(rates: Mapping[str, Any], name: str) -> dict[str, float]:
    if unknown := sorted(set(rates) - set(ASSUMED)):
        raise ValueError(f"{name}: rates {unknown} are unknown; allowed: {list(ASSUMED)}.")
    for key, value in rates.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise ValueError(f"{name}: rates.{key} is {value!r}; expected a number above 0, in {ASSUMED[key].unit}.")
    return {key: float(value) for key, value in rates.items()}


def plan(
    what: Catalog | Counts, rates: Mapping[str, float] | None, cores: int, machines: int, gpus: int = 64, shard_samples: int = 4000
) -> list[Row]:
    """The figures of a build on `machines` of `cores` cores each, and of feeding `gpus`.

    rates: measured ones, by ASSUMED's keys; what is absent is assumed, and each row's basis says so.

    Raises:
        ValueError: a rate that is unknown or not above 0, or no core, machine, GPU or sample a shard.
    """
    if min(cores, machines, gpus, shard_samples) < 1:
        raise ValueError(f"cores {cores}, machines {machines}, gpus {gpus}, shard_samples {shard_samples} given; each must be at least 1.")
    counts = count_catalog(what) if isinstance(what, Catalog) else what
    measured = _check_rates(rates or {}, "rates")
    rate = {key: assumed.value for key, assumed in ASSUMED.items()} | measured

    def row(name: str, value: float, unit: str, formula: str, *uses: str) -> Row:
        return Row(name, value, unit, formula, _basis(uses, measured))

    size = counts.images * rate["bytes_per_image"]
    moved = 2 * size / (rate["io_bytes_per_s"] * machines) / 3600
    transfer = ("bytes_per_image", "io_bytes_per_s")
    rows = [
        row("samples", counts.samples, "", "sum of the sets, each once"),
        row("images", counts.images, "", "one a sample, two an edit"),
        row("shards", math.ceil(counts.samples / shard_samples), "", f"samples / {shard_samples}"),
        row("storage", size / 1e12, "TB", "images x bytes_per_image", "bytes_per_image"),
        row("read and write once", moved, "h", "2 x images x bytes_per_image / (io_bytes_per_s x machines)", *transfer),
        row("verify by full decode", counts.images / rate["decode_per_s"] / 3600, "core-h", "images / decode_per_s", "decode_per_s"),
    ]
    for name, key in (("build, bytes kept", "prepare_kept_per_s"), ("build, all resized", "prepare_resized_per_s")):
        work = counts.images / rate[key] / 3600
        hours = max(work / (cores * machines * rate["core_share"]), moved)  # whichever of cores and disks is the slower
        rows.append(row(name, work, "core-h", f"images / {key}", key))
        formula = f"max(core-h / ({cores} x {machines} x core_share), read and write once)"
        rows.append(row(name, hours, "h", formula, key, "core_share", *transfer))
    for stage, images in counts.images_per_sample.items():
        need = gpus * rate["gpu_samples_per_s"] * images
        formula = f"{gpus} GPUs x gpu_samples_per_s x {images:.3g} images a sample"
        rows.append(row(f"feed of {stage}", need, "images/s", formula, "gpu_samples_per_s"))
        both = ("gpu_samples_per_s", "loader_per_s")
        rows.append(row(f"feed of {stage}", need / rate["loader_per_s"], "cores", "images/s / loader_per_s", *both))
    return rows


def _basis(uses: tuple[str, ...], measured: Mapping[str, float]) -> str:
    missing = [key for key in uses if key not in measured]
    if not missing:
        return "measured" if uses else "counted"
    return "assumed" if len(missing) == len(uses) else f"assumed {', '.join(missing)}"


def print_plan(rows: list[Row], rates: Mapping[str, float] | None = None) -> None:
    """A line a figure, then the rates that went into them."""
    for row in rows:
        value = f"{row.value:,.0f}" if row.value >= 100 or row.value == int(row.value) else f"{row.value:,.3g}"
        print(f"{row.name:26}{value:>12} {row.unit:10}= {row.formula}  [{row.basis}]")
    print(f"\n{'rate':24}{'value':>14}  unit")
    for key, assumed in ASSUMED.items():
        measured = (rates or {}).get(key)
        origin = f"assumed: {assumed.why}" if measured is None else "measured"
        print(f"{key:24}{assumed.value if measured is None else measured:14,.6g}  {assumed.unit:20}{origin}")
